"""FIPO: a token counts by what the update does to the tokens after it (arXiv 2603.19835)."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_between, check_positive, check_shapes, is_number
from .control import LINEAR_LOSSES, Context, Control, Figure, Mark, Metric, Metrics, MicroBatch, Panel
from .tokens import PolicyTokens, TokenMean

SAFE_WEIGHTS = (0.8, 1.0)
"""The released code's bounds for tokens with a negative advantage that have become much more probable."""


@dataclass
class FIPOFields:
    """The fields of FIPO (arXiv 2603.19835).

    Args:
        fipo_half_life (`float`, *optional*):
            How many tokens ahead a change of log-prob counts half, above 0. Published: 32; the released code's default
            is 12.
        fipo_clip_range (`float`, *optional*, defaults to `0.2`):
            How far a weight may be from 1, in [0, 1]. Published: 0.2.
        fipo_raise_only (`bool`, *optional*, defaults to `True`):
            Whether weights lie in `[1, 1 + range]`; else in `[1 - range, 1 + range]`. Published: both.
        fipo_max_ratio (`float`, *optional*, defaults to `10.0`):
            Tokens whose importance ratio is above it do not count for the tokens before them, above 1. Published: 10.
        fipo_safe_ratio (`float`, *optional*, defaults to `4.0`):
            A token with a negative advantage and an importance ratio above it, above 1, has its weight clipped to
            [0.8, 1]. Published: 4.
    """

    fipo_half_life: float | None = field(
        default=None, metadata={"help": "FIPO: tokens ahead at which a change of log-prob counts half. Published: 32."}
    )
    fipo_clip_range: float = field(
        default=0.2, metadata={"help": "FIPO: how far a weight may be from 1. Published: 0.2."}
    )
    fipo_raise_only: bool = field(default=True, metadata={"help": "FIPO: whether no weight is below 1."})
    fipo_max_ratio: float = field(
        default=10.0, metadata={"help": "FIPO: tokens with a larger importance ratio do not count. Published: 10."}
    )
    fipo_safe_ratio: float = field(
        default=4.0,
        metadata={"help": "FIPO: above this importance ratio, a token with A < 0 is not raised. Published: 4."},
    )

    @property
    def fipo_enabled(self) -> bool:
        return self.fipo_half_life is not None


def check(config: Any) -> None:
    """Refuse values that FIPO cannot work with."""
    if config.fipo_half_life is not None:
        check_positive(config, "fipo_half_life", "32")
    check_between(config, "fipo_clip_range", 0.0, 1.0, "0.2")
    if not isinstance(config.fipo_raise_only, bool):
        raise ValueError(f"fipo_raise_only={config.fipo_raise_only!r} must be True or False.")
    for name, published in (("fipo_max_ratio", 10), ("fipo_safe_ratio", 4)):
        value = getattr(config, name)
        if not (is_number(value) and value > 1.0):
            raise ValueError(f"{name}={value!r} must be above 1, the ratio of no change. Published: {published}.")


def discounted_future_sum(values: Tensor, discount: float) -> Tensor:
    """`sum_{k >= t} discount^(k - t) values_k` along the last axis, `(B, T)`, in `log2(T)` steps."""
    total, step = values, 1
    while step < values.shape[-1]:
        total = total + discount**step * torch.nn.functional.pad(total[..., step:], (0, step))
        step *= 2
    return total


