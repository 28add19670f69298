"""KL-Cov: a penalty on the drift of the tokens with the largest covariance (arXiv 2505.22617)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_not_negative, check_shapes, is_number
from .control import (
    PPO_CLIP_LOSSES,
    Context,
    Control,
    Figure,
    Mark,
    Metric,
    Metrics,
    MicroBatch,
    Panel,
    Rollout,
)
from .covariance import check_selection, covariance, per_token, rollout_column
from .importance import clipped_by_ppo, ratio_of
from .selection import highest_fraction
from .tokens import PolicyTokens, TokenMean


@dataclass
class KLCovFields:
    """The fields of KL-Cov (arXiv 2505.22617).

    Args:
        kl_cov_coef (`float`, *optional*, defaults to `0.0`):
            Weight beta of the penalty `|lp - lp_old|` on the selected tokens, at least 0; 0 is off. Published: 1.
        kl_cov_fraction (`float`, *optional*, defaults to `0.002`):
            Share k of the valid tokens that are selected, those with the largest covariance, at least one, in (0, 1].
            Published: 0.002 (7B), 0.0002 (32B); the released scripts have them in percent, 0.2 and 0.02.
        kl_cov_selection (`str`, *optional*, defaults to `"rollout"`):
            `"rollout"` selects once per rollout, over the global batch, from the rollout policy's log-probs: what the
            authors say the paper means. `"micro_batch"` is the released code's: within each micro-batch of a process,
            from the current log-probs, so that the batch size decides which tokens are compared and, by the minimum
            of one, how many are selected. The choice waits for the device at every micro-batch.
        kl_cov_ppo_clip (`bool`, *optional*, defaults to `False`):
            Whether PPO-clip and the dual clip still act on the tokens that are not selected. Published: False, no
            clip on any token.
    """

    kl_cov_coef: float = field(
        default=0.0, metadata={"help": "KL-Cov: weight beta of the penalty |lp - lp_old|; 0 is off. Published: 1."}
    )
    kl_cov_fraction: float = field(
        default=0.002,
        metadata={"help": "KL-Cov: share of tokens, largest covariance first. Published: 0.002 or 0.0002."},
    )
    kl_cov_selection: str = field(
        default="rollout",
        metadata={"help": "KL-Cov: compare the tokens of a rollout, or of a micro_batch as the released code does."},
    )
    kl_cov_ppo_clip: bool = field(
        default=False, metadata={"help": "KL-Cov: keep PPO-clip on the tokens not selected. Published: False."}
    )

    @property
    def kl_cov_enabled(self) -> bool:
        return self.kl_cov_coef != 0.0


def check(config: Any) -> None:
    """Refuse values that KL-Cov cannot work with."""
    check_not_negative(config, "kl_cov_coef", "1; 0 is off")
    fraction, ppo_clip = config.kl_cov_fraction, config.kl_cov_ppo_clip
    if not (is_number(fraction) and 0.0 < fraction <= 1.0):
        raise ValueError(f"kl_cov_fraction={fraction} must be in (0, 1]. Published: 0.002 and 0.0002.")
    check_selection(config, "kl_cov_selection")
    if not isinstance(ppo_clip, bool):
        raise ValueError(f"kl_cov_ppo_clip={ppo_clip!r} must be True or False. Published: False.")
    if config.kl_cov_enabled:
        _check_loss(config)


def _check_loss(config: Any) -> None:
    """Refuse terms of TRL's loss that would read the shaped advantages and log-probs as something else."""
    delta, threshold = getattr(config, "delta", None), getattr(config, "off_policy_mask_threshold", None)
    if delta is not None and not config.kl_cov_ppo_clip:
        raise ValueError(
            f"delta={delta} would do nothing with kl_cov_ppo_clip=False: KL-Cov has no dual clip. Leave delta out, or "
            "set kl_cov_ppo_clip=True."
        )
    if config.kl_cov_ppo_clip and getattr(config, "dppo_enabled", False):
        raise ValueError(
            f"kl_cov_ppo_clip=True keeps PPO-clip, which dppo_divergence={config.dppo_divergence!r} replaces. Leave "
            "kl_cov_ppo_clip out, or dppo_divergence."
        )
    if delta is not None and delta <= 1.0:
        raise ValueError(f"delta={delta} must be above 1 with KL-Cov: it would drop tokens whose ratio is 1.")
    if threshold is not None:
        raise ValueError(
            f"off_policy_mask_threshold={threshold} goes by the sign of the advantage, in which KL-Cov's penalty is "
            "contained. Leave off_policy_mask_threshold out, or set kl_cov_coef=0."
        )
    if getattr(config, "beta", 0.0) != 0.0 and config.use_bias_correction_kl:
        raise ValueError(
            f"beta={config.beta} with use_bias_correction_kl=True multiplies the KL term by the importance ratio, "
            "which KL-Cov sets to 1. Set use_bias_correction_kl=False, or beta=0."
        )


