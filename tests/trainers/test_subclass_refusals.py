"""Subclasses of TRL's trainer that the controls cannot follow: each is refused, and why is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tests.trainers.subclasses import (
    AloneTrainer,
    EarlyTrainer,
    ReinforceTrainer,
    ScaledTrainer,
    made,
)
from tests.trainers.test_grpo import trained
from tests.trainers.test_subclasses import SHAPED
from trl_entropy import entropy_controlled


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (EarlyTrainer, r"EarlyTrainer\._compute_loss does not read advantages .* would do nothing"),
        (AloneTrainer, r"AloneTrainer\._compute_loss computes a loss without `self\._get_per_token_logps"),
    ],
)
def test_a_control_without_effect_is_an_error_at_the_first_loss(
    make_trainer: Callable[..., Any], base: type, said: str
) -> None:
    trainer = made(make_trainer, base, **SHAPED)
    with pytest.raises(RuntimeError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0


def test_trl_s_adaptive_coefficient_needs_trl_s_loss(make_trainer: Callable[..., Any]) -> None:
    settings = {"target_entropy": 0.3, "target_entropy_by": "coefficient"}
    with pytest.raises(ValueError, match=r"target_entropy=0\.3.* ReinforceTrainer\._compute_loss, which takes the"):
        made(make_trainer, ReinforceTrainer, model="no-such/model", **settings)
    made(make_trainer, ScaledTrainer, **settings)


class StepTrainer(GRPOTrainer):
    """A step of its own, which calls the loss behind `compute_loss`."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self._compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_step_that_goes_around_compute_loss_is_refused(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(
        RuntimeError, match=r"StepTrainer\.training_step calls `self\._compute_loss` without `self\.co"
    ):
        made(make_trainer, StepTrainer, positive_nll_coef=0.5).train()
    trained(made(make_trainer, StepTrainer, max_steps=1))


class TwiceTrainer(GRPOTrainer):
    """Calls TRL's loss twice, as for two views of a micro-batch."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return super()._compute_loss(model, inputs) + super()._compute_loss(model, inputs)


class AroundTrainer(GRPOTrainer):
    """Calls TRL's loss by the name of its class."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return GRPOTrainer._compute_loss(self, model, inputs)


class RenamedTrainer(ReinforceTrainer):
    """A loss whose advantages have another name."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        forward = self._get_per_token_logps_and_entropies
        logps, *_ = forward(model, ids, torch.ones_like(ids), inputs["completion_ids"].size(1), compute_entropy=True)
        return -(logps * inputs["scores"].unsqueeze(1)).mean()

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = dict(super()._prepare_inputs(generation_batch))
        return inputs | {"scores": inputs.pop("advantages")}


@pytest.mark.parametrize("settings", [{"positive_nll_coef": 0.5}, {"record_tokens": 8}], ids=["nll", "recorded"])
@pytest.mark.parametrize(
    ("base", "said"),
    [
        (TwiceTrainer, r"^TwiceTrainer\._compute_loss calls TRL's loss twice in one micro-batch"),
        (
            AroundTrainer,
            r"^AroundTrainer\._compute_loss does not reach TRL's loss through `super\(\)\._compute_loss`",
        ),
        (RenamedTrainer, r"^RenamedTrainer\._compute_loss has inputs without `advantages`, on which the entropy con"),
    ],
)
def test_a_loss_that_the_controls_cannot_follow_is_named(
    make_trainer: Callable[..., Any], tmp_path: Path, base: type, said: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeError, match=said):
        made(make_trainer, base, tmp_path / "on", **settings).train()
    trained(made(make_trainer, base, tmp_path / "off", max_steps=1))


def test_a_configuration_that_the_trainer_makes_itself_is_checked(make_trainer: Callable[..., Any]) -> None:
    class SettingsTrainer(ReinforceTrainer):
        def __init__(self, *, settings: dict[str, Any], **kwargs: Any) -> None:
            super().__init__(**settings, **kwargs)

    cls = entropy_controlled(SettingsTrainer, config_class=GRPOConfig)

    def construct(*, args: Any, **given: Any) -> Any:
        return cls(settings={"args": args}, **given)

    with pytest.raises(ValueError, match=r"target_entropy=0\.3.* ReinforceTrainer\._compute_loss, which takes the"):
        make_trainer(trainer_class=construct, target_entropy=0.3, target_entropy_by="coefficient")


class ShuffledTrainer(GRPOTrainer):
    """Hands on the rows of a rollout in another order."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        return {name: value.flip(0) if value.dim() else value for name, value in output.items()}


class SwappedTrainer(GRPOTrainer):
    """Hands on the first two rows of a rollout in each other's place."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        order = [1, 0, *range(2, len(output["completion_ids"]))]
        return {name: value[order] if value.dim() else value for name, value in output.items()}


class UnscoredTrainer(GRPOTrainer):
    """Makes its rollout anew, without `_calculate_rewards`."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.__dict__["_calculate_rewards"] = lambda *args: GRPOTrainer._calculate_rewards(self, *args)
        return super()._generate_and_score_completions(inputs)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (ShuffledTrainer, r"ShuffledTrainer\._generate_and_score_completions .*(other completions|does not take)"),
        (SwappedTrainer, r"SwappedTrainer\._generate_and_score_completions hands on other completions"),
        (UnscoredTrainer, r"UnscoredTrainer\._generate_and_score_completions scores a rollout without"),
    ],
)
def test_a_rollout_whose_rewards_are_unknown_is_refused(
    make_trainer: Callable[..., Any], base: type, said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        made(make_trainer, base, positive_nll_coef=0.1).train()
    trained(made(make_trainer, base, ce_gppo_alpha1=0.5, ce_gppo_alpha2=1.0))  # needs neither
