"""Random micro-batches for the properties of the controls and of the trainer around them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from trl_entropy.controls import PolicyTokens

quick = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LOG_RATIOS = (-1e3, -41.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 41.0, 1e3)
ENTROPIES = (-1e-4, 0.0, 1e-9, 1e-8, 0.01, 0.7, 11.0)
ADVANTAGES = (float("nan"), -3.0, -0.5, 0.0, 0.5, 3.0)
LOGPS = (-1e3, -20.0, -1.0, -1e-6, 0.0)
REWARDS = (1.0, 0.0, float("nan"))


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `B` rows of `T` tokens, of which some rows have none that count."""

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    entropies: Tensor
    old_entropies: Tensor
    mask: Tensor
    rewards: Tensor

    @property
    def tokens(self) -> PolicyTokens:
        return PolicyTokens(self.logps, self.old_logps, self.advantages, self.mask)

    @property
    def correct(self) -> Tensor:
        return self.rewards >= 1.0

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{name: function(value) for name, value in vars(self).items()})

    def to(self, dtype: torch.dtype) -> "Batch":
        return self.map(lambda value: value.to(dtype) if value.is_floating_point() else value)

    def __getitem__(self, rows: slice | list[int]) -> "Batch":
        return self.map(lambda value: value[rows])


@st.composite
def batches(
    draw: st.DrawFn, advantages: tuple[float, ...] = ADVANTAGES, log_ratios: tuple[float, ...] = LOG_RATIOS
) -> Batch:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 7))

    def tensor(values: tuple[float, ...], count: int = rows * columns) -> Tensor:
        cells = draw(st.binary(min_size=count, max_size=count))  # in one draw, which is quick
        return torch.tensor([values[cell % len(values)] for cell in cells], dtype=torch.float64).view(rows, -1)

    log_ratio = tensor(log_ratios)
    logps = tensor(LOGPS) + log_ratio.clamp(max=0.0)  # so that neither policy's is above 0
    lengths = draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    completion = torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)
    return Batch(
        logps=logps,
        old_logps=logps - log_ratio,
        advantages=tensor(advantages),
        entropies=tensor(ENTROPIES),
        old_entropies=tensor(ENTROPIES),
        mask=completion & tensor((True, True, False)).bool(),  # a tool's answers do not count
        rewards=tensor(REWARDS, rows)[:, 0],
    )


def padded(batch: Batch, columns: int) -> Batch:
    """With columns that do not count, full of what must not be read."""

    def pad(value: Tensor, filler: float) -> Tensor:
        if value.dim() == 1:
            return value
        return torch.nn.functional.pad(value, (0, columns), value=False if value.dtype == torch.bool else filler)

    return Batch(**{name: pad(value, 7.0 - place) for place, (name, value) in enumerate(vars(batch).items())})


def rewritten(batch: Batch) -> Batch:
    """With other numbers in all the tokens that do not count."""
    given = [(name, value) for name, value in vars(batch).items() if value.dim() == 2 and value.is_floating_point()]
    return replace(
        batch, **{name: torch.where(batch.mask, value, 7.0 - place) for place, (name, value) in enumerate(given)}
    )