def fipo(
    tokens: PolicyTokens,
    log_weight: Tensor,
    *,
    half_life: float,
    clip_range: float,
    raise_only: bool,
    max_ratio: float,
    safe_ratio: float,
) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """Weight each token by the discounted change of the log-probs from it on (arXiv 2603.19835).

    With `gamma = 2^(-1 / half_life)` and `m_k` 1 for the model's tokens whose importance ratio is at most `max_ratio`,

        F_t = sum_{k >= t} gamma^(k - t) m_k (lp_k - lp_old_k)
        f_t = clip(exp F_t, low, 1 + range),  low = 1 with `raise_only`, else 1 - range

    and for `A < 0` with a ratio above `safe_ratio`, `f` is clipped to [0.8, 1] besides. The token's clipped policy
    loss is multiplied by `f`, without a gradient: exactly its advantage becomes `f A`. What the policy is moving
    towards is followed more decidedly, from its first token on.

    The text of the paper was not at hand: formula and settings are those of a port of the released code and of another
    library's documentation, which agree. The released code also leaves out of the loss whole sequences with more than
    one token that its dual clip drops; here they stay, and TRL's `delta` drops those tokens alone.

    Args:
        tokens: The micro-batch.
        log_weight: `lp - lp_old`, as no control has shaped it, `(B, T)`.
        half_life: Tokens, above 0.
        clip_range: In [0, 1].
        raise_only: Whether no weight is below 1.
        max_ratio: Above 1.
        safe_ratio: Above 1.

    Returns:
        The micro-batch with shaped `advantages`, and the metrics.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(mask=(tokens.mask, "B T"), log_weight=(log_weight, "B T"))
    counted = tokens.mask & (log_weight <= math.log(max_ratio))
    future = discounted_future_sum(torch.where(counted, log_weight, 0.0), 2.0 ** (-1.0 / half_life))
    weight = future.exp().clamp(1.0 if raise_only else 1.0 - clip_range, 1.0 + clip_range)
    unsafe = (tokens.advantages < 0) & (log_weight > math.log(safe_ratio))
    weight = torch.where(unsafe, weight.clamp(*SAFE_WEIGHTS), weight)
    return replace(tokens, advantages=weight * tokens.advantages), {
        "fipo/weight": TokenMean(weight, tokens.mask),
        "fipo/future": TokenMean(future, tokens.mask),
        "fipo/raised_fraction": TokenMean(weight > 1.0, tokens.mask),
        "fipo/lowered_fraction": TokenMean(weight < 1.0, tokens.mask),
        "fipo/ignored_fraction": TokenMean(~counted, tokens.mask),
        "fipo/unsafe_fraction": TokenMean(unsafe, tokens.mask),
    }


def shape(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: None) -> tuple[PolicyTokens, Metrics]:
    settings = context.settings
    return fipo(
        tokens,
        batch.log_weight,
        half_life=settings.fipo_half_life,
        clip_range=settings.fipo_clip_range,
        raise_only=settings.fipo_raise_only,
        max_ratio=settings.fipo_max_ratio,
        safe_ratio=settings.fipo_safe_ratio,
    )


FIPO = Control(
    name="FIPO",
    prefix="fipo",
    summary="A token counts more where the update makes the tokens after it more probable.",
    published="32, 0.2, both, 10, 4",
    paper="FIPO: Eliciting Deep Reasoning with Future-KL Influenced Policy Optimization",
    arxiv="2603.19835",
    fields=("fipo_half_life", "fipo_clip_range", "fipo_raise_only", "fipo_max_ratio", "fipo_safe_ratio"),
    check=check,
    acts_on_policy=False,
    loss_types=LINEAR_LOSSES,
    loss_reason="whose weights couple the tokens of a sequence",
    levels=("token",),
    level_reason="which mixes the weights of a sequence's tokens, and FIPO's are per token",
    shape=shape,
    metrics=(
        Metric("weight", "-", "mean weight of the tokens", "1 at a rollout's first step, then a little above"),
        Metric("future", "nats", "mean of `F`, the discounted change of the log-probs ahead", "near 0"),
        Metric("raised_fraction", "share of tokens", "tokens whose weight is above 1", "about a half"),
        Metric("lowered_fraction", "share of tokens", "tokens whose weight is below 1", "0 with `fipo_raise_only`"),
        Metric("ignored_fraction", "share of tokens", "tokens whose ratio is above `fipo_max_ratio`", "near 0"),
        Metric("unsafe_fraction", "share of tokens", "`A < 0` and ratio above `fipo_safe_ratio`", "near 0"),
    ),
    marks=(
        Mark(
            "fipo_raised",
            "U",
            "raised by FIPO",
            "what follows has become more probable: weighted above 1 by FIPO",
            ("#e9e4f7", "1px dashed", "#5a3d9e"),
            "fipo/raised_fraction",
        ),
    ),
    figures=(
        Figure(
            "fipo",
            "Weights of FIPO",
            (Panel("mean weight", ("fipo/weight",)), Panel("F (nats)", ("fipo/future",))),
            "Healthy: the mean weight stays a little above 1; at 1 + fipo_clip_range for most tokens, F is too large "
            "to tell tokens apart, and fewer updates per rollout or a smaller fipo_half_life help.",
        ),
    ),
)
