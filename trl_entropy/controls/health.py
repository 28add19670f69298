"""Reading a trainer's log: findings, and the trends that rules compare."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

LogHistory = Sequence[dict[str, Any]]

WINDOW = 8
"""Entries per mean: one rollout of the papers' 8 optimizer steps when every step is logged."""
MIN_ENTRIES = 2 * WINDOW
"""Fewer entries of a metric than two windows are no trend."""


@dataclass(frozen=True)
class Finding:
    """One thing that a run shows.

    Attributes:
        rule: Stable name of the rule, such as `entropy_collapse`.
        seen: What the log shows, a sentence with its numbers.
        remedy: Which fields to try, a sentence.
    """

    rule: str
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.seen} {self.remedy}"


Rule = Callable[[LogHistory], Finding | None]


def finite_values(log_history: LogHistory, key: str) -> list[float]:
    """The finite numbers of a metric, in order."""
    values = (entry.get(key) for entry in log_history)
    return [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]


def enough(log_history: LogHistory, key: str) -> list[float]:
    """The finite numbers of a metric; none if they are too few for a trend."""
    values = finite_values(log_history, key)
    return values if len(values) >= MIN_ENTRIES else []


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last window."""
    return fmean(values[:WINDOW]), fmean(values[-WINDOW:])
