"""CE-GPPO: tokens that PPO-clip drops get a bounded gradient back (arXiv 2509.20712, GPPO: 2508.07629)."""

import math
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .checks import check_shapes
from .control import PPO_CLIP_LOSSES, Context, Control, Figure, Mark, Metric, Metrics, MicroBatch, Panel
from .health import Finding, LogHistory, ends, enough, finite_values, window
from .importance import clipped_by_ppo, ratio_of
from .tokens import PolicyTokens, TokenMean

REWARD_LOST_SHARE = 0.2
"""Reward below a fifth of its best window: what was learnt is lost, which noise does not do."""
GRADIENT_GROWTH = 2.0
"""Gradient norm above twice its start; healthy runs stay in one band."""


@dataclass
class CEGPPOFields:
    """The fields of CE-GPPO (arXiv 2509.20712).

    Args:
        ce_gppo_alpha1 (`float`, *optional*):
            Share of the gradient given back to tokens clipped below the trust region (`A < 0`, `r < 1 - epsilon`), at
            least 0. Set together with `ce_gppo_alpha2`. Published: 0.75 (7B), 0.5 (1.5B); 1 with `ce_gppo_alpha2=1` is
            GPPO (arXiv 2508.07629).
        ce_gppo_alpha2 (`float`, *optional*):
            Share given back to tokens clipped above the trust region (`A > 0`, `r > 1 + epsilon_high`), at least 0.
            Published: 1.
    """

    ce_gppo_alpha1: float | None = field(
        default=None,
        metadata={"help": "CE-GPPO: share of the gradient given back below the trust region. Published: 0.75 or 0.5."},
    )
    ce_gppo_alpha2: float | None = field(
        default=None,
        metadata={"help": "CE-GPPO: share of the gradient given back above the trust region. Published: 1."},
    )

    @property
    def ce_gppo_enabled(self) -> bool:
        return self.ce_gppo_alpha1 is not None

    @property
    def ce_gppo_alphas(self) -> tuple[float, float] | None:
        """`(alpha1, alpha2)`, or `None` where CE-GPPO is off."""
        alpha1, alpha2 = self.ce_gppo_alpha1, self.ce_gppo_alpha2
        return None if alpha1 is None or alpha2 is None else (alpha1, alpha2)


def check(config: Any) -> None:
    """Refuse values that CE-GPPO cannot work with."""
    alpha1, alpha2 = config.ce_gppo_alpha1, config.ce_gppo_alpha2
    if alpha1 is None and alpha2 is None:
        return
    if alpha1 is None or alpha2 is None:
        raise ValueError(
            f"ce_gppo_alpha1={alpha1} and ce_gppo_alpha2={alpha2}: set both (published: 0.75 and 1) or neither."
        )
    for name, alpha in (("ce_gppo_alpha1", alpha1), ("ce_gppo_alpha2", alpha2)):
        if not (alpha >= 0.0 and math.isfinite(alpha)):
            raise ValueError(f"{name}={alpha} must be finite and at least 0; published values are in [0, 1].")
    delta = getattr(config, "delta", None)
    if delta is not None and delta <= 1.0 + config.eps_high:
        raise ValueError(
            f"delta={delta} must be above 1 + epsilon_high = {1.0 + config.eps_high} with CE-GPPO: a smaller "
            "dual clip drops tokens inside the trust region. Published: 10."
        )
    if getattr(config, "beta", 0.0) != 0.0 and config.use_bias_correction_kl:
        raise ValueError(
            f"beta={config.beta} with use_bias_correction_kl=True multiplies the KL term by the importance ratio, "
            "which CE-GPPO sets to 1 for clipped tokens. Set use_bias_correction_kl=False, or beta=0."
        )


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
        eps_low: Half-width of the clip range `[1 - eps_low, 1 + eps_high]` below 1.
        eps_high: Half-width of the clip range above 1.
        delta: Dual clip: tokens with `A < 0` and `r > delta` get no gradient; `None` for no such bound.

    Returns:
        The micro-batch with shaped `advantages` and `old_logps`, and the metrics.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(advantages=(tokens.advantages, "B T"), log_weight=(log_weight, "B T?"))
    ratio, advantages = ratio_of(log_weight), tokens.advantages
    low, high = clipped_by_ppo(ratio, advantages, eps_low, eps_high)

    dual_clipped = (advantages < 0) & (ratio > (math.inf if delta is None else delta))
    weight = torch.where(dual_clipped, 0.0, ratio)
    weight = torch.where(low, alpha1 * (1 - eps_low), weight)
    weight = torch.where(high, alpha2 * (1 + eps_high), weight)

    shifted = low | high
    if log_weight.shape[-1] != advantages.shape[-1]:
        shifted = (shifted & tokens.mask).any(-1, keepdim=True).expand_as(advantages)
    shaped = replace(
        tokens,
        old_logps=torch.where(shifted, tokens.logps.detach(), tokens.old_logps),
        advantages=torch.where(shifted, weight * advantages, advantages),
    )
    return shaped, {
        "ce_gppo/low_fraction": TokenMean(low, tokens.mask),
        "ce_gppo/high_fraction": TokenMean(high, tokens.mask),
    }


