"""Clip-Cov: a few tokens of large covariance, drawn at random, get no gradient (arXiv 2505.22617)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_between, check_shapes, is_number
from .control import (
    LINEAR_LOSSES,
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
from .health import Finding, LogHistory, enough
from .importance import clipped_by_ppo, ratio_of
from .selection import global_uniform, lowest_fraction
from .tokens import PolicyTokens, TokenMean


@dataclass
class ClipCovFields:
    """The fields of Clip-Cov (arXiv 2505.22617).

    Args:
        clip_cov_fraction (`float`, *optional*, defaults to `0.0`):
            Share of the valid tokens that are dropped, at least one, in [0, 1]; 0 is off. Published: 0.0002, with
            `epsilon=1`, so that PPO-clip only acts on ratios above 2.
        clip_cov_low (`float`, *optional*, defaults to `1.0`):
            They are drawn from the tokens whose covariance is above this bound. It is absolute, and so presumes
            advantages of unit variance (`scale_rewards`). Published: 1.
        clip_cov_high (`float`, *optional*, defaults to `5.0`):
            And below this one, above `clip_cov_low`. Published: 5.
        clip_cov_selection (`str`, *optional*, defaults to `"rollout"`):
            `"rollout"` draws once per rollout, over the global batch, by the rollout policy's log-probs: what the
            authors say the paper means. `"micro_batch"` is the released code's: within each micro-batch of a process,
            by the current log-probs, among the tokens that PPO-clip has not dropped, so that the batch size decides
            which tokens are compared and, by the minimum of one, how many are dropped. A token's lot there is drawn
            once per rollout and kept through `num_iterations`. The choice waits for the device at every micro-batch.
    """

    clip_cov_fraction: float = field(
        default=0.0, metadata={"help": "Clip-Cov: share of tokens to drop; 0 is off. Published: 0.0002."}
    )
    clip_cov_low: float = field(
        default=1.0, metadata={"help": "Clip-Cov: drop tokens with a covariance above this. Published: 1."}
    )
    clip_cov_high: float = field(default=5.0, metadata={"help": "Clip-Cov: and below this. Published: 5."})
    clip_cov_selection: str = field(
        default="rollout",
        metadata={"help": "Clip-Cov: compare the tokens of a rollout, or of a micro_batch as the released code does."},
    )

    @property
    def clip_cov_enabled(self) -> bool:
        return self.clip_cov_fraction != 0.0


def check(config: Any) -> None:
    """Refuse values that Clip-Cov cannot work with."""
    check_between(config, "clip_cov_fraction", 0.0, 1.0, "0.0002; 0 is off")
    low, high = config.clip_cov_low, config.clip_cov_high
    if not (is_number(low) and is_number(high) and low < high):
        raise ValueError(
            f"clip_cov_low={low} and clip_cov_high={high} must be numbers with clip_cov_low < clip_cov_high. "
            "Published: 1 and 5."
        )
    check_selection(config, "clip_cov_selection")
    clip_free = getattr(config, "kl_cov_enabled", False) and not config.kl_cov_ppo_clip
    if (
        config.clip_cov_enabled
        and config.clip_cov_selection == "micro_batch"
        and (clip_free or getattr(config, "dppo_enabled", False))
    ):
        raise ValueError(
            "clip_cov_selection='micro_batch' draws among the tokens that PPO-clip keeps, and dppo_divergence, or "
            "kl_cov_coef with kl_cov_ppo_clip=False, takes PPO-clip's place. Set clip_cov_selection='rollout'."
        )


def clip_cov(
    covariances: Tensor, lots: Tensor, mask: Tensor, *, fraction: float, low: float, high: float, **where: Any
) -> tuple[Tensor, dict[str, TokenMean]]:
    """The tokens that Clip-Cov drops (arXiv 2505.22617).

    Of the `N` valid tokens, `max(1, floor(fraction N))` are drawn uniformly without replacement from those with
    `low < cov < high`, or all of these if they are fewer. Their policy loss has neither value nor gradient, and they
    still count in its denominator.

    The formulas are the released code's; the text of the paper could not be compared.

    Args:
        covariances: From `covariance`, `(B, T)`.
        lots: Uniform random numbers in [0, 1), `(B, T)`, of which the smallest are drawn; 1 for a token that is not
            to be drawn.
        mask: True for valid tokens, bool `(B, T)`.
        fraction: In (0, 1].
        low: Lower bound.
        high: Upper bound.
        **where: `gather` and `rank` of `lowest_fraction`: over which tokens.

    Returns:
        Bool `(B, T)`, and the metrics.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(mask=(mask, "B T"), covariances=(covariances, "B T"), lots=(lots, "B T"))
    candidates = mask & (lots < 1) & (covariances > low) & (covariances < high)
    lots = lots.masked_fill(~candidates, torch.inf)
    dropped = candidates & lowest_fraction(lots, mask, fraction, at_least=1, **where)
    return dropped, {
        "clip_cov/candidate_fraction": TokenMean(candidates, mask),
        "clip_cov/covariance": TokenMean(covariances, mask & covariances.isfinite()),
        "clip_cov/covariance_dropped": TokenMean(covariances, dropped),
    }


def _settings(context: Context) -> dict[str, float]:
    settings = context.settings
    bounds = {"low": settings.clip_cov_low, "high": settings.clip_cov_high}
    return {"fraction": settings.clip_cov_fraction, **bounds}


