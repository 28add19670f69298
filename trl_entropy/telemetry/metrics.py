"""Means over the tokens of the global batch, collected on the device and read when they are logged."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..controls import TokenMean
from ..controls.turns import turn_indices

TURNS = {
    **{f"turn_{turn}": (turn, turn) for turn in range(1, 9)},
    "turns_9_to_16": (9, 16),
    "turns_17_to_32": (17, 32),
    "turns_from_33": (33, math.inf),
}
"""Metrics of an episode's turns: the first and the last turn, from 1, that each is a mean over."""


def turn_entropies(entropies: Tensor, mask: Tensor) -> dict[str, TokenMean]:
    """Entropy by the turn that a token belongs to, for each of `TURNS`.

    Args:
        entropies: Nats, `(B, T)`.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
    """
    turns = turn_indices(mask) + 1
    return {
        f"entropy/{name}": TokenMean(entropies, mask & (turns >= first) & (turns <= last))
        for name, (first, last) in TURNS.items()
    }


class TokenMeans:
    """Accumulates `TokenMean`s without a device synchronisation until they are read.

    Each micro-batch adds its numerators and denominators (`add`), each optimizer step sums them over the processes
    (`close_window`), and logging divides and reads them (`pop`).
    """

    def __init__(self) -> None:
        self._window: dict[str, Tensor] = {}
        self._closed: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, metrics: Mapping[str, TokenMean]) -> None:
        """Add the tokens of one micro-batch."""
        for name, metric in metrics.items():
            totals = metric.totals()
            self._window[name] = self._window[name] + totals if name in self._window else totals

    def close_window(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """End an accumulation window: `reduce` sums a `(metrics, 2)` tensor over the processes, in one collective."""
        if self._window:
            names = tuple(sorted(self._window))
            self._closed.append((names, reduce(torch.stack([self._window[name] for name in names]))))
            self._window = {}

    def pop(self) -> dict[str, float]:
        """The means over all closed windows since the last call; a metric that had no token in them is left out."""
        sums: dict[str, list[float]] = {}
        for names, totals in self._closed:
            for name, (numerator, denominator) in zip(names, totals.tolist(), strict=True):
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += numerator
                total[1] += denominator
        self._closed = []
        return {name: numerator / count for name, (numerator, count) in sums.items() if count > 0}
