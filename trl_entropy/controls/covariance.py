"""Covariance of a token's log-prob and its advantage: what Clip-Cov and KL-Cov select by (arXiv 2505.22617)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import check_shapes

SELECTIONS = ("rollout", "micro_batch")
"""Whose tokens are compared: all of a rollout, once before its updates, or those of each micro-batch of a process."""


def check_selection(config: Any, name: str) -> None:
    """Refuse a field that is none of `SELECTIONS`.

    Raises:
        ValueError: The message names the field and its value.
    """
    if getattr(config, name) not in SELECTIONS:
        raise ValueError(f"{name}={getattr(config, name)!r} is unknown. Choose one of {', '.join(SELECTIONS)}.")


def covariance(
    advantages: Tensor,
    logps: Tensor,
    mask: Tensor,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda totals: totals,
) -> Tensor:
    """`cov_t = (A_t - mean A) (lp_t - mean lp)`, the means over the valid tokens (arXiv 2505.22617), without a graph.

    Its mean over the tokens is their covariance, which the paper finds to drive the entropy down: large and positive
    are likely tokens that are rewarded and unlikely ones that are punished. A token whose advantage or log-prob is
    not finite is left out of the means.

    Args:
        advantages: `(B, T)`; the controls pass those of the rollout, which the entropy-based advantage has not shaped.
        logps: `(B, T)`.
        mask: True for valid tokens, bool `(B, T)`.
        sum_over_processes: Makes the means those of the global batch.

    Returns:
        `(B, T)`, float64 (float32 on MPS), so that how rows are split over processes does not change an order; of no
        meaning where `mask` is False.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(mask=(mask, "B T"), advantages=(advantages, "B T"), logps=(logps, "B T"))
    dtype = torch.float32 if mask.device.type == "mps" else torch.float64
    pair = torch.stack([advantages.detach(), logps.detach()]).to(dtype)
    counted = mask & pair.isfinite().all(0)
    totals = torch.cat([torch.where(counted, pair, 0.0).sum((1, 2)), counted.sum().to(dtype).unsqueeze(0)])
    total_advantages, total_logps, count = sum_over_processes(totals)
    means = torch.stack([total_advantages, total_logps]) / count.clamp(min=1)
    return (pair - means[:, None, None]).prod(0)


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages `(B,)` or `(B, T)` as `(B, T)`."""
    return (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(mask)


def rollout_column(columns: Mapping[str, Tensor], name: str, needed_by: str) -> Tensor:
    """A column that `on_rollout` added to the rollout, `(B, T)`.

    Raises:
        ValueError: If the micro-batch does not have it.
    """
    if name not in columns:
        raise ValueError(
            f"{needed_by} needs the rollout's `{name}`, which the micro-batch does not have. Let the trainer make the "
            "rollout, or add it."
        )
    return columns[name]