def on_rollout(rollout: Rollout, context: Context, state: None) -> tuple[Mapping[str, Tensor], Metrics]:
    mask = rollout.mask
    # by rollout rather than from where the last draw ended: a resumed run draws what an uninterrupted one does
    generator = torch.Generator().manual_seed(context.settings.seed * 1_000_003 + context.step)
    lots = global_uniform(mask, generator, context.gather)
    if context.settings.clip_cov_selection == "micro_batch":
        return {"clip_cov_lots": lots}, {}
    if rollout.old_logps is None:
        return {}, {}
    advantages = per_token(rollout.advantages, mask)
    covariances = covariance(advantages, rollout.old_logps, mask, context.sum_over_processes)
    dropped, metrics = clip_cov(covariances, lots, mask, **_settings(context), gather=context.gather)
    return {"clip_cov_dropped": dropped}, metrics


def _drop_of_micro_batch(batch: MicroBatch, context: Context) -> tuple[Tensor, Metrics]:
    """The released code's choice: by current log-probs, among the tokens that PPO-clip keeps."""
    raw = batch.tokens
    lots = rollout_column(batch.columns, "clip_cov_lots", "clip_cov_selection='micro_batch'")
    covariances = covariance(raw.advantages, raw.logps, raw.mask)
    if context.settings.loss_type in PPO_CLIP_LOSSES:
        low, high = clipped_by_ppo(ratio_of(batch.log_weight), raw.advantages, context.eps_low, context.eps_high)
        lots = lots.masked_fill(low | high, 1.0)
    return clip_cov(covariances, lots, raw.mask, **_settings(context), gather=lambda flat: flat, rank=0)


def shape(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: None) -> tuple[PolicyTokens, Metrics]:
    metrics: Metrics = {}
    if context.settings.clip_cov_selection == "micro_batch":
        dropped, metrics = _drop_of_micro_batch(batch, context)
    else:
        dropped = rollout_column(batch.columns, "clip_cov_dropped", "clip_cov_selection='rollout'")
    shaped = replace(tokens, advantages=torch.where(dropped, 0.0, tokens.advantages))
    return shaped, {**metrics, "clip_cov/clip_fraction": TokenMean(dropped, tokens.mask)}


def nothing_between_the_bounds(log_history: LogHistory) -> Finding | None:
    """No token's covariance was ever between Clip-Cov's bounds."""
    candidates = enough(log_history, "clip_cov/candidate_fraction")
    if not candidates or any(candidates):
        return None
    return Finding(
        "nothing_between_the_bounds",
        "Clip-Cov never acted: no token's covariance was between clip_cov_low and clip_cov_high.",
        "The bounds presume advantages of unit variance: set scale_rewards='group', or a smaller clip_cov_low.",
    )


CLIP_COV = Control(
    name="Clip-Cov",
    prefix="clip_cov",
    summary="A few tokens of large covariance of log-prob and advantage, drawn at random, get no gradient. "
    "Published with `epsilon` 1.",
    published="0.0002, 1, 5",
    paper="The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
    arxiv="2505.22617",
    fields=("clip_cov_fraction", "clip_cov_low", "clip_cov_high", "clip_cov_selection"),
    check=check,
    loss_types=LINEAR_LOSSES,
    loss_reason="whose weights couple the tokens of a sequence",
    levels=("token",),
    level_reason="and it drops single tokens",
    needs_rollout_pass=lambda config: config.clip_cov_selection == "rollout",
    rollout_settings=("clip_cov_fraction", "clip_cov_low", "clip_cov_high", "clip_cov_selection"),
    on_rollout=on_rollout,
    shape=shape,
    metrics=(
        Metric("clip_fraction", "share of tokens", "tokens that Clip-Cov drops", "`clip_cov_fraction`"),
        Metric(
            "candidate_fraction",
            "share of tokens",
            "tokens whose covariance is between `clip_cov_low` and `clip_cov_high`",
            "above `clip_cov_fraction`, else all of them are dropped",
        ),
        Metric(
            "covariance",
            "nats",
            "covariance of advantage and log-prob over the tokens",
            "above 0 and falling as the entropy does",
        ),
        Metric(
            "covariance_dropped",
            "nats",
            "mean covariance of the dropped tokens",
            "far above `clip_cov/covariance`: few tokens carry it",
        ),
    ),
    marks=(
        Mark(
            "clip_cov_dropped",
            "C",
            "dropped by Clip-Cov",
            "of large covariance and drawn by Clip-Cov: no gradient",
            ("#f3e3d3", "3px dotted", "#7a4a12"),
            "clip_cov/clip_fraction",
        ),
    ),
    figures=(
        Figure(
            "clip_cov",
            "Covariance of log-prob and advantage, and what Clip-Cov drops",
            (
                Panel("all tokens (nats)", ("clip_cov/covariance",)),
                Panel("dropped (nats)", ("clip_cov/covariance_dropped",)),
                Panel("candidates (share)", ("clip_cov/candidate_fraction",)),
            ),
            "Healthy: the dropped tokens' covariance is far above the mean; with no candidates the bounds do not fit "
            "the scale of the advantages.",
        ),
    ),
    rules=(nothing_between_the_bounds,),
    remedies=(("entropy_collapse", "clip_cov_fraction=0.0002 with epsilon=1"),),
    drops=(("clip_cov/clip_fraction",), "a smaller clip_cov_fraction"),
)
