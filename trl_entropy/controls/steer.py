"""STEER: the more a token would change the entropy, the less it weighs (arXiv 2510.10150)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_shapes, is_number
from .control import LINEAR_LOSSES, Context, Control, Figure, Mark, Metric, Metrics, MicroBatch, Panel, Rollout
from .covariance import per_token, rollout_column
from .importance import ratio_of
from .tokens import PolicyTokens, TokenMean, in_float32

SMALLEST_SCALE = 0.02
"""Nats; the released code's. Where no token would change the entropy by as much, none reaches the lowest weight."""


@dataclass
class STEERFields:
    """The field of STEER (arXiv 2510.10150).

    Args:
        steer_min_weight (`float`, *optional*):
            Weight of the token of a rollout that would change the entropy most, in (0, 1]; off if not set. Published:
            0.8 in the released script; 0.7 in version 4 of the paper, by second-hand accounts.
    """

    steer_min_weight: float | None = field(
        default=None, metadata={"help": "STEER: weight of the token that changes the entropy most. Published: 0.8."}
    )

    @property
    def steer_enabled(self) -> bool:
        return self.steer_min_weight is not None


def check(config: Any) -> None:
    """Refuse values that STEER cannot work with."""
    weight = config.steer_min_weight
    if weight is not None and not (is_number(weight) and 0.0 < weight <= 1.0):
        raise ValueError(f"steer_min_weight={weight} must be in (0, 1]. Published: 0.8 and 0.7.")


def entropy_change(advantages: Tensor, ratio: Tensor, logps: Tensor, entropies: Tensor) -> Tensor:
    """`|O| = |r A (1 - p) (lp + H)|`, a token's estimated change of the entropy (arXiv 2510.10150), without a graph.

    `p = exp(lp)` and `r = p / p_old`. To first order a step along the token's policy gradient changes the entropy by
    this, up to the step size. The power of `1 - p` is the released code's, 1; a name in it says 2, and the text of
    the paper could not be compared. By second-hand accounts the paper also has PPO-clip's indicator as a factor: a
    clipped token has no gradient to weigh, and none is clipped where the scale is taken, so it would change nothing,
    but beside CE-GPPO, which gives clipped tokens a gradient back, and KL-Cov, which has no clip.

    Args:
        advantages: `(B, T)`.
        ratio: Importance ratio, `(B, T)`.
        logps: `(B, T)`.
        entropies: Nats, `(B, T)`.

    Returns:
        Nats, `(B, T)`; infinity where it is not a number, so that such a token has the lowest weight.

    Raises:
        ValueError: If the shapes do not fit.
    """
    given = {"advantages": advantages, "ratio": ratio, "logps": logps, "entropies": entropies}
    check_shapes(**{name: (value, "B T") for name, value in given.items()})
    logps, entropies = in_float32(logps.detach()), in_float32(entropies.detach())
    # 1 - exp(lp), also where lp is near 0
    change = ratio * advantages * -torch.expm1(logps) * (logps + entropies)
    return change.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)


def steer(
    tokens: PolicyTokens, change: Tensor, scale: Tensor, *, min_weight: float
) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """Multiply each token's policy loss by `w = exp(-k |O|)`, in `[min_weight, 1]` (arXiv 2510.10150).

    `k = -ln(min_weight) / max(scale, 0.02)`, so a change as large as `scale` has the weight `min_weight`. A weight on
    the clipped surrogate is one on the advantage.

    Args:
        tokens: The micro-batch.
        change: From `entropy_change`, nats, `(B, T)`.
        scale: Largest `|O|`, nats, 0-dim: of the rollout, where the released code takes each micro-batch's, so that
            the batch size changes the weights.
        min_weight: In (0, 1].

    Returns:
        The micro-batch with shaped `advantages`, and the metrics.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(mask=(tokens.mask, "B T"), change=(change, "B T"), scale=(scale, ""))
    share = (change / scale.clamp(min=SMALLEST_SCALE)).clamp(max=1.0)
    weight = torch.exp(math.log(min_weight) * share)
    shaped = replace(tokens, advantages=(weight * tokens.advantages).to(tokens.advantages.dtype))
    return shaped, {
        "steer/weight": TokenMean(weight, tokens.mask),
        "steer/scale": TokenMean(scale, tokens.mask),
        "steer/lowest_fraction": TokenMean(share == 1.0, tokens.mask),
    }


def on_rollout(rollout: Rollout, context: Context, state: None) -> tuple[Mapping[str, Tensor], Metrics]:
    if rollout.old_logps is None or rollout.old_entropies is None:
        return {}, {}
    advantages = per_token(rollout.advantages, rollout.mask)
    change = entropy_change(advantages, torch.ones_like(rollout.old_logps), rollout.old_logps, rollout.old_entropies)
    counted = rollout.mask & change.isfinite()
    largest = torch.where(counted, change, 0.0).amax().unsqueeze(0)
    return {"steer_scale": context.gather(largest).amax()}, {}


def shape(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: None) -> tuple[PolicyTokens, Metrics]:
    raw, min_weight = batch.tokens, context.settings.steer_min_weight
    scale = rollout_column(batch.columns, "steer_scale", f"steer_min_weight={min_weight}")
    change = entropy_change(raw.advantages, ratio_of(batch.log_weight), raw.logps, batch.entropies)
    return steer(tokens, change, scale, min_weight=min_weight)


STEER = Control(
    name="STEER",
    prefix="steer",
    summary="The more a token would change the entropy, up or down, the less it weighs: between 1 and the smallest "
    "weight.",
    published="0.7 (paper), 0.8 (released script)",
    paper="Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective",
    arxiv="2510.10150",
    fields=("steer_min_weight",),
    check=check,
    loss_types=LINEAR_LOSSES,
    loss_reason="whose weights couple the tokens of a sequence",
    levels=("token",),
    level_reason="and it weighs single tokens",
    needs_old_entropies=True,
    needs_rollout_pass=True,
    on_rollout=on_rollout,
    shape=shape,
    metrics=(
        Metric("weight", "-", "mean weight of a token", "near 1: few tokens change the entropy much"),
        Metric(
            "scale",
            "nats",
            "largest estimated change of the entropy by a token of the rollout",
            "steady; one outlier sets it, and spares all others their weight",
        ),
        Metric(
            "lowest_fraction",
            "share of tokens",
            "tokens with the weight `steer_min_weight`",
            "near 0; rising within a rollout as the policy leaves it",
        ),
    ),
    marks=(
        Mark(
            "steer_lowest",
            "W",
            "lowest weight",
            "would change the entropy most: STEER gives it the lowest weight",
            ("#e0f0ea", "3px dotted", "#1f6b52"),
            "steer/lowest_fraction",
        ),
    ),
    figures=(
        Figure(
            "steer",
            "Weights of STEER",
            (Panel("mean weight", ("steer/weight",)), Panel("largest change (nats)", ("steer/scale",))),
            "Healthy: a mean weight near 1 and a steady scale; a scale that jumps is set by single tokens.",
        ),
    ),
    remedies=(
        ("entropy_collapse", "steer_min_weight=0.8"),
        ("entropy_explosion", "steer_min_weight=0.8"),
    ),
)
