"""ERC: clipping by the entropy ratio of the new and the old policy (arXiv 2512.05591)."""

from dataclasses import replace

import torch
from torch import Tensor

from .tokens import PolicyTokens, TokenMean, in_float32

ENTROPY_FLOOR = 1e-8
"""Nats; the paper's."""


def entropy_ratio(entropies: Tensor, old_entropies: Tensor, floor: float = ENTROPY_FLOOR) -> Tensor:
    """`rho = (H + floor) / (H_old + floor)`, in arXiv 2512.05591 with a floor of 1e-8, without an autograd graph.

    Where both entropies are below 1e-8 nats their ratio is rounding noise: it counts as 1, unchanged.

    Args:
        entropies: Full-vocabulary entropy of the policy being trained, nats, `(B, T)`.
        old_entropies: The same of the policy that produced the rollout, `(B, T)`.
        floor: Nats, at least 0. With one well above the entropy, the ratio measures the change in units of the floor.

    Returns:
        `(B, T)`.
    """
    # Rounding can make the entropy of a certain token slightly negative, and in float16 the paper's floor would be 0.
    new, old = (in_float32(values.detach()).clamp(min=0.0) for values in (entropies, old_entropies))
    unchanged = (new < ENTROPY_FLOOR) & (old < ENTROPY_FLOOR)
    return torch.where(unchanged, 1.0, (new + floor) / (old + floor))


def inside_bounds(ratio: Tensor, low: float, high: float) -> Tensor:
    """True where ERC keeps a token, `low < ratio < high`; a NaN entropy is clipped rather than trained on."""
    return (ratio > low) & (ratio < high)


def erc(
    tokens: PolicyTokens,
    entropies: Tensor,
    old_entropies: Tensor,
    *,
    low: float,
    high: float,
    floor: float = ENTROPY_FLOOR,
    sequence_ratio: bool = False,
) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """Keep a token's policy gradient iff `low < rho < high` (arXiv 2512.05591).

    A clipped token's advantage becomes 0, so its term of the policy loss has neither value nor gradient; KL and
    entropy terms are not touched. (The released code detaches the term instead, which leaves its value in the reported
    loss; the gradient is the same.)

    With one differentiable ratio for a whole sequence (GSPO), every token's term moves every token of it, so a term
    left out would still leave a gradient on the clipped token. There the token is `frozen` instead: its log-prob is a
    constant in the sequence's ratio and its advantage stays. With one advantage per sequence these are the gradients
    of GSPO-token (arXiv 2507.18071, eq. 13) with the authors' gate on each token's term; with an advantage per token,
    a kept token's weight is the mean over the sequence, as in GSPO without ERC.

    Args:
        tokens: The micro-batch.
        entropies: Nats, `(B, T)`.
        old_entropies: Nats, `(B, T)`.
        low: Lower bound of the entropy ratio, in [0, 1).
        high: Upper bound, above 1.
        floor: Of `entropy_ratio`, nats.
        sequence_ratio: Whether the tokens of a sequence share one importance ratio that carries their gradient.

    Returns:
        The micro-batch with shaped `advantages`, or `frozen` tokens with `sequence_ratio`, and the metrics.
    """
    ratio = entropy_ratio(entropies, old_entropies, floor)
    below, above, kept = ratio <= low, ratio >= high, inside_bounds(ratio, low, high)
    if sequence_ratio:
        shaped = replace(tokens, frozen=tokens.mask & ~kept)
    else:
        shaped = replace(tokens, advantages=torch.where(kept, tokens.advantages, 0.0))
    clipped, current = tokens.mask & ~kept, entropies.detach()
    return shaped, {
        "erc/clip_fraction": TokenMean(clipped, tokens.mask),
        "erc/low_fraction": TokenMean(below, tokens.mask),
        "erc/high_fraction": TokenMean(above, tokens.mask),
        "erc/entropy_clipped": TokenMean(current, clipped),
        "erc/entropy_kept": TokenMean(current, tokens.mask & kept),
    }
