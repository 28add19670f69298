"""Numbers that break a naive loss: every control stays finite in float32, and right where the formula is defined."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.reference import Batch, Settings
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients, trainer_inputs

MAX_LOG_RATIO = 40.0  # the trainer bounds the log importance weight here, and keeps its gradient
BASE = Settings(eps_lo=0.2, eps_hi=0.28, max_completion_length=3, accumulation=1, micro_batches_per_rollout=2)
ERC: dict[str, Any] = {"erc": (0.95, 1.05)}
CE_GPPO: dict[str, Any] = {"alphas": (0.75, 1.1)}
NLL: dict[str, Any] = {"nll_coef": 0.1}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "erc": ERC,
    "ce_gppo": CE_GPPO,
    "nll": NLL,
    "erc+ce_gppo": ERC | CE_GPPO,
    "erc+nll": ERC | NLL,
    "ce_gppo+nll": CE_GPPO | NLL,
    "erc+ce_gppo+nll": ERC | CE_GPPO | NLL,
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")},
    "delta": {"dual_clip": 10.0},
    "kl": {"beta": 0.04},
    "off_policy_mask": {"off_policy_threshold": 0.5},
}


@pytest.fixture
def build(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`build(settings, **config)`: a real trainer on top of the stubbed forward pass."""
    stub_forward(monkeypatch)
    return partial(stubbed_trainer, make_trainer)


