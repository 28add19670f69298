"""CE-GPPO: tokens that PPO-clip drops get a bounded gradient back (arXiv 2509.20712, GPPO: 2508.07629)."""

import math

import torch
from torch import Tensor

from .importance import clipped_by_ppo, ratio_of
from .tokens import PolicyTokens, TokenMean


def ce_gppo(
    tokens: PolicyTokens,
    log_weight: Tensor,
    *,
    alpha1: float,
    alpha2: float,
    eps_low: float,
    eps_high: float,
    delta: float | None = None,
) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """Give the tokens that PPO-clip drops the gradient weight of CE-GPPO (arXiv 2509.20712).

    The paper's loss is, with `r` the importance ratio and `sg` the stop-gradient,

        A < 0, r < 1 - eps_low   (NA&LP):  -alpha1 (1 - eps_low)  (r / sg(r)) A
        A > 0, r > 1 + eps_high  (PA&LP):  -alpha2 (1 + eps_high) (r / sg(r)) A
        otherwise:                         -r A

    so the gradient of a clipped token is `alpha (1 -+ eps) A grad lp`, whatever `r` is. The same gradient comes out of
    PPO-clip itself when the token's advantage is `alpha (1 -+ eps) A` and its ratio exactly 1: `old_logps = sg(lp)`.
    Unlike the released code, this has no `r / sg(r)` to become 0/0 when `r` underflows.

    `(alpha1, alpha2) = (1, 1)` is GPPO, `(0, 0)` has the gradients of PPO-clip. The paper's v4 and the released code
    call the pair beta1, beta2. At sequence level every token of a clipped sequence is shifted, and a token of it that
    is not clipped itself (advantages may differ within a sequence) keeps its gradient through the advantage `r A`.

    Args:
        tokens: The micro-batch.
        log_weight: Log importance weight of `tokens`, `(B, T)`, or `(B, 1)` at sequence level.
        alpha1: Share of the gradient given back below the trust region (exploitation), at least 0.
        alpha2: Share given back above it (exploration), at least 0.
        eps_low: The clip range is `[1 - eps_low, 1 + eps_high]`.
        eps_high: See `eps_low`.
        delta: Dual clip: tokens with `A < 0` and `r > delta` get no gradient; `None` for no such bound.

    Returns:
        The micro-batch with shaped `advantages` and `old_logps`, and the metrics.
    """
    ratio, advantages = ratio_of(log_weight), tokens.advantages
    low, high = clipped_by_ppo(ratio, advantages, eps_low, eps_high)

    dual_clipped = (advantages < 0) & (ratio > (math.inf if delta is None else delta))
    weight = torch.where(dual_clipped, 0.0, ratio)
    weight = torch.where(low, alpha1 * (1 - eps_low), weight)
    weight = torch.where(high, alpha2 * (1 + eps_high), weight)

    shifted = low | high
    if log_weight.shape[-1] != advantages.shape[-1]:
        shifted = (shifted & tokens.mask).any(-1, keepdim=True).expand_as(advantages)
    shaped = PolicyTokens(
        logps=tokens.logps,
        old_logps=torch.where(shifted, tokens.logps.detach(), tokens.old_logps),
        advantages=torch.where(shifted, weight * advantages, advantages),
        mask=tokens.mask,
    )
    return shaped, {
        "ce_gppo/low_fraction": TokenMean(low, tokens.mask),
        "ce_gppo/high_fraction": TokenMean(high, tokens.mask),
    }
