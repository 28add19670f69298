"""The configuration of AsyPPO."""

from dataclasses import dataclass, field

from ..controls.asyppo import CriticFields
from .config import EntropyGRPOConfig
from .critics import warn_if_nothing_to_filter


@dataclass
class AsyPPOConfig(CriticFields, EntropyGRPOConfig):
    """Configuration of [`AsyPPOTrainer`]: `EntropyGRPOConfig` plus the critics (arXiv 2510.01656).

    `num_critics=1` with both fractions 0 is classic PPO.

    Args:
        num_critics, critic_*, advantage_mask_fraction, entropy_filter_fraction (*optional*):
            See `trl_entropy.controls.asyppo.CriticFields`. At most `num_generations` critics, so that every critic
            sees every prompt.
        critic_warmup_rollouts (`int`, *optional*, defaults to `0`):
            Rollouts that train the critics alone before the policy's first step.
        gae_gamma (`float`, *optional*, defaults to `1.0`):
            Discount per model-written token, in [0, 1].
        gae_lambda (`float`, *optional*, defaults to `1.0`):
            Lambda of the advantages' GAE, in [0, 1].
        bootstrap_truncated (`bool`, *optional*, defaults to `False`):
            Whether a completion that was cut off at `max_completion_length` ends in the value of its last state
            instead of 0, as if more would follow. Ours: the paper has returns as they are. Its own reward counts on
            top of that value: where truncated completions are rewarded and the policy stops ending them, values grow
            without bound.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whether the advantages get mean 0 and standard deviation 1 over the valid tokens of the global batch.

    Raises:
        ValueError: If a value is out of its range, or if two fields contradict each other.
    """

    critic_warmup_rollouts: int = field(
        default=0, metadata={"help": "AsyPPO: rollouts that train the critics alone before the policy's first step."}
    )
    gae_gamma: float = field(default=1.0, metadata={"help": "AsyPPO: discount per model-written token."})
    gae_lambda: float = field(default=1.0, metadata={"help": "AsyPPO: lambda of the advantages' GAE."})
    bootstrap_truncated: bool = field(
        default=False, metadata={"help": "AsyPPO: truncated completions end in the value of their last state."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "AsyPPO: whiten the advantages over the global batch."}
    )

    @property
    def asyppo_enabled(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_critics()
        has_bonus = bool(self.entropy_coef or self.use_adaptive_entropy or self.epo_enabled)
        warn_if_nothing_to_filter(self, has_bonus, stacklevel=3)

    def _check_critics(self) -> None:
        if self.critic_warmup_rollouts < 0:
            raise ValueError(f"critic_warmup_rollouts={self.critic_warmup_rollouts} must be at least 0.")
        for name in ("gae_gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]. Default: 1.")
