"""The configuration of asynchronous GRPO with entropy control."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..controls import Control, controls_of
from .async_contact import AsyncGRPOConfig
from .async_controls import REFUSED
from .config import GroupControls


@dataclass
class EntropyAsyncGRPOConfig(GroupControls, AsyncGRPOConfig):
    """Configuration of [`EntropyAsyncGRPOTrainer`]: `AsyncGRPOConfig` plus the entropy controls, all off by default.

    [`GroupControls`] has the fields.

    Raises:
        ValueError: If a value is out of its range, if two fields contradict each other, or for a control that
            asynchronous training does not have (`REFUSED`); the message names the fields, their values and the reason.
    """

    loss_type: ClassVar[str] = "bnpo"
    """What TRL's asynchronous loss is under the names of `GRPOConfig`: the mean over the tokens of a batch."""
    importance_sampling_level: ClassVar[str] = "token"
    delta: ClassVar[None] = None
    beta: ClassVar[float] = 0.0

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

    def _check_schedule(self, control: Control) -> None:
        """Refuse a schedule over the training where only the number of prompts says how long that is."""
        schedule: Any = getattr(self, f"{control.prefix}_schedule", "constant")
        if self.max_steps <= 0 and schedule not in ("constant", "entropy"):
            raise ValueError(
                f"{self.settings_text(control)} follows {control.prefix}_schedule={schedule!r} over the training, and "
                f"asynchronous training knows how many steps that has by max_steps alone, which is {self.max_steps}. "
                "Set max_steps."
            )
