"""The configuration of PPO with entropy control on TRL's PPOTrainer."""

import warnings
from dataclasses import dataclass, field, fields

from trl.experimental.ppo import PPOConfig

from ..controls import controls_of
from ..controls.asyppo import CriticFields
from ..controls.checks import check_not_negative
from ..trainers.config import EntropyControls


@dataclass
class PPOControls(CriticFields, EntropyControls):
    """The fields that [`EntropyPPOConfig`] adds to TRL's; built without arguments, everything is off.

    Args:
        erc_*, ce_gppo_*, epo_* (*optional*):
            See [`EntropyControls`]. CE-GPPO's clip range is `1 -+ cliprange`; EPO's RL step is one rollout, and its
            means are over the completions of a micro-batch.
        entropy_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the mean token entropy that is subtracted from the loss, at least 0.
        num_critics, critic_*, advantage_mask_fraction, entropy_filter_fraction (*optional*):
            See `trl_entropy.controls.asyppo.CriticFields`. They act only where the trainer gets `critics` instead of
            `value_model`; the lambda of the advantages is TRL's `lam`.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Sample the responses by vLLM in the trainer's process. The rollout's log-probs and entropies then come from
            a forward pass of the policy. Not with DeepSpeed or FSDP.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the device's memory that vLLM takes.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt plus `response_length`; the model's own limit if not set.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Whether vLLM gives its memory back while the policy trains.

    Raises:
        ValueError: From `check_controls`, if a value is out of its range; the message names the field, its value and
            what to set.
    """

    entropy_coef: float = field(
        default=0.0, metadata={"help": "Weight of the mean token entropy subtracted from the loss; 0 is off."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Sample the responses by vLLM in the trainer's process."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the device's memory that vLLM takes."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "vLLM: longest prompt plus response_length."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Whether vLLM gives its memory back while the policy trains."}
    )

    @property
    def entropy_bonus_enabled(self) -> bool:
        return self.entropy_coef != 0.0

    @property
    def asyppo_enabled(self) -> bool:
        return False  # the trainer's argument `critics` says so

    @property
    def any_control_enabled(self) -> bool:
        return bool(controls_of(self)) or self.entropy_bonus_enabled

    def check_controls(self) -> None:
        super().check_controls()
        check_not_negative(self, "entropy_coef", "0.001 to 0.01; 0 is off")


CRITIC_FIELDS = {field.name for field in fields(CriticFields)}
"""The fields that act only on an ensemble of critics."""


@dataclass
class EntropyPPOConfig(PPOControls, PPOConfig):
    """Configuration of [`EntropyPPOTrainer`]: `trl.experimental.ppo.PPOConfig` plus the fields of [`PPOControls`].

    With none of them set, training is bit for bit TRL's.

    Raises:
        ValueError: If a value is out of its range, or if two fields contradict each other; the message names the
            fields, their values and what to set.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_controls()
        if self.ce_gppo_enabled and not 0.0 < self.cliprange < 1.0:
            raise ValueError(
                f"cliprange={self.cliprange} must be in (0, 1) with CE-GPPO, whose weight of a token below the trust "
                "region is 1 - cliprange. Published: 0.2."
            )
        self._warn_if_on_policy()

    def _warn_if_on_policy(self) -> None:
        if self.ratio_controls and self.num_ppo_epochs == 1:
            methods = self.ratio_controls
            warnings.warn(
                f"{methods} will do nothing: with num_ppo_epochs=1 a rollout is used for one optimizer step (TRL's "
                "num_mini_batches does not add any), so importance and entropy ratios are 1. Set num_ppo_epochs=4, "
                "TRL's default, or more.",
                UserWarning,
                stacklevel=4,
            )