def shape(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: None) -> tuple[PolicyTokens, Metrics]:
    return ce_gppo(
        tokens,
        batch.log_weight,
        alpha1=context.settings.ce_gppo_alpha1,
        alpha2=context.settings.ce_gppo_alpha2,
        eps_low=context.eps_low,
        eps_high=context.eps_high,
        delta=context.delta,
    )


def ce_gppo_runaway(log_history: LogHistory) -> Finding | None:
    """The reward is lost while the gradient norm grows, and CE-GPPO is on."""
    rewards, norms = enough(log_history, "reward"), enough(log_history, "grad_norm")
    if not rewards or not norms or not finite_values(log_history, "ce_gppo/low_fraction"):
        return None
    size = window(rewards, log_history)
    best = max(fmean(rewards[end - size : end]) for end in range(size, len(rewards) + 1))
    now, (norm_start, norm_now) = ends(rewards, log_history)[1], ends(norms, log_history)
    if not (now < REWARD_LOST_SHARE * best and norm_now > GRADIENT_GROWTH * norm_start):
        return None
    return Finding(
        "ce_gppo_runaway",
        f"The reward fell from {best:.3g} to {now:.3g} while the gradient norm grew from {norm_start:.3g} to "
        f"{norm_now:.3g}: ce_gppo_alpha1 goes on pushing down tokens that are already far below the trust region.",
        "Try fewer optimizer steps per rollout (steps_per_generation, num_iterations), a smaller learning_rate, or a "
        "smaller ce_gppo_alpha1.",
    )


CE_GPPO = Control(
    name="CE-GPPO",
    prefix="ce_gppo",
    summary="A token that PPO-clip drops gets the gradient weight `alpha1 (1 - epsilon)` below the trust region, "
    "`alpha2 (1 + epsilon_high)` above it. `1, 1` is GPPO (arXiv 2508.07629), `0, 0` has PPO-clip's "
    "gradients.",
    published="0.75, 1 (7B); 0.5, 1 (1.5B); `epsilon` 0.2",
    paper="CE-GPPO: Coordinating Entropy via Gradient-Preserving Clipping Policy Optimization in Reinforcement "
    "Learning",
    arxiv="2509.20712",
    fields=("ce_gppo_alpha1", "ce_gppo_alpha2"),
    switch="`ce_gppo_alpha1`, `ce_gppo_alpha2`",
    check=check,
    acts_on_policy=False,
    loss_types=PPO_CLIP_LOSSES,
    loss_reason="which has no PPO clip to give gradients back from",
    replaces_ppo_clip=True,
    shape=shape,
    metrics=(
        Metric("low_fraction", "share of tokens", "tokens re-weighted with `alpha1`", "as `ppo_clip/low_fraction`"),
        Metric("high_fraction", "share of tokens", "tokens re-weighted with `alpha2`", "as `ppo_clip/high_fraction`"),
    ),
    marks=(
        Mark(
            "ce_gppo_low",
            "1",
            "re-weighted with alpha1",
            "below the trust region, A < 0: re-weighted by CE-GPPO with alpha1",
            ("#d3e9f8", "3px double", "#00507d"),
            "ce_gppo/low_fraction",
        ),
        Mark(
            "ce_gppo_high",
            "2",
            "re-weighted with alpha2",
            "above the trust region, A > 0: re-weighted by CE-GPPO with alpha2",
            ("#cdf0e3", "3px dashed", "#00664a"),
            "ce_gppo/high_fraction",
        ),
    ),
    figures=(
        Figure(
            "ce_gppo",
            "Tokens given back a gradient by CE-GPPO",
            (Panel("below, alpha1", ("ce_gppo/low_fraction",)), Panel("above, alpha2", ("ce_gppo/high_fraction",))),
            "Healthy: as small and steady as the PPO clip fractions; growth below the range means that alpha1 pushes "
            "tokens further and further down, and calls for fewer updates per rollout, a smaller learning rate or a "
            "smaller alpha1.",
            from_zero=True,
        ),
    ),
    rules=(ce_gppo_runaway,),
    remedies=(("entropy_collapse", "ce_gppo_alpha2=1 with a smaller ce_gppo_alpha1"),),
    counts=("ce_gppo/low_fraction", "ce_gppo/high_fraction"),
)
