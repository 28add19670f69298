"""The controls for subclasses of TRL's trainer that override what people override."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from tests import reference
from tests.distributed.gradients_worker import CONTROLS as EACH
from tests.reference import Settings
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients
from tests.trainers.subclasses import (
    SUBCLASSES,
    AloneTrainer,
    AuxiliaryTrainer,
    BeforeTrainer,
    ColumnTrainer,
    EarlyTrainer,
    GenerationTrainer,
    LoggingTrainer,
    ReinforceTrainer,
    RewardTrainer,
    ScaledTrainer,
    made,
)
from tests.trainers.test_exact_gradients import BASE, CE_GPPO, ERC, NLL, check, random_batch
from tests.trainers.test_grpo import assert_same_weights, trained, weights
from trl_entropy import EntropyGRPOConfig, entropy_controlled
from trl_entropy.controls import CONTROLS, controls_of
from trl_entropy.trainers.controlled import config_of

ERC_ALONE = {"erc_low": 0.95, "erc_high": 1.05}
SHAPED = {**ERC_ALONE, "ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}
CONTROLLED = [cls for cls in SUBCLASSES if cls not in (ColumnTrainer, EarlyTrainer, AloneTrainer)]


@pytest.mark.parametrize("base", SUBCLASSES)
def test_no_control_is_bit_for_bit_the_trainer_s_own(
    make_trainer: Callable[..., Any], tmp_path: Path, base: type
) -> None:
    ours = trained(made(make_trainer, base, tmp_path / "ours", max_steps=2))
    theirs = make_trainer(tmp_path / "own", trainer_class=base, config_class=config_of(base), max_steps=2)
    start = weights(theirs)
    assert_same_weights(weights(ours), weights(trained(theirs)))
    assert any(not torch.equal(start[name], value) for name, value in weights(theirs).items())


@pytest.mark.parametrize("base", CONTROLLED)
def test_controls_train_and_change_the_training(make_trainer: Callable[..., Any], tmp_path: Path, base: type) -> None:
    theirs = trained(make_trainer(tmp_path / "own", trainer_class=base, config_class=config_of(base)))
    shaped = ERC_ALONE if base is ReinforceTrainer else SHAPED  # it reads no old log-probs, which CE-GPPO changes
    controlled = trained(made(make_trainer, base, tmp_path / "ours", **shaped, positive_nll_coef=0.1))
    assert any(not torch.equal(value, weights(controlled)[name]) for name, value in weights(theirs).items())
    assert all("erc/clip_fraction" in entry for entry in controlled.state.log_history[:-1])
    if base is LoggingTrainer:
        assert all(entry["own"] == 1.0 for entry in controlled.state.log_history)


class HandsOnTrainer(GRPOTrainer):
    """Overrides what the controls build on, and hands on copies."""

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        return {**super()._prepare_inputs(generation_batch)}

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        return {**super()._generate_and_score_completions([*inputs])}

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list).clone()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().compute_loss(model, {**inputs}, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return super()._compute_loss(model, {**inputs})


EVERY: dict[str, dict[str, Any]] = {
    **{name: settings for name, settings in EACH.items() if "asyppo" not in name},
    "coefficient": {"target_entropy": 9.0, "target_entropy_by": "coefficient"},
}
"""Settings that switch on each control that is no critics'."""


