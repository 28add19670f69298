"""REINFORCE leave-one-out with the entropy controls that its loss has a place for."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import trl
from packaging.version import Version
from torch import Tensor
from trl import RLOOConfig, RLOOTrainer

from ..controls import MicroBatch, bounded_old_logps
from ..controls.epo import EPOFields
from ..controls.positive_nll import PositiveNLLFields
from ..controls.qae import QAEFields
from .config import ControlChecks
from .contact_table import OF_GRPO_ALONE
from .grpo import EntropyControlMixin
from .loss_call import LossCall
from .rollout_contact import RolloutForward
from .token_level import TokenValues

if TYPE_CHECKING:
    from trl import RLOOConfig as Config
else:
    Config = object

ENTROPIES_WITH_GRADIENTS = "1.15"
"""From this release of TRL on the entropies of `RLOOTrainer` carry their graph."""


@dataclass
class RLOOControls(QAEFields, EPOFields, PositiveNLLFields, ControlChecks):
    """The fields of the controls that RLOO has a place for: advantages of completions, and what is added to the loss.

    RLOO's ratio is that of a whole completion, the product of its tokens' ratios, and its loss has one advantage per
    completion, so there are no tokens for the other controls to keep, drop or weigh.

    Raises:
        ValueError: If a value is out of its range, or with EPO on a TRL whose RLOO has entropies without a graph.
    """

    def __post_init__(self, *init_vars: Any) -> None:
        super().__post_init__(*init_vars)  # type: ignore[misc]
        self.check_controls()
        if self.epo_enabled and Version(trl.__version__) < Version(ENTROPIES_WITH_GRADIENTS):
            raise ValueError(
                f"epo_coef={self.epo_coef} needs the gradients of entropies, which RLOOTrainer of TRL "
                f"{trl.__version__} does not keep. Install TRL {ENTROPIES_WITH_GRADIENTS} or newer, or set epo_coef=0."
            )


@dataclass
class EntropyRLOOConfig(RLOOControls, RLOOConfig):
    """Configuration of [`EntropyRLOOTrainer`]: `trl.RLOOConfig` plus QAE, EPO and positive NLL, all off by default."""


class RLOOLoss(RLOOTrainer):
    """After a subclass of `trl.RLOOTrainer`: shows the contact TRL's calls of the loss and the functions."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return super()._compute_loss(model, self.reach_loss(inputs))

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        with self.watched_functions(inputs):
            return super()._calculate_rewards(inputs, *args, **kwargs)


class RLOOControlMixin(EntropyControlMixin):
    """`EntropyControlMixin` for `trl.RLOOTrainer` and its subclasses, with the controls of [`RLOOControls`].

    QAE takes its quantile of RLOO's advantages, which are `n / (n - 1)` times the rewards less their mean, so the
    factor stays. Where `normalize_advantages` is on, it comes first, as everything of TRL's.
    """

    base_class: ClassVar[type] = RLOOTrainer
    importance_sampling_level = "sequence"
    loss_type = "rloo"
    _entropy_bonus_enabled = False

    @classmethod
    def checked(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if name not in OF_GRPO_ALONE)

    def set_token_level(self, output: dict[str, Any], found: list[TokenValues], completion_ids: list[Any]) -> None:
        raise ValueError(
            f"{found[0].name} of {found[0].source}: RLOO's loss takes one advantage per completion. Use GRPO, or "
            "return rewards alone."
        )

    def _forward_of(self, output: dict[str, Any], forwards: list[RolloutForward]) -> RolloutForward | None:
        """The forward pass whose log-probs, summed over each completion, are the rollout's `old_logps`."""
        mask = output["completion_mask"]
        for forward in forwards:
            if torch.equal((forward.logps * mask).sum(1), output["old_logps"]):
                return forward
        raise RuntimeError(
            f"{self._who_rolls_out()} does not take `old_logps` from `_get_per_token_logps_and_entropies` as it is, "
            f"so the rollout's entropies are unknown. {self._remedy()}"
        )

    def _micro_batch(self, call: LossCall) -> MicroBatch:
        return replace(super()._micro_batch(call), old_entropies=call.inputs.get("old_entropies"))

    @torch.no_grad()
    def _bound_importance_ratio(self, call: LossCall) -> None:
        logps, old_logps = call.logps.detach(), call.inputs.get("old_logps")
        if old_logps is not None:
            log_weight = (logps * call.inputs["completion_mask"]).sum(1) - old_logps
            call.inputs["old_logps"] = bounded_old_logps(old_logps.unsqueeze(1), log_weight.unsqueeze(1)).squeeze(1)

    def added_loss(self, call: LossCall) -> Tensor | None:
        added = super().added_loss(call)
        if added is None or self.mode == "eval":
            return added
        # transformers divides RLOO's loss by the micro-batches of an optimizer step
        return added * self.current_gradient_accumulation_steps


class EntropyRLOOTrainer(RLOOControlMixin, RLOOLoss):
    """`trl.RLOOTrainer` with the entropy controls of [`EntropyRLOOConfig`]; same arguments, methods and files."""

    _tag_names: ClassVar[list[str]] = ["trl", "rloo", "trl-entropy"]
    config_class: ClassVar[type] = EntropyRLOOConfig
