"""The likelihood term of the Klear recipes: correct completions are also imitated (arXiv 2508.07629)."""

import torch
from torch import Tensor

from .tokens import TokenMean, in_float32


def positive_nll(
    logps: Tensor, mask: Tensor, correct: Tensor, num_tokens: Tensor | float
) -> tuple[Tensor, dict[str, TokenMean]]:
    """Negative log-likelihood of the correct completions: `-sum of lp over their tokens / num_tokens`.

    Args:
        logps: Log-probability of each sampled token under the policy being trained, with its graph, `(B, T)`.
        mask: Bool, `(B, T)`.
        correct: Bool, `(B,)`.
        num_tokens: Normaliser, the number of tokens of correct completions that the mean is taken over.

    Returns:
        The scalar loss (to be multiplied by its coefficient), and the metrics.
    """
    chosen = mask & correct.unsqueeze(-1)
    loss = -torch.where(chosen, in_float32(logps), 0.0).sum() / num_tokens
    return loss, {
        "positive_nll/loss": TokenMean(-logps.detach(), chosen),
        "positive_nll/token_fraction": TokenMean(chosen, mask),
    }