@pytest.mark.parametrize("name", EVERY)
def test_a_subclass_that_hands_on_trains_as_trl_s_own_does(
    make_trainer: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """Bit for bit, so what the reference says of `EntropyGRPOTrainer` it says of a subclass."""
    settings = {"max_steps": 3, "learning_rate": 3e-2, **EVERY[name]}
    theirs = trained(make_trainer(tmp_path / "trl", **settings))
    ours = trained(made(make_trainer, HandsOnTrainer, tmp_path / "ours", **settings))
    assert_same_weights(weights(ours), weights(theirs))
    clocks = ("train_runtime", "train_samples", "train_steps", "step_time", "profiling")
    for first, second in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert {key: value for key, value in first.items() if not key.startswith(clocks)} == {
            key: value for key, value in second.items() if not key.startswith(clocks)
        }


@pytest.mark.parametrize("name", EVERY)
def test_with_each_control_a_resumed_run_equals_an_uninterrupted_one(
    make_trainer: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """From the middle of a rollout."""
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-2, **EVERY[name]}
    whole = trained(made(make_trainer, HandsOnTrainer, tmp_path / "run", **settings))
    resumed = made(make_trainer, HandsOnTrainer, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-3")
    assert_same_weights(weights(resumed), weights(whole))


def test_every_control_is_among_them(tmp_path: Path) -> None:
    args = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "steps_per_generation": 4}
    configs = [EntropyGRPOConfig(**args, **settings) for settings in EVERY.values()]
    on = {control.prefix for config in configs for control in controls_of(config)}
    assert on == {control.prefix for control in CONTROLS if not control.comes_with_critics}


@pytest.mark.parametrize("base", [ScaledTrainer, RewardTrainer, GenerationTrainer, AuxiliaryTrainer])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_trainer: Callable[..., Any], tmp_path: Path, base: type
) -> None:
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "epo_coef": 0.1, **SHAPED}
    whole = trained(made(make_trainer, base, tmp_path / "run", **settings))
    resumed = made(make_trainer, base, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    args = torch.load(tmp_path / "run" / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert type(args) is entropy_controlled(base).config_class
    assert args.erc_low == 0.95


@pytest.fixture
def build(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`build(base, settings)`: a controlled trainer on top of the stubbed forward pass."""
    stub_forward(monkeypatch)

    def built(base: type, s: Settings) -> Any:
        cls = entropy_controlled(base)
        return stubbed_trainer(make_trainer, s, trainer_class=cls, config_class=cls.config_class)

    return built


LEVELS = ["token", "sequence"]
S = replace(BASE, **ERC, **CE_GPPO, **NLL)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("base", [RewardTrainer, GenerationTrainer, LoggingTrainer])
def test_gradients_where_the_loss_is_trl_s(build: Callable[..., Any], base: type, level: str) -> None:
    s = replace(S, level=level)
    check(build(base, s), s, *random_batch(1))


@pytest.mark.parametrize("level", LEVELS)
def test_the_controls_act_on_the_inputs_that_the_override_hands_on(build: Callable[..., Any], level: str) -> None:
    s = replace(S, level=level)
    b, inputs = random_batch(1)
    check(build(BeforeTrainer, s), s, replace(b, advantages=2.0 * b.advantages), inputs)


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_control_adds_is_not_scaled_with_the_trainer_s_loss(build: Callable[..., Any], level: str) -> None:
    s = replace(S, level=level)
    b, inputs = random_batch(1)
    added = reference.loss(b, s) - reference.loss(b, replace(s, nll_coef=0.0))
    expected = 3.0 * reference.loss(b, replace(s, nll_coef=0.0)) + added
    _, found = trainer_gradients(build(ScaledTrainer, s), b, inputs)
    for got, want in zip(found, gradients(expected, b), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_a_forward_pass_of_the_override_is_left_alone(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    b, inputs = random_batch(1)
    trainer = build(AuxiliaryTrainer, S)
    first = torch.full((8, 1), -1.0, dtype=torch.float64, requires_grad=True)
    stub = GRPOTrainer._get_per_token_logps_and_entropies

    def forward(self: Any, model: Any, ids: Any, mask: Any, kept: int, *args: Any, **kwargs: Any) -> Any:
        return (first, first.detach(), None) if kept == 1 else stub(self, model, ids, mask, kept, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", forward)
    _, (found, _) = trainer_gradients(trainer, b, inputs)
    want, _ = gradients(reference.loss(b, S), b)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-14)


def test_a_loss_of_its_own_gets_the_shaped_advantages(build: Callable[..., Any]) -> None:
    """ERC on REINFORCE: the gradient of a token outside the band is exactly 0, of the others `-A / tokens`."""
    b, inputs = random_batch(1)
    s = replace(BASE, **ERC)
    _, (found, _) = trainer_gradients(build(ReinforceTrainer, s), b, inputs)
    count = b.mask.sum().item()
    for i, t in reference.valid_tokens(b):
        want = -reference.advantage(b, i, t) / count if reference.keeps_gradient(b, s, i, t) else 0.0
        assert found[i, t].item() == pytest.approx(want, rel=1e-12, abs=0.0), (i, t)


def test_a_loss_that_takes_advantages_as_a_column_is_refused(build: Callable[..., Any]) -> None:
    """With as many completions as tokens the product would be `(B, B, T)`, and nothing would complain."""
    b, inputs = random_batch(1)
    trainer = build(ColumnTrainer, replace(BASE, **ERC))
    with pytest.raises(ValueError, match=r"one per token, of shape \(8, 7\), .* as if they were one per completion"):
        trainer_gradients(trainer, b, inputs)
    takes: tuple[Callable[[Tensor], Tensor], ...] = (
        *(lambda a: a[:, None], lambda a: torch.unsqueeze(a, 1), lambda a: a[:, None, :]),
        *(lambda a: a.view(-1, 1), lambda a: a.reshape(-1, 1), lambda a: a.unsqueeze_(1)),
    )
    for take in takes:
        trainer.column = take
        with pytest.raises(ValueError, match="as if they were one per completion"):
            trainer_gradients(trainer, b, inputs)


def test_old_log_probs_that_are_not_read_are_an_error_once_a_control_changes_them(build: Callable[..., Any]) -> None:
    b, inputs = random_batch(1)
    _ = trainer_gradients(build(ReinforceTrainer, replace(BASE, **ERC)), b, inputs)
    with pytest.raises(RuntimeError, match=r"ReinforceTrainer\._compute_loss does not read old_per_token_logps "):
        trainer_gradients(build(ReinforceTrainer, replace(BASE, **CE_GPPO)), b, inputs)


class ReferenceFirstTrainer(GRPOTrainer):
    """A loss of its own whose first forward pass is the reference's."""

    with_entropy = True

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        length = inputs["completion_ids"].size(1)
        forward = self._get_per_token_logps_and_entropies
        with torch.no_grad():
            ref, *_ = forward(self.ref_model or model, ids, torch.ones_like(ids), length)
        logps, *_ = forward(model, ids, torch.ones_like(ids), length, compute_entropy=self.with_entropy)
        return ((logps - ref.clone()) ** 2 - logps * inputs["advantages"].view(len(ids), -1)).mean()


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_reference_s_forward_pass_is_not_the_loss_s(
    make_trainer: Callable[..., Any], tmp_path: Path, beta: float
) -> None:
    runs = [
        trained(made(make_trainer, ReferenceFirstTrainer, tmp_path / name, beta=beta, max_steps=1, **controls))
        for name, controls in (("off", {}), ("on", {"positive_nll_coef": 0.5}))
    ]
    assert any(not torch.equal(value, weights(runs[1])[name]) for name, value in weights(runs[0]).items())
    trainer = made(make_trainer, ReferenceFirstTrainer, tmp_path / "none", beta=beta, positive_nll_coef=0.5)
    trainer.with_entropy = False
    with pytest.raises(RuntimeError, match=r"ReferenceFirstTrainer\._compute_loss calls .* without `compute_entropy="):
        trainer.train()


class AfterTrainer(GRPOTrainer):
    """Reads its inputs after TRL's loss."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        before = dict(inputs)
        loss = super()._compute_loss(model, inputs)
        assert all(inputs[name] is value for name, value in before.items())
        return loss


def test_an_override_finds_its_inputs_as_they_were(build: Callable[..., Any]) -> None:
    check(build(AfterTrainer, S), S, *random_batch(1))
