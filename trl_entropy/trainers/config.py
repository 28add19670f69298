"""The configuration of the entropy controls."""

import warnings
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig, GRPOTrainer

from ..controls import CONTROLS, Control, controls_of, ratio_controls
from ..controls.ce_gppo import CEGPPOFields
from ..controls.ce_gppo_loop import CEGPPOLoopFields
from ..controls.clip_cov import ClipCovFields
from ..controls.dppo import DPPOFields
from ..controls.entropic import EntroPICFields
from ..controls.entropy_advantage import EntropyAdvantageFields
from ..controls.epo import EPOFields
from ..controls.erc import ERCFields
from ..controls.fipo import FIPOFields
from ..controls.kl_cov import KLCovFields
from ..controls.par import PARFields
from ..controls.positive_nll import PositiveNLLFields
from ..controls.qae import QAEFields
from ..controls.stare import STAREFields
from ..controls.steer import STEERFields
from ..controls.target_entropy import TargetEntropyFields, serve_target_entropy

if TYPE_CHECKING:
    from trl import GRPOConfig as Config
else:
    Config = object


class ControlChecks:
    """What every configuration with fields of controls has.

    Raises:
        ValueError: From `check_controls`, if a value is out of its range; the message names the field, its value and
            what to set.
    """

    record_tokens = 0

    @property
    def recording_enabled(self) -> bool:
        return self.record_tokens > 0

    @property
    def loss_is_hidden(self) -> bool:
        return False

    @property
    def any_control_enabled(self) -> bool:
        return bool(controls_of(self))

    @property
    def ratio_controls(self) -> str:
        """The controls that are on and act only where the new policy differs from the old one, in words."""
        return ratio_controls(self)

    def check_controls(self) -> None:
        """Refuse what a control cannot work with, and controls that exclude each other."""
        serve_target_entropy(self, CONTROLS)
        for control in CONTROLS:
            if control.known_to(self):
                control.check(self)
        for control in controls_of(self):
            self._check_exclusions(control)
        loops = [control for control in controls_of(self) if control.steers_entropy]
        if len(loops) > 1:
            raise ValueError(
                f"{' and '.join(map(self.settings_text, loops))} would steer the mean entropy at once, each against "
                "the other. Set one of them."
            )

    def _check_exclusions(self, control: Control) -> None:
        for other in controls_of(self):
            reasons = dict(control.excludes)
            if other.prefix in reasons:
                raise ValueError(
                    f"{self.settings_text(control)} cannot be used with {self.settings_text(other)}: "
                    f"{reasons[other.prefix]}. Leave one of the two out."
                )

    def settings_text(self, control: Control) -> str:
        """The fields of a control that are set, with their values; its name where all have their defaults."""
        defaults = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        settings = {name: value for name, value in control.settings_of(self).items() if value != defaults[name]}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items()) or control.name


@dataclass
class EntropyControls(ERCFields, CEGPPOFields, EPOFields, ControlChecks):
    """The fields of the controls that every loss with a PPO clip takes; all off by default."""


