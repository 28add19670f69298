"""The turns of multi-turn completions."""

import torch
from torch import Tensor

from .tokens import in_float32


def turn_indices(mask: Tensor) -> Tensor:
    """Index of the turn that each token belongs to; a turn is a maximal run of tokens that the model wrote.

    Args:
        mask: True for the tokens that the model wrote, bool `(B, T)`.

    Returns:
        0 for a completion's first turn, 1 for its second, ...; -1 where `mask` is False. Int64 `(B, T)`.
    """
    previous = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=False)
    return ((mask & ~previous).cumsum(-1) - 1).masked_fill(~mask, -1)


def trajectory_weights(mask: Tensor, turns: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights whose weighted sum is the sum over trajectories of the mean over turns of the mean over a turn's tokens.

    Args:
        mask: Bool, `(B, T)`.
        turns: From `turn_indices`, `(B, T)`.
        dtype: Of the result.

    Returns:
        `1 / (turns of the trajectory x tokens of the turn)`, 0 where `mask` is False, `(B, T)`.
    """
    index, ones = turns.clamp(min=0), mask.long()
    turn_lengths = torch.zeros_like(ones).scatter_add_(1, index, ones)
    num_turns = (turn_lengths > 0).sum(1, keepdim=True)
    weights = in_float32(mask.to(dtype)) / (turn_lengths.gather(1, index) * num_turns).clamp(min=1)
    return weights.to(dtype)