def kl_cov(
    tokens: PolicyTokens,
    log_ratio: Tensor,
    selected: Tensor,
    *,
    coef: float,
    ppo_clip: bool,
    eps_low: float,
    eps_high: float,
    delta: float | None = None,
) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """The loss of KL-Cov, as advantages and old log-probs (arXiv 2505.22617).

    With `r` the importance ratio, and without a clip on any token, it is

        selected:  -r A + beta |lp - lp_old|
        others:    -r A

    so the gradient of a token is `-(r A - beta sign(lp - lp_old)) grad lp`, the second term for selected ones only.
    The same comes out of PPO-clip when the token's advantage is that bracket and its ratio exactly 1: `old_logps =
    sg(lp)`. The penalty is 0 where the policy has not moved, so with one update per rollout KL-Cov does nothing.

    It acts on what the controls before it left: `r A` with their advantage and their old log-prob. A token whose
    policy gradient one of them has dropped (ERC, Clip-Cov), `A = 0`, keeps the penalty, which is no part of that
    gradient, and is drawn back to the rollout policy if it is selected. What acts on the advantage after it, AsyPPO's
    mask, takes the penalty too; so do TRL's `top_entropy_quantile` and its correction for vLLM, which weigh the loss.

    The formulas are the released code's; the text of the paper could not be compared.

    Args:
        tokens: The micro-batch, as the controls before left it.
        log_ratio: `lp - lp_old` before any control, `(B, T)`.
        selected: Bool, `(B, T)`.
        coef: `beta`.
        ppo_clip: Whether PPO-clip acts on the tokens that are not selected.
        eps_low: Half-width of its range `[1 - eps_low, 1 + eps_high]` below 1.
        eps_high: Half-width of the clip range above 1.
        delta: Its dual clip; `None` for none.

    Returns:
        The micro-batch with shaped `advantages` and `old_logps`, and the metrics.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(mask=(tokens.mask, "B T"), log_ratio=(log_ratio, "B T"), selected=(selected, "B T"))
    logps, advantages, selected = tokens.logps.detach(), tokens.advantages, selected & tokens.mask
    ratio = ratio_of(logps - tokens.old_logps)
    unclipped = selected if ppo_clip else torch.ones_like(selected)
    penalty = torch.where(selected, coef * log_ratio.sign(), 0.0)
    shaped = replace(
        tokens,
        old_logps=torch.where(unclipped, logps, tokens.old_logps),
        advantages=torch.where(unclipped, ratio * advantages, advantages) - penalty,
    )
    low, high = clipped_by_ppo(ratio, advantages, eps_low, eps_high)
    dual = (advantages < 0) & (ratio > delta) if delta is not None else low
    return shaped, {
        "kl_cov/penalised_fraction": TokenMean(penalty != 0, tokens.mask),
        "kl_cov/penalty": TokenMean(log_ratio.abs(), selected),
        "kl_cov/ppo_clip_fraction": TokenMean((low | high | dual) & ~unclipped, tokens.mask),
    }


def _select(scores: Tensor, mask: Tensor, context: Context, **where: Any) -> tuple[Tensor, Metrics]:
    """The tokens with the largest covariance, and metrics."""
    selected = highest_fraction(scores, mask, context.settings.kl_cov_fraction, at_least=1, **where)
    return selected, {
        "kl_cov/covariance": TokenMean(scores, mask & scores.isfinite()),
        "kl_cov/covariance_selected": TokenMean(scores, selected & scores.isfinite()),
    }


def on_rollout(rollout: Rollout, context: Context, state: None) -> tuple[Mapping[str, Tensor], Metrics]:
    if context.settings.kl_cov_selection == "micro_batch" or rollout.old_logps is None:
        return {}, {}
    mask = rollout.mask
    advantages = per_token(rollout.advantages, mask)
    scores = covariance(advantages, rollout.old_logps, mask, context.sum_over_processes)
    selected, metrics = _select(scores, mask, context, gather=context.gather)
    return {"kl_cov_selected": selected}, metrics


def shape(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: None) -> tuple[PolicyTokens, Metrics]:
    settings, metrics = context.settings, dict[str, TokenMean]()
    if settings.kl_cov_selection == "micro_batch":
        raw = batch.tokens
        scores = covariance(raw.advantages, raw.logps, raw.mask)
        selected, counted = _select(scores, raw.mask, context, gather=lambda flat: flat, rank=0)
        metrics |= counted
    else:
        selected = rollout_column(batch.columns, "kl_cov_selected", "kl_cov_selection='rollout'")
    shaped, counted = kl_cov(
        tokens,
        batch.log_weight,
        selected,
        coef=settings.kl_cov_coef,
        ppo_clip=settings.kl_cov_ppo_clip,
        eps_low=context.eps_low,
        eps_high=context.eps_high,
        delta=context.delta,
    )
    return shaped, metrics | counted


KL_COV = Control(
    name="KL-Cov",
    prefix="kl_cov",
    summary="The tokens of a rollout whose log-prob and advantage covary most pay a penalty on how far they have "
    "moved, `beta |lp - lp_old|`; the others have no PPO-clip.",
    published="1, 0.002 (7B) or 0.0002 (32B)",
    paper="The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
    arxiv="2505.22617",
    fields=("kl_cov_coef", "kl_cov_fraction", "kl_cov_selection", "kl_cov_ppo_clip"),
    check=check,
    acts_on_policy=False,
    loss_types=PPO_CLIP_LOSSES,
    loss_reason="which is not the importance ratio times the advantage",
    levels=("token",),
    level_reason="and it penalises single tokens",
    replaces_ppo_clip=True,
    needs_rollout_pass=lambda config: config.kl_cov_selection == "rollout",
    rollout_settings=("kl_cov_fraction", "kl_cov_selection"),
    on_rollout=on_rollout,
    shape=shape,
    metrics=(
        Metric(
            "penalised_fraction",
            "share of tokens",
            "selected tokens whose log-prob has moved",
            "0 at a rollout's first step, then `kl_cov_fraction`",
        ),
        Metric(
            "penalty",
            "nats",
            "mean `abs(lp - lp_old)` of the selected tokens",
            "small and steady; growing: raise `kl_cov_coef`",
        ),
        Metric(
            "ppo_clip_fraction",
            "share of tokens",
            "tokens that PPO-clip drops with `kl_cov_ppo_clip`",
            "0 without it, else near the `ppo_clip` fractions",
        ),
        Metric(
            "covariance",
            "nats",
            "covariance of advantage and log-prob over the tokens",
            "above 0 and falling as the entropy does",
        ),
        Metric(
            "covariance_selected",
            "nats",
            "mean covariance of the selected tokens",
            "far above `kl_cov/covariance`: few tokens carry it",
        ),
    ),
    marks=(
        Mark(
            "kl_cov_penalised",
            "K",
            "penalised by KL-Cov",
            "among the largest covariances: KL-Cov penalises its drift from the rollout policy",
            ("#e6dcf7", "3px solid", "#5a2ca0"),
            "kl_cov/penalised_fraction",
        ),
        Mark(
            "kl_cov_ppo_clipped",
            "P",
            "dropped by PPO-clip",
            "outside the trust region and not selected by KL-Cov: dropped by PPO-clip",
            ("#e4e4e4", "3px dashed", "#444"),
            "kl_cov/ppo_clip_fraction",
        ),
    ),
    figures=(
        Figure(
            "kl_cov",
            "Covariance of log-prob and advantage, and KL-Cov's penalty",
            (
                Panel("all tokens (nats)", ("kl_cov/covariance",)),
                Panel("selected (nats)", ("kl_cov/covariance_selected",)),
                Panel("their drift (nats)", ("kl_cov/penalty",)),
            ),
            "Healthy: the selected tokens' covariance is far above the mean, and their drift small and steady; one "
            "that grows calls for a larger kl_cov_coef or fewer updates per rollout.",
        ),
    ),
    remedies=(("entropy_collapse", "kl_cov_coef=1"),),
    counts=("kl_cov/penalised_fraction",),
    drops=(("kl_cov/ppo_clip_fraction",), "a larger epsilon, or kl_cov_ppo_clip=False"),
)
