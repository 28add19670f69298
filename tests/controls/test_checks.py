"""Every public control refuses tensors that do not fit each other, whose broadcast would be a silent wrong number."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_entropy import controls
from trl_entropy.controls import PolicyTokens
from trl_entropy.controls.checks import check_shapes

B, T = 2, 3
MASK = torch.ones(B, T, dtype=torch.bool)


def per_token() -> Tensor:
    return torch.full((B, T), -0.5)


TOKENS = PolicyTokens(per_token(), per_token(), per_token(), MASK)
CLIP = {"eps_low": 0.2, "eps_high": 0.2}
BY_HAND: dict[str, dict[str, Any]] = {
    "binary_divergence": {"logps": per_token(), "sampler_logps": per_token(), "kind": "tv"},
    "bounded_old_logps": {"old_logps": per_token(), "log_weight": per_token()},
    "ce_gppo": {"tokens": TOKENS, "log_weight": per_token(), "alpha1": 1.0, "alpha2": 1.0, **CLIP},
    "clip_controls": {
        "tokens": TOKENS,
        "entropies": per_token(),
        "old_entropies": per_token(),
        "level": "token",
        **CLIP,
    },
    "clip_cov": {
        **{"covariances": per_token(), "lots": per_token(), "mask": MASK},
        **{"fraction": 0.5, "low": 0.0, "high": 1.0, "gather": lambda flat: flat},
    },
    "clipped_by_ppo": {"ratio": per_token(), "advantages": per_token(), **CLIP},
    "covariance": {"advantages": per_token(), "logps": per_token(), "mask": MASK},
    "dppo": {"tokens": TOKENS, "sampler_logps": per_token(), "divergence": "tv", "delta_low": 0.1, "delta_high": 0.1},
    "entropic": {"tokens": TOKENS, "actuator": 0.5, "probability": 0.9},
    "entropy_advantage": {"tokens": TOKENS, "entropies": per_token(), "alpha": 0.4, "kappa": 2.0},
    "entropy_ratio": {"entropies": per_token(), "old_entropies": per_token()},
    "epo": {
        **{"entropies": per_token(), "mask": MASK, "history": torch.tensor(0.5), "bonus_entropies": per_token()},
        **{"beta": 1.0, "kappa_low": 0.8, "kappa_high": 1.2, "penalty": 0.1, "form": "hinge", "num_trajectories": 2.0},
    },
    "erc": {"tokens": TOKENS, "entropies": per_token(), "old_entropies": per_token(), "low": 0.9, "high": 1.1},
    "fipo": {
        **{"tokens": TOKENS, "log_weight": per_token(), "half_life": 32.0, "clip_range": 0.2},
        **{"raise_only": False, "max_ratio": 10.0, "safe_ratio": 4.0},
    },
    "kl_cov": {
        **{"tokens": TOKENS, "log_ratio": per_token(), "selected": MASK, "coef": 1.0, "ppo_clip": False},
        **{"delta": None, **CLIP},
    },
    "log_importance_weight": {"logps": per_token(), "old_logps": per_token(), "mask": MASK, "level": "sequence"},
    "micro_batch": {"tokens": TOKENS, "entropies": per_token(), "old_entropies": per_token(), "level": "token"},
    "par": {"tokens": TOKENS, "weight": 0.5},
    "positive_nll": {"logps": per_token(), "mask": MASK, "correct": MASK[:, 0], "num_tokens": 4.0},
    "qae": {"advantages": torch.zeros(4), "group_size": 2, "quantile": 0.4},
    "stare_weights": {
        **{"old_logps": per_token(), "advantages": per_token(), "mask": MASK},
        **{"fraction": 0.5, "positive_weight": 1.1, "negative_weight": 0.9},
    },
    "steer": {"tokens": TOKENS, "change": per_token(), "scale": torch.tensor(1.0), "min_weight": 0.8},
}
ANY_SHAPE = {"in_float32", "inside_bounds"}
"""Of one tensor each, element by element."""
GIVEN = [(name, field) for name, fields in BY_HAND.items() for field in fields if isinstance(fields[field], Tensor)]


def function_of(name: str) -> Callable[..., Any]:
    return getattr(controls, name)


def test_every_public_function_of_tensors_is_in_the_table() -> None:
    of_tensors = set()
    for name in controls.__all__:
        thing = getattr(controls, name)
        if inspect.isfunction(thing):
            annotations = [str(parameter.annotation) for parameter in inspect.signature(thing).parameters.values()]
            if any("Tensor" in text or "PolicyTokens" in text for text in annotations):
                of_tensors.add(name)
    assert of_tensors == BY_HAND.keys() | ANY_SHAPE


@pytest.mark.parametrize("name", BY_HAND)
def test_what_fits_is_taken(name: str) -> None:
    function_of(name)(**BY_HAND[name])


def misfit(value: Tensor, change: str) -> Tensor:
    if not value.dim():
        return value.expand(B, B)
    return value[..., :-1] if change == "shorter" else value.expand(B, *value.shape)  # which would broadcast


@pytest.mark.parametrize(("name", "field"), GIVEN)
@pytest.mark.parametrize("change", ["shorter", "another axis"])
def test_what_does_not_fit_is_named(name: str, field: str, change: str) -> None:
    wrong = misfit(BY_HAND[name][field], change)
    shape = re.escape(str(tuple(wrong.shape)))
    with pytest.raises(ValueError, match=f"{field} {shape}|3 advantages are not whole groups"):
        function_of(name)(**BY_HAND[name] | {field: wrong})


def test_entropies_that_fit_each_other_must_fit_the_tokens() -> None:
    wrong = {"entropies": torch.ones(B, 1), "old_entropies": torch.ones(B, 1)}
    for name in ("erc", "clip_controls", "micro_batch"):
        with pytest.raises(ValueError, match=r"entropies \(2, 1\)"):
            function_of(name)(**BY_HAND[name] | wrong)


@pytest.mark.parametrize("name", ["logps", "old_logps", "advantages", "mask", "frozen", "without_bonus"])
def test_the_tokens_of_a_micro_batch_have_one_shape(name: str) -> None:
    fields = {field: value if value is not None else MASK for field, value in vars(TOKENS).items()}
    PolicyTokens(**fields)
    for wrong in (fields[name][:, :2], fields[name][0], fields[name].unsqueeze(0)):
        with pytest.raises(ValueError, match="These shapes do not fit"):
            PolicyTokens(**fields | {name: wrong})


def test_one_tensor_alone_has_its_rank_checked() -> None:
    with pytest.raises(ValueError, match=r"logps \(6,\)\. Wanted: logps \(B, T\)"):
        check_shapes(logps=(torch.zeros(6), "B T"))


def test_a_weight_of_the_sequence_may_stand_for_its_tokens() -> None:
    check_shapes(mask=(MASK, "B T"), weight=(torch.zeros(B, 1), "B T?"))
    with pytest.raises(ValueError, match=r"weight \(2, 2\)\. Wanted: mask \(B, T\), weight \(B, T or 1\)"):
        check_shapes(mask=(MASK, "B T"), weight=(torch.zeros(B, 2), "B T?"))


def test_a_mask_of_numbers_is_refused() -> None:
    """Of an int mask `~mask` is -1 and -2, and every token counts."""
    with pytest.raises(ValueError, match=r"mask must be bool, got torch\.int64"):
        PolicyTokens(per_token(), per_token(), per_token(), MASK.long())
