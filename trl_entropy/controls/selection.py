"""The tokens with the lowest or highest scores of the global batch, to the exact count."""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_shapes

Gather = Callable[[Tensor], Tensor]


def lowest_fraction(
    scores: Tensor,
    mask: Tensor,
    fraction: float,
    gather: Gather,
    *,
    at_least: int = 0,
    round_up: bool = False,
    rank: int | None = None,
) -> Tensor:
    """The `floor(fraction * N)` lowest-scoring of the `N` valid tokens of the global batch.

    Tokens with equal scores are taken in their order in the global batch (processes by rank, rows, tokens), so the
    count is met even where all scores are equal, and how the rows are split over the processes does not matter. A NaN
    counts as worse than every number: it is selected last. `fraction` is read as the decimal number that it prints as,
    so 0.29 of 100 tokens are 29.

    Args:
        scores: `(B, T)`.
        mask: True for valid tokens, bool `(B, T)`. `T` may differ between processes.
        fraction: In [0, 1].
        gather: Concatenates a 1-D tensor, of one length on all processes, in the order of their ranks.
        at_least: So many are selected where `fraction` is fewer and the batch has them.
        round_up: Whether it is `ceil(fraction * N)` tokens.
        rank: This process's place in that order. Default: its rank in `torch.distributed`, 0 without it.

    Returns:
        Bool `(B, T)`.

    Raises:
        ValueError: If `fraction` is not in [0, 1], or the shapes do not fit.
    """
    check_shapes(mask=(mask, "B T"), scores=(scores, "B T"))
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction={fraction} must be in [0, 1]. Published: 0.2.")
    selected = torch.zeros_like(mask)
    if fraction == 0.0 and not at_least:
        return selected
    values = scores.detach()[mask]
    counts = gather(values.new_tensor([len(values)], dtype=torch.int64)).tolist()
    if not any(counts):
        return selected
    pool = _global_values(values, counts, gather)
    chosen = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
    # a stable sort keeps equal scores in global order, and puts NaN last
    order = torch.sort(pool, stable=True).indices
    count = Fraction(str(fraction)) * len(pool)
    chosen[order[: max(math.ceil(count) if round_up else math.floor(count), at_least)]] = True
    start = sum(counts[: _own_rank() if rank is None else rank])
    selected[mask] = chosen[start : start + len(values)]
    return selected


def highest_fraction(
    scores: Tensor, mask: Tensor, fraction: float, gather: Gather, *, at_least: int = 0, rank: int | None = None
) -> Tensor:
    """The `floor(fraction * N)` highest-scoring of the `N` valid tokens of the global batch.

    Args:
        scores: `(B, T)`; of equal ones and NaN, as in `lowest_fraction`.
        mask: True for valid tokens, bool `(B, T)`. `T` may differ between processes.
        fraction: In [0, 1].
        gather: Concatenates a 1-D tensor, of one length on all processes, in the order of their ranks.
        at_least: So many are selected where `fraction` is fewer and the batch has them.
        rank: This process's place in that order. Default: its rank in `torch.distributed`, 0 without it.

    Returns:
        Bool `(B, T)`.

    Raises:
        ValueError: If `fraction` is not in [0, 1], or the shapes do not fit.
    """
    return lowest_fraction(-scores, mask, fraction, gather, at_least=at_least, rank=rank)


def global_uniform(mask: Tensor, generator: torch.Generator, gather: Gather, *, rank: int | None = None) -> Tensor:
    """A uniform random number for each valid token of the global batch, however its rows are split over processes.

    Args:
        mask: True for valid tokens, bool `(B, T)`.
        generator: On the CPU, in the same state on all processes.
        gather: Concatenates a 1-D tensor, of one length on all processes, in the order of their ranks.
        rank: This process's place in that order. Default: its rank in `torch.distributed`, 0 without it.

    Returns:
        In [0, 1), and 1 where `mask` is False; float32 `(B, T)`.
    """
    count = mask.sum()
    counts = gather(count.unsqueeze(0)).tolist()
    start = sum(counts[: _own_rank() if rank is None else rank])
    numbers = torch.ones(mask.shape, device=mask.device)
    drawn = torch.rand(sum(counts), generator=generator)
    numbers[mask] = drawn[start : start + int(count)].to(mask.device)
    return numbers


def own_rows(pool: Tensor, num_rows: int, *, rank: int | None = None) -> Tensor:
    """This process's rows of a tensor over the rows of all processes.

    Args:
        pool: `(N, ...)`, the processes' rows in the order of their ranks.
        num_rows: Rows of each process.
        rank: This process's place in that order. Default: its rank in `torch.distributed`, 0 without it.

    Returns:
        `(num_rows, ...)`.
    """
    start = num_rows * (_own_rank() if rank is None else rank)
    return pool[start : start + num_rows]


def _global_values(values: Tensor, counts: list[int], gather: Gather) -> Tensor:
    """The valid scores of all processes in global order, `(sum(counts),)`."""
    longest = max(counts)
    padded = gather(torch.nn.functional.pad(values, (0, longest - len(values))))
    return torch.cat([part[:count] for part, count in zip(padded.split(longest), counts, strict=True)])


def _own_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
