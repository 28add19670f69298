"""The configuration of the entropy controls."""

import math
import warnings
from dataclasses import dataclass, field

from trl import GRPOConfig, GRPOTrainer

from ..controls import ENTROPY_FLOOR

PPO_CLIP_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""TRL's loss types that clip the importance ratio as PPO does."""
ERC_LOSSES = (*PPO_CLIP_LOSSES, "cispo", "sapo")
"""TRL's loss types that are linear in each token's advantage, so that a token can be left out of them."""

EPO_CHOICES = {
    "epo_schedule": ("decay", "grow", "constant"),
    "epo_form": ("hinge", "indicator"),
    "epo_history": ("scalar", "per_turn"),
}


@dataclass
class EntropyControls:
    """The fields of the controls that every loss with a PPO clip takes, and their checks; all off by default.

    Args:
        erc_low (`float`, *optional*):
            ERC (arXiv 2512.05591): a token keeps its policy gradient only while its entropy ratio
            `(H + 1e-8) / (H_old + 1e-8)` is above this bound, in [0, 1). Set with `erc_high`. Published: 0.95.
        erc_high (`float`, *optional*):
            ERC: and only while the ratio is below this bound, above 1. Published: 1.05.
        erc_entropy_floor (`float`, *optional*, defaults to `1e-8`):
            ERC: what is added to both entropies of the ratio, nats, at least 0. Published: 1e-8. A larger one lets
            tokens of less entropy than that change freely, whose ratio is mostly rounding in bfloat16.
        ce_gppo_alpha1 (`float`, *optional*):
            CE-GPPO (arXiv 2509.20712): share of the gradient given back to tokens clipped below the trust region
            (`A < 0`, `r < 1 - epsilon`), at least 0. Set together with `ce_gppo_alpha2`. Published: 0.75 (7B), 0.5
            (1.5B); 1 with `ce_gppo_alpha2=1` is GPPO (arXiv 2508.07629).
        ce_gppo_alpha2 (`float`, *optional*):
            CE-GPPO: share given back to tokens clipped above the trust region (`A > 0`, `r > 1 + epsilon_high`), at
            least 0. Published: 1.
        epo_coef (`float`, *optional*, defaults to `0.0`):
            EPO (arXiv 2509.22576): weight lambda of the smoothed entropy term, at least 0; 0 is off. Published: 0.001.
        epo_kappa_low (`float`, *optional*, defaults to `0.8`):
            EPO: lower edge of the entropy corridor as a multiple of the mean entropy of the earlier RL steps.
            Published with `epo_kappa_high`: (0, 2), (0.8, 1.2), (0.5, 1.5).
        epo_kappa_high (`float`, *optional*, defaults to `1.2`):
            EPO: upper edge, above `epo_kappa_low`.
        epo_penalty (`float`, *optional*, defaults to `0.1`):
            EPO: weight alpha of the penalty outside the corridor, at least 0; the paper keeps it below 0.5. Published:
            0.05 (ScienceWorld), 0.1 (ALFWorld).
        epo_gamma (`float`, *optional*, defaults to `3.0`):
            EPO: rate of the schedule of the smoothing weight beta, at least 0.
        epo_schedule (`str`, *optional*, defaults to `"decay"`):
            EPO: `"decay"` takes beta from 2 towards 1 (the paper), `"grow"` from 1 towards 2, `"constant"` keeps it 1.
        epo_form (`str`, *optional*, defaults to `"hinge"`):
            EPO: penalty outside the corridor, `"hinge"` (distance, v2 of the paper) or `"indicator"` (0 or 1, v1 and
            the released code). The indicator's gradient is exactly zero: it is only reported.
        epo_history (`str`, *optional*, defaults to `"scalar"`):
            EPO: `"scalar"` for one history of all tokens (the paper), `"per_turn"` for one per turn index (the
            released code).

    Raises:
        ValueError: From `check_controls`, if a value is out of its range; the message names the field, its value and
            what to set.
    """

    erc_low: float | None = field(
        default=None, metadata={"help": "ERC: lower bound of the entropy ratio, in [0, 1). Published: 0.95."}
    )
    erc_high: float | None = field(
        default=None, metadata={"help": "ERC: upper bound of the entropy ratio, above 1. Published: 1.05."}
    )
    erc_entropy_floor: float = field(
        default=ENTROPY_FLOOR,
        metadata={"help": "ERC: added to both entropies of the ratio, nats. Published: 1e-8."},
    )
    ce_gppo_alpha1: float | None = field(
        default=None,
        metadata={"help": "CE-GPPO: share of the gradient given back below the trust region. Published: 0.75 or 0.5."},
    )
    ce_gppo_alpha2: float | None = field(
        default=None,
        metadata={"help": "CE-GPPO: share of the gradient given back above the trust region. Published: 1."},
    )
    epo_coef: float = field(
        default=0.0, metadata={"help": "EPO: weight lambda of the smoothed entropy term; 0 is off. Published: 0.001."}
    )
    epo_kappa_low: float = field(
        default=0.8, metadata={"help": "EPO: lower edge of the corridor, as a multiple of the mean past entropy."}
    )
    epo_kappa_high: float = field(
        default=1.2, metadata={"help": "EPO: upper edge of the corridor, as a multiple of the mean past entropy."}
    )
    epo_penalty: float = field(
        default=0.1, metadata={"help": "EPO: weight alpha of the penalty outside the corridor."}
    )
    epo_gamma: float = field(default=3.0, metadata={"help": "EPO: rate of the schedule of the smoothing weight."})
    epo_schedule: str = field(
        default="decay", metadata={"help": "EPO: schedule of the smoothing weight: decay, grow or constant."}
    )
    epo_form: str = field(
        default="hinge", metadata={"help": "EPO: penalty outside the corridor: hinge, or indicator (no gradient)."}
    )
    epo_history: str = field(
        default="scalar",
        metadata={"help": "EPO: one history of all tokens (scalar), or one per turn index (per_turn)."},
    )

    @property
    def erc_enabled(self) -> bool:
        return self.erc_low is not None

    @property
    def ce_gppo_enabled(self) -> bool:
        return self.ce_gppo_alpha1 is not None

    @property
    def epo_enabled(self) -> bool:
        return self.epo_coef != 0.0

    @property
    def ratio_controls(self) -> str:
        """The controls that are on and compare the new policy with the old one, in words; empty for none."""
        return " and ".join(name for name, on in (("ERC", self.erc_enabled), ("CE-GPPO", self.ce_gppo_enabled)) if on)

    @property
    def erc_bounds(self) -> tuple[float, float] | None:
        """`(low, high)`, or `None` where ERC is off."""
        low, high = self.erc_low, self.erc_high
        return None if low is None or high is None else (low, high)

    @property
    def ce_gppo_alphas(self) -> tuple[float, float] | None:
        """`(alpha1, alpha2)`, or `None` where CE-GPPO is off."""
        alpha1, alpha2 = self.ce_gppo_alpha1, self.ce_gppo_alpha2
        return None if alpha1 is None or alpha2 is None else (alpha1, alpha2)

    def check_controls(self) -> None:
        self._check_erc()
        self._check_ce_gppo()
        self._check_epo()

    def _check_erc(self) -> None:
        low, high = self.erc_low, self.erc_high
        self._check_not_negative("erc_entropy_floor", "1e-8")
        if low is None and high is None:
            return
        if low is None or high is None:
            raise ValueError(f"erc_low={low} and erc_high={high}: set both (published: 0.95 and 1.05) or neither.")
        if not 0.0 <= low < 1.0:
            raise ValueError(f"erc_low={low} must be in [0, 1): an entropy ratio of 1 is no change. Published: 0.95.")
        if not high > 1.0:
            raise ValueError(f"erc_high={high} must be above 1: an entropy ratio of 1 is no change. Published: 1.05.")

    def _check_ce_gppo(self) -> None:
        alpha1, alpha2 = self.ce_gppo_alpha1, self.ce_gppo_alpha2
        if alpha1 is None and alpha2 is None:
            return
        if alpha1 is None or alpha2 is None:
            raise ValueError(
                f"ce_gppo_alpha1={alpha1} and ce_gppo_alpha2={alpha2}: set both (published: 0.75 and 1) or neither."
            )
        for name, alpha in (("ce_gppo_alpha1", alpha1), ("ce_gppo_alpha2", alpha2)):
            if not (alpha >= 0.0 and math.isfinite(alpha)):
                raise ValueError(f"{name}={alpha} must be finite and at least 0; published values are in [0, 1].")

    def _check_epo(self) -> None:
        published = {"epo_coef": "0.001; 0 is off", "epo_penalty": "0.05 and 0.1", "epo_gamma": "3"}
        for name, values in published.items():
            self._check_not_negative(name, values)
        low, high = self.epo_kappa_low, self.epo_kappa_high
        if not 0.0 <= low < high:
            raise ValueError(
                f"epo_kappa_low={low} and epo_kappa_high={high} must satisfy 0 <= epo_kappa_low < epo_kappa_high. "
                "Published: (0, 2), (0.8, 1.2) and (0.5, 1.5)."
            )
        for name, choices in EPO_CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Choose one of {', '.join(choices)}.")

    def _check_not_negative(self, name: str, published: str) -> None:
        value = getattr(self, name)
        if not (value >= 0.0 and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be finite and at least 0. Published: {published}.")


@dataclass
class EntropyGRPOConfig(EntropyControls, GRPOConfig):
    """Configuration of [`EntropyGRPOTrainer`]: `trl.GRPOConfig` plus the entropy controls, all off by default.

    Args:
        erc_*, ce_gppo_alpha1, ce_gppo_alpha2, epo_* (*optional*):
            See [`EntropyControls`].
        positive_nll_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the token-mean negative log-likelihood of the correct completions that is added to the loss
            (arXiv 2508.07629), at least 0. The released recipes of ERC and CE-GPPO all use 0.1.
        positive_nll_min_reward (`float`, *optional*, defaults to `1.0`):
            A completion is correct when its total reward, weighted by `reward_weights`, is at least this.
        record_tokens (`int`, *optional*, defaults to `0`):
            Tokens of every optimizer step that each process records into `tokens/` of `output_dir`, with what the
            controls did to them; 0 is off. `trl-entropy report` draws them. 256 is a good number.

    Raises:
        ValueError: If a value is out of its range, or if two fields contradict each other; the message names the
            fields, their values and what to set.
    """

    positive_nll_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the negative log-likelihood of the correct completions. Published: 0.1."},
    )
    positive_nll_min_reward: float = field(
        default=1.0, metadata={"help": "A completion is correct when its weighted total reward is at least this."}
    )
    record_tokens: int = field(
        default=0,
        metadata={"help": "Tokens of every optimizer step that each process records for the report; 0 is off."},
    )

    @property
    def positive_nll_enabled(self) -> bool:
        return self.positive_nll_coef != 0.0

    @property
    def any_control_enabled(self) -> bool:
        return self.erc_enabled or self.ce_gppo_enabled or self.epo_enabled or self.positive_nll_enabled

    @property
    def recording_enabled(self) -> bool:
        return self.record_tokens > 0

    @property
    def eps_high(self) -> float:
        """Upper half-width of the clip range: `epsilon_high`, or `epsilon` where that is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def loss_is_hidden(self) -> bool:
        """Whether `use_liger_kernel` takes the loss to where no control reaches it: TRL below 1.14 has such a loss."""
        return self.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_controls()
        self._check_positive_nll()
        self._check_recording()
        if self.any_control_enabled and self.loss_is_hidden:
            raise ValueError(
                "use_liger_kernel=True computes the loss inside a fused kernel that no entropy control can reach, on "
                "TRL 1.12 and 1.13. Set use_liger_kernel=False, or install TRL 1.14 or newer."
            )
        self._warn_if_on_policy()

    def _check_erc(self) -> None:
        super()._check_erc()
        if self.erc_enabled and self.loss_type not in ERC_LOSSES:
            raise ValueError(
                f"erc_low={self.erc_low}, erc_high={self.erc_high} cannot be used with loss_type={self.loss_type!r}, "
                f"whose weights couple the tokens of a sequence. Set loss_type to one of {', '.join(ERC_LOSSES)}."
            )
        shared_ratio = self.importance_sampling_level == "sequence" and self.loss_type != "cispo"
        if self.erc_enabled and shared_ratio and self.beta != 0.0 and self.use_bias_correction_kl:
            raise ValueError(
                f"beta={self.beta} with use_bias_correction_kl=True multiplies the KL term by the importance ratio of "
                "the sequence, in which ERC makes constants of the tokens it clips. Set use_bias_correction_kl=False, "
                "or beta=0."
            )

    def _check_ce_gppo(self) -> None:
        super()._check_ce_gppo()
        if not self.ce_gppo_enabled:
            return
        if self.loss_type not in PPO_CLIP_LOSSES:
            raise ValueError(
                f"ce_gppo_alpha1={self.ce_gppo_alpha1}, ce_gppo_alpha2={self.ce_gppo_alpha2} cannot be used with "
                f"loss_type={self.loss_type!r}, which has no PPO clip to give gradients back from. Set loss_type to "
                f"one of {', '.join(PPO_CLIP_LOSSES)}."
            )
        if self.delta is not None and self.delta <= 1.0 + self.eps_high:
            raise ValueError(
                f"delta={self.delta} must be above 1 + epsilon_high = {1.0 + self.eps_high} with CE-GPPO: a smaller "
                "dual clip drops tokens inside the trust region. Published: 10."
            )
        if self.beta != 0.0 and self.use_bias_correction_kl:
            raise ValueError(
                f"beta={self.beta} with use_bias_correction_kl=True multiplies the KL term by the importance ratio, "
                "which CE-GPPO sets to 1 for clipped tokens. Set use_bias_correction_kl=False, or beta=0."
            )

    def _check_positive_nll(self) -> None:
        self._check_not_negative("positive_nll_coef", "0.1; 0 is off")
        if math.isnan(self.positive_nll_min_reward):
            raise ValueError(
                f"positive_nll_min_reward={self.positive_nll_min_reward} must be a number: the total reward from "
                "which on a completion counts as correct."
            )

    def _check_recording(self) -> None:
        if self.record_tokens < 0:
            raise ValueError(f"record_tokens={self.record_tokens} must be at least 0; 0 is off, 256 a good number.")
        if self.recording_enabled and self.loss_is_hidden:
            raise ValueError(
                f"record_tokens={self.record_tokens} with use_liger_kernel=True: on TRL 1.12 and 1.13 the loss is "
                "computed inside a fused kernel, where there are no tokens to record. Set use_liger_kernel=False, or "
                "record_tokens=0, or install TRL 1.14 or newer."
            )

    def _warn_if_on_policy(self) -> None:
        updates = self.steps_per_generation * self.num_iterations
        if self.ratio_controls and self.gradient_accumulation_steps % updates == 0:
            methods = self.ratio_controls
            warnings.warn(
                f"{methods} will do nothing: with steps_per_generation={self.steps_per_generation}, num_iterations="
                f"{self.num_iterations} and gradient_accumulation_steps={self.gradient_accumulation_steps}, every "
                "rollout is used for one optimizer step, so importance and entropy ratios are 1. Set "
                f"steps_per_generation={8 * self.gradient_accumulation_steps} for the 8 optimizer steps per rollout "
                "of the papers, or num_iterations above 1.",
                UserWarning,
                stacklevel=4,
            )
