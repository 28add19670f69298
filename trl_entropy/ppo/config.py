"""The configuration of PPO with entropy control on TRL's PPOTrainer."""

import warnings
from dataclasses import dataclass, field, fields

from trl.experimental.ppo import PPOConfig

from ..trainers.asyppo_config import check_ensemble
from ..trainers.config import EntropyControls


@dataclass
class PPOControls(EntropyControls):
    """The fields that [`EntropyPPOConfig`] adds to TRL's; built without arguments, everything is off.

    Args:
        erc_*, ce_gppo_alpha1, ce_gppo_alpha2, epo_* (*optional*):
            See [`EntropyControls`]. CE-GPPO's clip range is `1 -+ cliprange`; EPO's RL step is one rollout, and its
            means are over the completions of a micro-batch.
        entropy_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the mean token entropy that is subtracted from the loss, at least 0.
        num_critics (`int`, *optional*, defaults to `2`):
            AsyPPO (arXiv 2510.01656): number of critics. This and the fields below act only where the trainer gets
            `critics` instead of `value_model`.
        critic_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Learning rate of the critics' AdamW, constant.
        critic_num_epochs (`int`, *optional*, defaults to `1`):
            Passes of each critic over its share of a rollout.
        critic_per_device_train_batch_size (`int`, *optional*):
            Completions per process in a critic's mini-batch; `per_device_train_batch_size` if not set.
        critic_gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Recompute the critics' activations in the backward pass.
        critic_dtype (`str`, *optional*, defaults to `"float32"`):
            Weights of the critics: `"float32"`, or `"bfloat16"` with the optimizer's state in float32.
        critic_gae_lambda (`float`, *optional*, defaults to `1.0`):
            Lambda of the critics' targets, in [0, 1]; 1 is the Monte-Carlo return of the paper. That of the
            advantages is TRL's `lam`.
        advantage_mask_fraction (`float`, *optional*, defaults to `0.2`):
            Share of the response tokens, those with the lowest disagreement of the critics, that get advantage 0, in
            [0, 1).
        entropy_filter_fraction (`float`, *optional*, defaults to `0.2`):
            Share of the response tokens, those with the highest disagreement, that get no entropy bonus, in [0, 1).
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
    num_critics: int = field(default=2, metadata={"help": "AsyPPO: number of critics."})
    critic_learning_rate: float = field(default=1e-5, metadata={"help": "AsyPPO: learning rate of the critics."})
    critic_num_epochs: int = field(default=1, metadata={"help": "AsyPPO: passes of a critic over its share."})
    critic_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "AsyPPO: completions per process in a critic's mini-batch."}
    )
    critic_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "AsyPPO: recompute the critics' activations in the backward pass."}
    )
    critic_dtype: str = field(
        default="float32", metadata={"help": "AsyPPO: weights of the critics, float32 or bfloat16."}
    )
    critic_gae_lambda: float = field(default=1.0, metadata={"help": "AsyPPO: lambda of the critics' targets."})
    advantage_mask_fraction: float = field(
        default=0.2, metadata={"help": "AsyPPO: share of tokens, lowest disagreement first, with advantage 0."}
    )
    entropy_filter_fraction: float = field(
        default=0.2, metadata={"help": "AsyPPO: share of tokens, highest disagreement first, without entropy bonus."}
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
    def any_control_enabled(self) -> bool:
        return self.erc_enabled or self.ce_gppo_enabled or self.epo_enabled or self.entropy_bonus_enabled

    def check_controls(self) -> None:
        super().check_controls()
        self._check_not_negative("entropy_coef", "0.001 to 0.01; 0 is off")
        self._check_critics()

    def _check_critics(self) -> None:
        for name in ("num_critics", "critic_num_epochs", "critic_per_device_train_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        check_ensemble(self)


CRITIC_FIELDS = {
    field.name
    for field in fields(PPOControls)
    if field.name.startswith(("critic_", "num_critics", "advantage_mask_", "entropy_filter_"))
}
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
