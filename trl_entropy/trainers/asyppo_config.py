"""The configuration of AsyPPO."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from .config import EntropyGRPOConfig


@dataclass
class AsyPPOConfig(EntropyGRPOConfig):
    """Configuration of [`AsyPPOTrainer`]: `EntropyGRPOConfig` plus the critics (arXiv 2510.01656).

    `num_critics=1` with both fractions 0 is classic PPO.

    Args:
        num_critics (`int`, *optional*, defaults to `2`):
            Number of critics, at most `num_generations`, so that every critic sees every prompt.
        critic_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Learning rate of the critics' AdamW, constant.
        critic_num_epochs (`int`, *optional*, defaults to `1`):
            Passes of each critic over its share of a rollout.
        critic_per_device_train_batch_size (`int`, *optional*):
            Completions per process in a critic's mini-batch; `per_device_train_batch_size` if not set.
        critic_warmup_rollouts (`int`, *optional*, defaults to `0`):
            Rollouts that train the critics alone before the policy's first step.
        critic_gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Recompute the critics' activations in the backward pass.
        critic_dtype (`str`, *optional*, defaults to `"float32"`):
            Weights of the critics: `"float32"`, or `"bfloat16"` with the optimizer's state in float32.
        gae_gamma (`float`, *optional*, defaults to `1.0`):
            Discount per model-written token, in [0, 1].
        gae_lambda (`float`, *optional*, defaults to `1.0`):
            Lambda of the advantages' GAE, in [0, 1].
        critic_gae_lambda (`float`, *optional*, defaults to `1.0`):
            Lambda of the critics' targets, in [0, 1]; 1 is the Monte-Carlo return of the paper.
        bootstrap_truncated (`bool`, *optional*, defaults to `True`):
            Whether a completion that was cut off at `max_completion_length` ends in the value of its last state
            instead of 0. Its own reward counts on top of that value: where truncated completions are rewarded and the
            policy stops ending them, values grow without bound, so set it to `False` for such a reward.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whether the advantages get mean 0 and standard deviation 1 over the valid tokens of the global batch.
        advantage_mask_fraction (`float`, *optional*, defaults to `0.2`):
            Share of the valid tokens, those with the lowest disagreement of the critics, that get advantage 0, in
            [0, 1).
        entropy_filter_fraction (`float`, *optional*, defaults to `0.2`):
            Share of the valid tokens, those with the highest disagreement, that get no entropy bonus, in [0, 1). It
            acts on whichever bonus is on: `entropy_coef`, `use_adaptive_entropy` or `epo_coef`.

    Raises:
        ValueError: If a value is out of its range, or if two fields contradict each other.
    """

    num_critics: int = field(default=2, metadata={"help": "AsyPPO: number of critics, at most num_generations."})
    critic_learning_rate: float = field(default=1e-5, metadata={"help": "AsyPPO: learning rate of the critics."})
    critic_num_epochs: int = field(default=1, metadata={"help": "AsyPPO: passes of a critic over its share."})
    critic_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "AsyPPO: completions per process in a critic's mini-batch."}
    )
    critic_warmup_rollouts: int = field(
        default=0, metadata={"help": "AsyPPO: rollouts that train the critics alone before the policy's first step."}
    )
    critic_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "AsyPPO: recompute the critics' activations in the backward pass."}
    )
    critic_dtype: str = field(
        default="float32", metadata={"help": "AsyPPO: weights of the critics, float32 or bfloat16."}
    )
    gae_gamma: float = field(default=1.0, metadata={"help": "AsyPPO: discount per model-written token."})
    gae_lambda: float = field(default=1.0, metadata={"help": "AsyPPO: lambda of the advantages' GAE."})
    critic_gae_lambda: float = field(default=1.0, metadata={"help": "AsyPPO: lambda of the critics' targets."})
    bootstrap_truncated: bool = field(
        default=True, metadata={"help": "AsyPPO: truncated completions end in the value of their last state."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "AsyPPO: whiten the advantages over the global batch."}
    )
    advantage_mask_fraction: float = field(
        default=0.2, metadata={"help": "AsyPPO: share of tokens, lowest disagreement first, with advantage 0."}
    )
    entropy_filter_fraction: float = field(
        default=0.2, metadata={"help": "AsyPPO: share of tokens, highest disagreement first, without entropy bonus."}
    )

    @property
    def asyppo_enabled(self) -> bool:
        return True

    @property
    def any_control_enabled(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_critics()
        self._warn_if_nothing_to_filter()
        if self.loss_type == "vespo":
            raise ValueError(
                "loss_type='vespo' weights whole sequences by the sign of one advantage, and AsyPPO's advantages are "
                "per token. Set loss_type to another one, such as 'dapo'."
            )

    def _check_critics(self) -> None:
        if not 1 <= self.num_critics <= self.num_generations:
            raise ValueError(
                f"num_critics={self.num_critics} must be in 1..num_generations={self.num_generations}, so that every "
                "critic sees every prompt."
            )
        for name, least in (("critic_num_epochs", 1), ("critic_warmup_rollouts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        batch_size = self.critic_per_device_train_batch_size
        if batch_size is not None and batch_size < 1:
            raise ValueError(
                f"critic_per_device_train_batch_size={batch_size} must be at least 1, or left out for "
                f"per_device_train_batch_size={self.per_device_train_batch_size}."
            )
        for name in ("gae_gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]. Published: 1.")
        check_ensemble(self)

    def _warn_if_nothing_to_filter(self) -> None:
        if self.entropy_filter_fraction and not (self.entropy_coef or self.use_adaptive_entropy or self.epo_enabled):
            warnings.warn(
                f"entropy_filter_fraction={self.entropy_filter_fraction} does nothing: there is no entropy bonus to "
                "filter. Set entropy_coef or epo_coef, or entropy_filter_fraction=0.",
                UserWarning,
                stacklevel=4,
            )


def check_ensemble(config: Any) -> None:
    """Refuse what no ensemble of critics can do; for every configuration with these fields.

    Args:
        config: Has `num_critics`, `critic_learning_rate`, `critic_dtype`, `critic_gae_lambda` and the two fractions.

    Raises:
        ValueError: If a value is out of its range; the message names the field, its value and what to set.
    """
    if not 0.0 < config.critic_learning_rate < math.inf:
        raise ValueError(f"critic_learning_rate={config.critic_learning_rate} must be above 0. Default: 1e-5.")
    if config.critic_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"critic_dtype={config.critic_dtype!r} is unknown. Choose float32 or bfloat16.")
    if not 0.0 <= config.critic_gae_lambda <= 1.0:
        raise ValueError(f"critic_gae_lambda={config.critic_gae_lambda} must be in [0, 1]. Published: 1.")
    for name in ("advantage_mask_fraction", "entropy_filter_fraction"):
        fraction = getattr(config, name)
        if not 0.0 <= fraction < 1.0:
            raise ValueError(f"{name}={fraction} must be in [0, 1). Published: 0.2; 0 is off.")
        if fraction and config.num_critics == 1:
            raise ValueError(
                f"{name}={fraction} needs the disagreement of at least two critics, and num_critics=1. Set {name}=0 "
                "(with both fractions 0 this is classic PPO), or num_critics=2."
            )