def hostile_batch(
    size: float,
    entropy: tuple[float, ...] = (0.5, 0.5, 1.0),
    entropy_old: tuple[float, ...] = (0.5, 0.51, 0.5),
    token_advantages: tuple[float, ...] | None = None,
) -> Batch:
    """Rows with log-ratios of +-`size`, in float32.

    All rows come with a positive, a negative and a zero advantage (a group without variance): the ratio explodes on
    one token, vanishes on one token, does so on the whole row or on a one-token completion, or the row is masked.
    With `token_advantages` the signs also differ within a row.
    """
    patterns = [(size, 0.0, -size), (size,) * 3, (-size,) * 3, (size, 0.0, 0.0), (-size, 0.0, 0.0), (size, -size, 0.0)]
    lengths = [3, 3, 3, 1, 1, 0]
    log_ratio = torch.tensor(patterns).repeat(3, 1)
    advantages = torch.tensor([1.0, -1.0, 0.0]).repeat_interleave(len(patterns))
    lp = -0.1 + log_ratio.clamp(max=0.0)
    rows = len(advantages)
    if token_advantages is not None:
        advantages = advantages.unsqueeze(1) * torch.tensor(token_advantages)
    mask = (torch.arange(3) < torch.tensor(lengths).unsqueeze(1)).long().repeat(3, 1)
    return Batch(
        lp=lp.clone().requires_grad_(),
        entropy=torch.tensor(entropy).repeat(rows, 1).requires_grad_(),
        mask=mask,
        advantages=advantages,
        num_items=2.0 * mask.sum().item(),
        lp_old=-0.1 - log_ratio.clamp(min=0.0),
        entropy_old=torch.tensor(entropy_old).repeat(rows, 1),
        lp_ref=lp - 0.3,
        rewards=torch.tensor([1.0, 0.0, float("nan")]).repeat(rows // 3),
        num_correct_tokens=2.0 * mask[::3].sum().item(),
    )


def in_float64(b: Batch) -> Batch:
    """The same numbers for the reference."""
    values: dict[str, Any] = {name: value for name, value in vars(b).items() if torch.is_tensor(value)}
    for name in values.keys() - {"mask"}:
        values[name] = values[name].detach().double().requires_grad_(values[name].requires_grad)
    return replace(b, **values)


def with_bounded_ratio(b: Batch, level: str) -> Batch:
    """Move `lp_old` so that no log importance weight exceeds the bound; the off-policy mask still reads the original.

    A weight below e^-600 is 0 to every formula but CE-GPPO's r / sg(r), which must not become 0 / 0 in float64.
    """
    assert b.lp_old is not None
    log_weight = (b.lp - b.lp_old).detach()
    if level == "sequence":
        log_weight = (log_weight * b.mask).sum(1, keepdim=True) / b.mask.sum(1, keepdim=True).clamp(min=1)
    excess = log_weight - log_weight.clamp(-600.0, MAX_LOG_RATIO)
    return replace(b, lp_old=b.lp_old + excess, lp_sampling=b.lp_old)


def check(trainer: Any, s: Settings, b: Batch) -> None:
    """Finite, and equal to the formula at the bounded ratio up to float32's rounding of a log-ratio of 1000."""
    loss, found = trainer_gradients(trainer, b, trainer_inputs(b, b.mask))
    assert loss.isfinite(), loss
    exact = with_bounded_ratio(in_float64(b), s.level)
    for got, want in zip(found, gradients(reference.loss(exact, s), exact), strict=True):
        assert got.isfinite().all(), got
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("controls", COMBINATIONS)
def test_exploding_and_vanishing_ratios(build: Callable[..., Any], controls: str, level: str, variant: str) -> None:
    s = replace(BASE, level=level, **COMBINATIONS[controls] | VARIANTS[variant])
    trainer = build(s)
    for size in (100.0, 119.0, 1000.0):
        check(trainer, s, hostile_batch(size))
        check(trainer, s, hostile_batch(size, token_advantages=(1.0, -0.5, 0.0)))


@pytest.mark.parametrize("kl_times_ratio", [False, True])
@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("controls", ["erc", "nll", "erc+nll"])
def test_losses_that_only_erc_can_gate(
    build: Callable[..., Any], controls: str, level: str, loss_type: str, kl_times_ratio: bool
) -> None:
    s = replace(
        BASE, level=level, loss_type=loss_type, beta=0.04, kl_times_ratio=kl_times_ratio, **COMBINATIONS[controls]
    )
    if kl_times_ratio and s.erc and reference.gates_the_ratio(s):
        with pytest.raises(ValueError, match="use_bias_correction_kl=False"):
            build(s)
        return
    trainer = build(s)
    for size in (100.0, 119.0, 1000.0):
        check(trainer, s, hostile_batch(size))
        check(trainer, s, hostile_batch(size, token_advantages=(1.0, -0.5, 0.0)))


@pytest.mark.parametrize("controls", ["erc", "erc+ce_gppo", "erc+ce_gppo+nll"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_zero_entropies(build: Callable[..., Any], level: str, controls: str) -> None:
    """Zero, and the slightly negative values that rounding leaves, in the new policy, in the old one, and in both."""
    s = replace(BASE, level=level, entropy_coef=0.01, **COMBINATIONS[controls])
    trainer = build(s)
    values = (0.0, -1e-7, 1e-9, 0.5)
    for new in values:
        for old in values:
            check(trainer, s, hostile_batch(1.0, entropy=(new,) * 3, entropy_old=(old, old, new)))


@pytest.mark.parametrize("controls", COMBINATIONS)
def test_a_group_without_variance_has_no_policy_gradient(build: Callable[..., Any], controls: str) -> None:
    s = replace(BASE, **COMBINATIONS[controls])
    trainer = build(s)
    for size in (0.0, 1.0, 100.0, 1000.0):
        b = hostile_batch(size, entropy=(0.5,) * 3, entropy_old=(0.5,) * 3)
        zeros = torch.zeros_like(b.advantages)
        b = replace(b, advantages=zeros, rewards=zeros, num_correct_tokens=0.0)
        loss, (found, _) = trainer_gradients(trainer, b, trainer_inputs(b, b.mask))
        assert loss == 0.0
        assert torch.equal(found, torch.zeros_like(found))


def entropy_of(*probabilities: float) -> Tensor:
    p = torch.tensor(probabilities, dtype=torch.float64)
    return -torch.special.xlogy(p, p).sum()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("controls", "kept"), [({}, True), (ERC, False)], ids=["ppo_clip", "erc"])
def test_the_example_that_motivates_erc(
    build: Callable[..., Any], controls: dict[str, Any], kept: bool, sign: float
) -> None:
    """(0.85, 0, 0.15, 0) -> (0.82, 0.064, 0.07, 0.046), the first action sampled (arXiv 2512.05591).

    r = 0.82 / 0.85 = 0.9647, well inside 0.8..1.28. H_old = 0.4227 and H = 0.6664 nats, so rho = 1.577 > 1.05.
    """
    old, new = entropy_of(0.85, 0, 0.15, 0), entropy_of(0.82, 0.064, 0.07, 0.046)
    torch.testing.assert_close((new / old).item(), 1.5766, rtol=0, atol=1e-4)
    b = Batch(
        lp=torch.tensor([[0.82]], dtype=torch.float64).log().requires_grad_(),
        entropy=new.reshape(1, 1).requires_grad_(),
        mask=torch.ones(1, 1, dtype=torch.long),
        advantages=torch.tensor([sign], dtype=torch.float64),
        num_items=1.0,
        lp_old=torch.tensor([[0.85]], dtype=torch.float64).log(),
        entropy_old=old.reshape(1, 1),
    )
    s = replace(BASE, loss_type="grpo", **controls)
    _, (found, _) = trainer_gradients(build(s), b, trainer_inputs(b, b.mask))
    # one token, one row: the gradient of -r A is -r A
    expected = -sign * 0.82 / 0.85 if kept else 0.0
    torch.testing.assert_close(found.item(), expected, rtol=1e-12, atol=0)
