"""Differences of runs with the same seeds: their interval, Student's paired t-test, and Holm's adjustment."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def t_probability(t: float, degrees: int) -> float:
    """Two-sided probability of Student's t with a whole number of degrees of freedom, in closed form."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    term = math.cos(angle) if degrees % 2 else 1.0
    total = 0.0
    for index in range(1 + degrees % 2, degrees - 1, 2):
        total, term = total + term, term * math.cos(angle) ** 2 * index / (index + 1)
    if degrees > 1:
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if degrees % 2 else math.sin(angle) * total
    return max(0.0, 1 - inside)


def t_quantile(degrees: int, probability: float = 0.05) -> float:
    """The t that is exceeded, on either side, with this probability."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) > probability else (low, middle)
    return high


@dataclass(frozen=True)
class Paired:
    """Differences of two arms' runs with the same seeds.

    Attributes:
        differences: One a seed; at least two.
    """

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def half_width(self) -> float:
        """Of the 95 % interval."""
        return t_quantile(len(self.differences) - 1) * self._error

    @property
    def probability(self) -> float:
        """Two-sided, of Student's paired t-test."""
        if not self._error:
            return 1.0 if not self.mean else 0.0
        return t_probability(self.mean / self._error, len(self.differences) - 1)

    @property
    def _error(self) -> float:
        return statistics.stdev(self.differences) / math.sqrt(len(self.differences))

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half_width:.3f} ({len(self.differences)})"


def holm(probabilities: Sequence[float]) -> list[float]:
    """Holm's adjusted probabilities of a family of tests, in the same order."""
    adjusted, highest = [0.0] * len(probabilities), 0.0
    order = sorted(range(len(probabilities)), key=lambda index: probabilities[index])
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * probabilities[index]))
        adjusted[index] = highest
    return adjusted
