"""The mean entropy of the RL steps so far, which EPO smooths against (arXiv 2509.22576)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_shapes
from .tokens import in_float32
from .turns import turn_indices


class EntropyHistory:
    """Mean token entropy of every finished RL step, and the sums of the one that runs.

    One RL step is one batch of rollouts. The mean over the steps is cumulative: the paper argues against a sliding
    window. A turn index that no trajectory of a step reached has no entry for that step (the released code enters a
    zero, which drags the mean down).
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.turn_steps: list[list[float]] = []
        self._running: Tensor | None = None
        self._means: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Number of finished RL steps: the index `k` of the one that runs."""
        return len(self.steps)

    def add(self, entropies: Tensor, mask: Tensor) -> None:
        """Add the tokens of one micro-batch of the running step, each under the policy that wrote it, `(B, T)`.

        An entropy that is not a finite number is left out: it would stay in every later mean.

        Raises:
            ValueError: If the shapes do not fit.
        """
        check_shapes(mask=(mask, "B T"), entropies=(entropies, "B T"))
        turns, device = turn_indices(mask).clamp(min=0).flatten(), mask.device
        mask = mask & entropies.isfinite()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        totals = torch.zeros(mask.shape[1], 2, device=device, dtype=dtype)
        totals[:, 0].scatter_add_(0, turns, torch.where(mask, entropies.detach().to(dtype), 0.0).flatten())
        totals[:, 1].scatter_add_(0, turns, mask.to(dtype).flatten())
        self._running = totals if self._running is None else _padded_sum(totals, self._running)

    def finish_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """End the running step, if there is one: `reduce` sums a `(turns, 2)` tensor over the processes."""
        if self._running is None:
            return
        totals, self._running = reduce(self._running).cpu(), None
        reached = totals[totals[:, 1] > 0]
        if len(reached):
            self.steps.append((reached[:, 0].sum() / reached[:, 1].sum()).item())
            self.turn_steps.append((reached[:, 0] / reached[:, 1]).tolist())
            self._means = {}

    def mean(self, kind: str, like: Tensor) -> Tensor | None:
        """Mean over the finished steps; `None` before the first has finished.

        Args:
            kind: `"scalar"` for the mean over all tokens, 0-dim, or `"per_turn"` for that of each turn index over the
                steps that reached it, `(turns,)`.
            like: Gives the device and the dtype, float32 at least.
        """
        if self.steps and kind not in self._means:
            mean = self._mean_steps() if kind == "scalar" else self._mean_turn_steps()
            self._means[kind] = in_float32(like).new_tensor(mean)
        return self._means.get(kind)

    def _mean_steps(self) -> float:
        return sum(self.steps) / len(self.steps)

    def _mean_turn_steps(self) -> list[float]:
        longest = max(map(len, self.turn_steps))
        columns = ([step[turn] for step in self.turn_steps if len(step) > turn] for turn in range(longest))
        return [sum(column) / len(column) for column in columns]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the running sums are this process's own."""
        return {"steps": self.steps, "turn_steps": self.turn_steps, "running": self._running}

    def load_state_dict(self, state: dict[str, Any], *, own: bool = True) -> None:
        """Continue from `state_dict()`; the running sums are left out unless they are this process's `own`."""
        self.steps, self.turn_steps = state["steps"], state["turn_steps"]
        self._running, self._means = state["running"] if own else None, {}


def _padded_sum(first: Tensor, second: Tensor) -> Tensor:
    """Sum of two `(turns, 2)` tensors, the shorter one padded with zeros."""
    if len(first) < len(second):
        first, second = second, first
    return first + torch.nn.functional.pad(second, (0, 0, 0, len(first) - len(second)))
