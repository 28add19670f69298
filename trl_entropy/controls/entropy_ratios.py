"""Entropy ratios of the new and the old policy (arXiv 2512.05591)."""

import torch
from torch import Tensor

from .checks import check_shapes
from .tokens import in_float32

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

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(entropies=(entropies, "B T"), old_entropies=(old_entropies, "B T"))
    # Rounding can make the entropy of a certain token slightly negative, and in float16 the paper's floor would be 0.
    new, old = (in_float32(values.detach()).clamp(min=0.0) for values in (entropies, old_entropies))
    unchanged = (new < ENTROPY_FLOOR) & (old < ENTROPY_FLOOR)
    return torch.where(unchanged, 1.0, (new + floor) / (old + floor))


def inside_bounds(ratio: Tensor, low: float, high: float) -> Tensor:
    """True where ERC keeps a token, `low < ratio < high`; a NaN entropy is clipped rather than trained on."""
    return (ratio > low) & (ratio < high)
