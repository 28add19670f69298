"""Subclasses of TRL's trainer that override what people override."""

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from trl_entropy import entropy_controlled


@dataclass
class ScaledConfig(GRPOConfig):
    """One field more, and another default."""

    scale: float = field(default=3.0, metadata={"help": "Of the loss."})
    epsilon: float = 0.25


class ScaledTrainer(GRPOTrainer):
    """Scales TRL's loss and adds to it, after it."""

    def __init__(self, model: Any, reward_funcs: Any, args: "ScaledConfig | None" = None, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args or ScaledConfig(output_dir="scaled"), **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return self.args.scale * super()._compute_loss(model, inputs) + 0.5


class BeforeTrainer(GRPOTrainer):
    """Gives TRL's loss other inputs than it got, in a dict of its own."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return super()._compute_loss(model, {**inputs, "advantages": 2.0 * inputs["advantages"]})


class AuxiliaryTrainer(GRPOTrainer):
    """Makes a forward pass of its own before TRL's, and adds its mean."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids, mask = inputs["prompt_ids"], inputs["prompt_mask"]
        logps = self._get_per_token_logps_and_entropies(model, ids, mask, 1, compute_entropy=True)[0]
        return super()._compute_loss(model, inputs) - 0.1 * logps.mean()


class RewardTrainer(GRPOTrainer):
    """Doubles the rewards, and halves the advantages that come of them."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        return 2.0 * super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        return {**output, "advantages": output["advantages"] / 2}


class GenerationTrainer(GRPOTrainer):
    """Cuts every completion to its first four tokens, and scales what a step gets."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        ids, *others = super()._generate_single_turn(*args, **kwargs)
        return [one[:4] for one in ids], *others

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        return {**inputs, "advantages": 1.5 * inputs["advantages"]}


class LoggingTrainer(GRPOTrainer, metaclass=abc.ABCMeta):
    """Logs a number of its own; its metaclass is not `type`."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "own": 1.0}, start_time)


class ReinforceTrainer(GRPOTrainer):
    """A loss of its own that takes advantages of either shape, and no ratio."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].size(1)
        logps, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, length, compute_entropy=True)
        advantages = inputs["advantages"]
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1)
        return -(logps * advantages * inputs["completion_mask"]).sum() / inputs["completion_mask"].sum()


class ColumnTrainer(ReinforceTrainer):
    """A loss of its own that takes advantages as one per completion."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        length = inputs["completion_ids"].size(1)
        logps, *_ = self._get_per_token_logps_and_entropies(
            model, ids, torch.ones_like(ids), length, compute_entropy=True
        )
        advantages = inputs["advantages"]
        return -(logps * self.column(advantages)).mean()

    @staticmethod
    def column(advantages: Tensor) -> Tensor:
        return advantages.unsqueeze(1)


class EarlyTrainer(ReinforceTrainer):
    """A loss of its own that reads the advantages before its forward pass."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        advantages = inputs["advantages"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        length = inputs["completion_ids"].size(1)
        logps, *_ = self._get_per_token_logps_and_entropies(
            model, ids, torch.ones_like(ids), length, compute_entropy=True
        )
        return -(logps * advantages.unsqueeze(1)).mean()


class AloneTrainer(GRPOTrainer):
    """A loss of its own with the model's own forward pass."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return model(inputs["completion_ids"]).logits.mean()


SUBCLASSES = [
    ScaledTrainer,
    BeforeTrainer,
    AuxiliaryTrainer,
    RewardTrainer,
    GenerationTrainer,
    LoggingTrainer,
    ReinforceTrainer,
    ColumnTrainer,
    EarlyTrainer,
    AloneTrainer,
]


def made(make_trainer: Callable[..., Any], base: type, *arguments: Any, **overrides: Any) -> Any:
    """A controlled trainer."""
    cls = entropy_controlled(base)
    return make_trainer(*arguments, trainer_class=cls, config_class=cls.config_class, **overrides)