@dataclass
class GroupControls(
    EntropyControls,
    QAEFields,
    EntropyAdvantageFields,
    DPPOFields,
    CEGPPOLoopFields,
    PARFields,
    EntroPICFields,
    STAREFields,
    STEERFields,
    FIPOFields,
    ClipCovFields,
    KLCovFields,
    PositiveNLLFields,
    TargetEntropyFields,
    Config,
):
    """The fields of the controls that GRPO takes, synchronous or not; all off by default.

    Each control's fields are described in its module of `trl_entropy.controls`; `trl-entropy methods` lists them.

    Args:
        record_tokens (`int`, *optional*, defaults to `0`):
            Tokens of every optimizer step that each process records into `tokens/` of `output_dir`, with what the
            controls did to them; 0 is off. `trl-entropy report` draws them. 256 is a good number.
    """

    record_tokens: int = field(
        default=0,
        metadata={"help": "Tokens of every optimizer step that each process records for the report; 0 is off."},
    )

    @property
    def eps_high(self) -> float:
        """Upper half-width of the clip range: `epsilon_high`, or `epsilon` where that is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def check_controls(self) -> None:
        super().check_controls()
        if self.record_tokens < 0:
            raise ValueError(f"record_tokens={self.record_tokens} must be at least 0; 0 is off, 256 a good number.")


@dataclass
class GRPOControls(GroupControls):
    """The controls' fields and checks for any configuration of GRPO; all off by default.

    [`GroupControls`] has the fields.

    Raises:
        ValueError: If a value is out of its range, or if two fields contradict each other; the message names the
            fields, their values and what to set.
    """

    @property
    def loss_is_hidden(self) -> bool:
        """Whether `use_liger_kernel` takes the loss to where no control reaches it: TRL below 1.14 has such a loss."""
        return self.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss")

    def __post_init__(self, *init_vars: Any) -> None:
        super().__post_init__(*init_vars)
        self.check_controls()
        for control in controls_of(self):
            self._check_loss(control)
        self._check_recording()
        if self.any_control_enabled and self.loss_is_hidden:
            raise ValueError(
                "use_liger_kernel=True computes the loss inside a fused kernel that no entropy control can reach, on "
                "TRL 1.12 and 1.13. Set use_liger_kernel=False, or install TRL 1.14 or newer."
            )
        self._warn_if_on_policy()

    def _check_loss(self, control: Control) -> None:
        """Refuse a loss that a control cannot act on."""
        settings, level = self.settings_text(control), self.importance_sampling_level
        if control.loss_types is not None and self.loss_type not in control.loss_types:
            raise ValueError(
                f"{settings} cannot be used with loss_type={self.loss_type!r}, {control.loss_reason}. Set loss_type "
                f"to one of {', '.join(control.loss_types)}."
            )
        if level not in control.levels:
            reason = control.level_reason if level in ("token", "sequence") else "which no control knows"
            raise ValueError(
                f"{settings} cannot be used with importance_sampling_level={level!r}, {reason}. Set it to one of "
                f"{', '.join(control.levels)}."
            )
        if control.steers_entropy and getattr(self, "use_adaptive_entropy", False):
            raise ValueError(
                f"{settings} and use_adaptive_entropy=True would steer the mean entropy at once, each against the "
                "other. Set one of them."
            )

    def _check_recording(self) -> None:
        if self.recording_enabled and self.loss_is_hidden:
            raise ValueError(
                f"record_tokens={self.record_tokens} with use_liger_kernel=True: on TRL 1.12 and 1.13 the loss is "
                "computed inside a fused kernel, where there are no tokens to record. Set use_liger_kernel=False, or "
                "record_tokens=0, or install TRL 1.14 or newer."
            )

    def _warn_if_on_policy(self) -> None:
        updates = self.steps_per_generation * self.num_iterations
        methods = " and ".join(control.name for control in controls_of(self) if control.idle_on_policy(self))
        if methods and self.gradient_accumulation_steps % updates == 0:
            warnings.warn(
                f"{methods} will do nothing: with steps_per_generation={self.steps_per_generation}, num_iterations="
                f"{self.num_iterations} and gradient_accumulation_steps={self.gradient_accumulation_steps}, every "
                "rollout is used for one optimizer step, so importance and entropy ratios are 1. Set "
                f"steps_per_generation={8 * self.gradient_accumulation_steps} for the 8 optimizer steps per rollout "
                "of the papers, or num_iterations above 1.",
                UserWarning,
                stacklevel=4,
            )


@dataclass
class EntropyGRPOConfig(GRPOControls, GRPOConfig):
    """Configuration of [`EntropyGRPOTrainer`]: `trl.GRPOConfig` plus the entropy controls, all off by default.

    `GRPOControls` says what its fields are and what it raises.
    """
