"""SmolLM2 in TF32 beside the rows of `recipes/study/rounding.py`, whose folder must be in reach."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rounding import ARMS, Row, TimedProbe

from trl_entropy.telemetry.rounding import Pass

ARMS["TF32"] = ARMS["float32"]


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class TF32Probe(TimedProbe):
    """Float32 weights, of which a GPU's matrix products see ten bits of the mantissa; compared with float32 itself."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with _products("high"):
            return super().train(*args, **kwargs)

    def _float32_pass(self, trained: Pass) -> Pass | None:
        with _products("highest"):
            return self.forward_pass(self._rollout)


class TF32Row(Row):
    """A row whose arm is `TF32`."""

    @property
    def probe_class(self) -> type[TimedProbe]:
        return TF32Probe
