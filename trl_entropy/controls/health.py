"""Reading a trainer's log: findings, and the trends that rules compare."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

LogHistory = Sequence[dict[str, Any]]

WINDOW = 8
"""Optimizer steps that a mean of a trend covers at least: one rollout by the papers' schedule."""
MIN_ENTRIES = 8
"""Fewer entries of a metric are no trend, however many steps each is a mean of."""


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


def logged_steps(log_history: LogHistory) -> list[float]:
    """The optimizer steps that have an entry, in order, each once."""
    return sorted(set(finite_values(log_history, "step")))


def entries_of_window(log_history: LogHistory) -> int:
    """As many log entries as cover `WINDOW` optimizer steps; each is a mean of the steps since the one before.

    The gap between two entries is the usual one: evaluations between them, and the end of the run, may be nearer.
    """
    gaps = [later - step for step, later in pairwise(logged_steps(log_history))]
    return math.ceil(WINDOW / median(gaps)) if gaps else WINDOW


def needed_entries(log_history: LogHistory) -> int:
    """Entries of a metric that make a trend: two windows, and `MIN_ENTRIES`."""
    return max(MIN_ENTRIES, 2 * entries_of_window(log_history))


def long_enough(log_history: LogHistory) -> bool:
    """Whether any metric of the training makes a trend."""
    names = {name for entry in log_history for name in entry if not name.startswith("eval_")} - {"step", "epoch"}
    return any(enough(log_history, name) for name in names)


def enough(log_history: LogHistory, key: str) -> list[float]:
    """The finite numbers of a metric; none if they are too few for a trend."""
    values = finite_values(log_history, key)
    return values if len(values) >= needed_entries(log_history) else []


def window(values: Sequence[float], log_history: LogHistory) -> int:
    """Entries per mean of a metric: those that cover `WINDOW` steps; of a longer log a quarter, at most `WINDOW`."""
    return max(entries_of_window(log_history), min(WINDOW, len(values) // 4))


def ends(values: Sequence[float], log_history: LogHistory) -> tuple[float, float]:
    """Means of the first and of the last window of a metric's values."""
    size = window(values, log_history)
    return fmean(values[:size]), fmean(values[-size:])
