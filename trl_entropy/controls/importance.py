"""Importance ratios, and which tokens PPO-clip drops."""

import torch
from torch import Tensor

from .checks import check_shapes
from .tokens import in_float32

MAX_LOG_IMPORTANCE_WEIGHT = 40.0
"""exp(40) = 2.4e17: beyond any ratio a working run produces, and its square still fits float32."""


def log_importance_weight(logps: Tensor, old_logps: Tensor, mask: Tensor, level: str) -> Tensor:
    """Log importance ratio: `lp - lp_old`, or its masked mean over the sequence (GSPO, arXiv 2507.18071, eq. 7).

    Args:
        logps: `(B, T)`.
        old_logps: `(B, T)`.
        mask: Bool, `(B, T)`.
        level: `"token"` or `"sequence"` (TRL's `importance_sampling_level`).

    Returns:
        `(B, T)` at token level, `(B, 1)` at sequence level; without an autograd graph.

    Raises:
        ValueError: If `level` is neither, or the shapes do not fit.
    """
    check_shapes(mask=(mask, "B T"), logps=(logps, "B T"), old_logps=(old_logps, "B T"))
    log_ratio = (logps - old_logps).detach()
    if level == "token":
        return log_ratio
    if level == "sequence":
        total = (in_float32(log_ratio) * mask).sum(-1, keepdim=True)
        return (total / mask.sum(-1, keepdim=True).clamp(min=1)).to(log_ratio.dtype)
    raise ValueError(f"importance_sampling_level={level!r} is unknown. Set it to 'token' or 'sequence'.")


def clipped_by_ppo(ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """The tokens whose gradient PPO-clip drops, below and above the trust region (arXiv 1707.06347, eq. 7).

    Args:
        ratio: Importance ratio, `(B, T)` or `(B, 1)`.
        advantages: `(B, T)`.
        eps_low: Half-width of the clip range `[1 - eps_low, 1 + eps_high]` below 1.
        eps_high: Half-width of the clip range above 1.

    Returns:
        Two bool `(B, T)`: `A < 0` and `r < 1 - eps_low` (NA&LP), `A > 0` and `r > 1 + eps_high` (PA&LP).

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(advantages=(advantages, "B T"), ratio=(ratio, "B T?"))
    return (advantages < 0) & (ratio < 1 - eps_low), (advantages > 0) & (ratio > 1 + eps_high)


def bounded_old_logps(old_logps: Tensor, log_weight: Tensor) -> Tensor:
    """Shift `old_logps` so that no importance ratio overflows: the log weight is at most `MAX_LOG_IMPORTANCE_WEIGHT`.

    In float32 a ratio of e^89 is infinite, and infinity times a zero advantage or a zero mask is NaN. The bound leaves
    every smaller ratio as it is, to the last bit, and keeps the gradient of the larger ones.

    Args:
        old_logps: `(B, T)`.
        log_weight: `(B, T)` or `(B, 1)`, from `log_importance_weight`.

    Returns:
        `(B, T)`.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(old_logps=(old_logps, "B T"), log_weight=(log_weight, "B T?"))
    return old_logps + (log_weight - MAX_LOG_IMPORTANCE_WEIGHT).clamp(min=0.0)


def ratio_of(log_weight: Tensor) -> Tensor:
    """`exp` of a log importance weight, bounded as in `bounded_old_logps`; same shape."""
    return torch.exp(log_weight.clamp(max=MAX_LOG_IMPORTANCE_WEIGHT))
