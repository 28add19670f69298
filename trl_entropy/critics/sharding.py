"""Disjoint shards at prompt level: which critic trains on which completion (AsyPPO, arXiv 2510.01656)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def assign_shards(group_sizes: Sequence[int], num_critics: int, generator: torch.Generator) -> Tensor:
    """Split each prompt's completions at random and evenly over the critics.

    Each completion belongs to one critic, every critic gets completions of every prompt, and within a prompt the
    critics' shares differ by at most one. Who gets the larger share is drawn anew for each prompt.

    Args:
        group_sizes: Number of completions of each prompt, in the order of the completions.
        num_critics: Number of critics.
        generator: CPU generator; its state alone decides the result.

    Returns:
        Index of each completion's critic, int64 `(sum(group_sizes),)`, on the CPU.

    Raises:
        ValueError: If a prompt has fewer completions than there are critics.
    """
    if group_sizes and min(group_sizes) < num_critics:
        raise ValueError(
            f"A prompt has {min(group_sizes)} completions and num_critics={num_critics}, so some critic would not see "
            "it. Raise num_generations or lower num_critics."
        )
    return torch.cat(
        [torch.empty(0, dtype=torch.int64), *(_split(size, num_critics, generator) for size in group_sizes)]
    )


def _split(size: int, num_critics: int, generator: torch.Generator) -> Tensor:
    """The critics of one prompt's completions: dealt out in a random order of critics, then shuffled."""
    critics = torch.randperm(num_critics, generator=generator)
    return critics[torch.arange(size) % num_critics][torch.randperm(size, generator=generator)]
