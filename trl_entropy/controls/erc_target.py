"""Bounds of ERC that move towards a share of clipped tokens; a loop of this package, in no paper."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .tokens import TokenMean

TARGET_GAIN = 2.0
"""What the power of the bounds is multiplied with, as the exponent of e, per share of tokens clipped too many. With
0.6 clipped instead of 0.2 the bounds become 2.2 times as wide, with none 0.67 times."""
MAX_LOG_BOUND = 80.0
"""Its `exp` fits float32."""
MAX_LOG_POWER = 7.0
"""Bounds 1,100 times as wide or narrow as they began: beyond any working run's."""


def check_target(target: float | None, low: float | None, high: float | None) -> None:
    """Refuse a share of clipped tokens that the bounds cannot be moved for."""
    if target is None:
        return
    if not 0.0 < target < 1.0:
        raise ValueError(f"erc_target_fraction={target} must be in (0, 1). ERC's paper clips about 0.2.")
    if low is None or high is None:
        raise ValueError(
            f"erc_target_fraction={target} moves erc_low and erc_high, which are not set. Set where they begin, such "
            "as 0.95 and 1.05."
        )
    if low == 0.0:
        raise ValueError(
            f"erc_low=0 cannot be moved by erc_target_fraction={target}: it is no bound. Set it to 0.95, where the "
            "paper has it."
        )


class BoundPower:
    """The power that both bounds are raised to, moved towards a share of clipped tokens; 1 leaves them as they are."""

    def __init__(self) -> None:
        self.log_power = 0.0
        self._running: Tensor | None = None

    def add(self, clipped: TokenMean) -> None:
        """Count the tokens of one micro-batch; without a synchronisation with the device."""
        totals = clipped.totals()
        self._running = totals if self._running is None else self._running + totals

    def finish_rollout(self, target: float, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move the power by the share clipped since the last call; `reduce` sums a tensor over the processes."""
        if self._running is None:
            return
        clipped, tokens = reduce(self._running).tolist()
        self._running = None
        if tokens > 0:
            moved = self.log_power + TARGET_GAIN * (clipped / tokens - target)
            self.log_power = min(max(moved, -MAX_LOG_POWER), MAX_LOG_POWER)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the running counts are this process's own."""
        return {"log_power": self.log_power, "running": self._running}

    def load_state_dict(self, state: dict[str, Any], *, own: bool = True) -> None:
        """Continue from `state_dict()`."""
        self.log_power, self._running = state["log_power"], state["running"] if own else None


def bounds_now(settings: Any, state: BoundPower | None) -> tuple[float, float]:
    """The bounds of the entropy ratio: those of the configuration, raised to the state's power."""
    power = 1.0 if state is None else math.exp(state.log_power)
    return settings.erc_low**power, math.exp(min(power * math.log(settings.erc_high), MAX_LOG_BOUND))
