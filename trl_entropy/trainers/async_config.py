"""The configuration of asynchronous GRPO with entropy control."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..controls import Control, controls_of
from ..controls.ce_gppo_loop import CEGPPOLoopFields
from ..controls.clip_cov import ClipCovFields
from ..controls.dppo import DPPOFields
from ..controls.entropic import EntroPICFields
from ..controls.entropy_advantage import EntropyAdvantageFields
from ..controls.fipo import FIPOFields
from ..controls.kl_cov import KLCovFields
from ..controls.par import PARFields
from ..controls.positive_nll import PositiveNLLFields
from ..controls.qae import QAEFields
from ..controls.stare import STAREFields
from ..controls.steer import STEERFields
from ..controls.target_entropy import TargetEntropyFields
from .async_contact import AsyncGRPOConfig
from .async_controls import REFUSED
from .config import EntropyControls


@dataclass
class EntropyAsyncGRPOConfig(
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
    AsyncGRPOConfig,
):
    """Configuration of [`EntropyAsyncGRPOTrainer`]: `AsyncGRPOConfig` plus the entropy controls, all off by default.

    Each control's fields are described in its module of `trl_entropy.controls`; `trl-entropy methods` lists them.

    Args:
        record_tokens (`int`, *optional*, defaults to `0`):
            Tokens of every optimizer step that each process records into `tokens/` of `output_dir`, with what the
            controls did to them; 0 is off. `trl-entropy report` draws them. 256 is a good number.

    Raises:
        ValueError: If a value is out of its range, if two fields contradict each other, or for a control that
            asynchronous training does not have (`REFUSED`); the message names the fields, their values and the reason.
    """

    loss_type: ClassVar[str] = "bnpo"
    """What TRL's asynchronous loss is under the names of `GRPOConfig`: the mean over the tokens of a batch."""
    importance_sampling_level: ClassVar[str] = "token"
    delta: ClassVar[None] = None
    beta: ClassVar[float] = 0.0

    record_tokens: int = field(
        default=0,
        metadata={"help": "Tokens of every optimizer step that each process records for the report; 0 is off."},
    )

    @property
    def any_control_enabled(self) -> bool:
        return bool(controls_of(self))

    @property
    def recording_enabled(self) -> bool:
        return self.record_tokens > 0

    @property
    def eps_high(self) -> float:
        """Upper half-width of the clip range: `epsilon_high`, or `epsilon` where that is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def __post_init__(self) -> None:
        super().__post_init__()
        for control in controls_of(self):
            if control.prefix in REFUSED:
                raise ValueError(
                    f"{self.settings_text(control)} cannot be used in asynchronous training: "
                    f"{REFUSED[control.prefix]}. Leave it out, or train with EntropyGRPOTrainer."
                )
        self.check_controls()
        for control in controls_of(self):
            self._check_schedule(control)
        if self.record_tokens < 0:
            raise ValueError(f"record_tokens={self.record_tokens} must be at least 0; 0 is off, 256 a good number.")

    def _check_schedule(self, control: Control) -> None:
        """Refuse a schedule over the training where only the number of prompts says how long that is."""
        schedule: Any = getattr(self, f"{control.prefix}_schedule", "constant")
        if self.max_steps <= 0 and schedule not in ("constant", "entropy"):
            raise ValueError(
                f"{self.settings_text(control)} follows {control.prefix}_schedule={schedule!r} over the training, and "
                f"asynchronous training knows how many steps that has by max_steps alone, which is {self.max_steps}. "
                "Set max_steps."
            )
