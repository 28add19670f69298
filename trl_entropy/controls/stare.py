"""STARE: the most surprising tokens are re-weighted while the entropy is below its target (arXiv 2606.19236)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .checks import check_between, check_not_negative, check_positive, check_shapes, is_number
from .control import (
    LINEAR_LOSSES,
    Context,
    Control,
    Figure,
    Mark,
    Metric,
    Metrics,
    MicroBatch,
    Panel,
    Rollout,
    TargetLoop,
    TokenView,
)
from .covariance import rollout_column
from .health import Finding, LogHistory, enough, window
from .selection import Gather, lowest_fraction
from .steering import rollout_entropy
from .tokens import PolicyTokens, TokenMean

VARIANTS = ("O1", "C2")
STILL_FALLING = 0.9
"""Entropy that lost a tenth from one window to the next while the gate was on all the time is not held."""


@dataclass
class STAREFields:
    """The fields of STARE (arXiv 2606.19236).

    Args:
        stare_target_entropy (`float`, *optional*):
            STARE acts on the rollouts whose mean entropy is below this, nats per token, above 0. Published: 0.3.
        stare_variant (`str`, *optional*, defaults to `"O1"`):
            `"O1"` re-weights the most surprising tokens with a positive advantage, `"C2"` those with a negative one
            too.
        stare_fraction (`float`, *optional*, defaults to `0.1`):
            Share of the tokens of either sign that are the most surprising ones, in (0, 1]. Published: 0.1.
        stare_positive_weight (`float`, *optional*, defaults to `1.1`):
            Weight of those with a positive advantage, at least 1. Published: 1.1, and 1.05 for 14B and 32B.
        stare_negative_weight (`float`, *optional*, defaults to `0.9`):
            Weight of those with a negative advantage, in [0, 1]; `"C2"` alone. Published: 0.9, and 0.95 for 14B and
            32B.
        stare_adaptive_step (`float`, *optional*, defaults to `0.0`):
            The weights move by so much a rollout: away from 1 while the entropy is below its target, else back; 0
            keeps them. Published: 0.01.
        stare_positive_max (`float`, *optional*, defaults to `1.5`):
            How far the positive weight moves, at least `stare_positive_weight`. Published: 1.5.
        stare_negative_min (`float`, *optional*, defaults to `0.5`):
            How far the negative weight moves, in [0, `stare_negative_weight`]. Published: 0.5.
    """

    stare_target_entropy: float | None = field(
        default=None,
        metadata={"help": "STARE: acts while the rollout's mean entropy (nats) is below this. Published: 0.3."},
    )
    stare_variant: str = field(default="O1", metadata={"help": "STARE: O1 (A > 0 alone) or C2 (both signs)."})
    stare_fraction: float = field(
        default=0.1, metadata={"help": "STARE: share of most surprising tokens, in (0, 1]. Published: 0.1."}
    )
    stare_positive_weight: float = field(
        default=1.1, metadata={"help": "STARE: their weight with A > 0, at least 1. Published: 1.1."}
    )
    stare_negative_weight: float = field(
        default=0.9, metadata={"help": "STARE: their weight with A < 0 (C2), in [0, 1]. Published: 0.9."}
    )
    stare_adaptive_step: float = field(
        default=0.0, metadata={"help": "STARE: the weights' step per rollout; 0 keeps them. Published: 0.01."}
    )
    stare_positive_max: float = field(
        default=1.5, metadata={"help": "STARE: largest positive weight of the adaptive schedule. Published: 1.5."}
    )
    stare_negative_min: float = field(
        default=0.5, metadata={"help": "STARE: smallest negative weight of the adaptive schedule. Published: 0.5."}
    )

    @property
    def stare_enabled(self) -> bool:
        return self.stare_target_entropy is not None


def check(config: Any) -> None:
    """Refuse values that STARE cannot work with."""
    if config.stare_variant not in VARIANTS:
        raise ValueError(f"stare_variant={config.stare_variant!r} is unknown. Choose O1 or C2.")
    weight, largest = config.stare_positive_weight, config.stare_positive_max
    if config.stare_target_entropy is not None:
        check_positive(config, "stare_target_entropy", "0.3")
    if not (is_number(config.stare_fraction) and 0.0 < config.stare_fraction <= 1.0):
        raise ValueError(f"stare_fraction={config.stare_fraction!r} must be in (0, 1]. Published: 0.1.")
    if not (is_number(weight) and 1.0 <= weight < math.inf):
        raise ValueError(f"stare_positive_weight={weight!r} must be finite and at least 1. Published: 1.1.")
    check_between(config, "stare_negative_weight", 0.0, 1.0, "0.9")
    check_not_negative(config, "stare_adaptive_step", "0.01; 0 keeps the weights")
    if not (is_number(largest) and weight <= largest < math.inf):
        raise ValueError(
            f"stare_positive_max={largest!r} must be finite and at least stare_positive_weight={weight}. "
            "Published: 1.5."
        )
    check_between(config, "stare_negative_min", 0.0, config.stare_negative_weight, "0.5")


def stare_weights(
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    fraction: float,
    positive_weight: float,
    negative_weight: float,
    gather: Gather = lambda flat: flat,
    rank: int | None = None,
) -> Tensor:
    """What STARE multiplies each token's policy loss with while its gate is on (arXiv 2606.19236).

    With the surprisal `s = -lp_old`, the `ceil(P n)` most surprising of the `n` tokens with `A > 0` get the weight
    `W`, those with `A < 0` likewise `M`, all others 1. A weight of the clipped loss is one of the advantage,
    `A' = w A`. Both raise the entropy: an improbable token that did well is reinforced more, one that did badly is
    pushed down less.

    The tokens are selected over the whole rollout, of all processes, by the policy that is about to be trained. (The
    released code selects in each micro-batch of each process, by the current policy: the same at the first update, but
    for how the rollout is cut into micro-batches.) The paper's text was not at hand: formula and settings are those of
    the released code.

    Args:
        old_logps: Log-probs of the sampled tokens under the rollout's policy, `(B, T)`.
        advantages: `(B,)` or `(B, T)`.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        fraction: `P`, in (0, 1].
        positive_weight: `W`, at least 1.
        negative_weight: `M`, in [0, 1]; 1 is the variant O1.
        gather: Concatenates a 1-D tensor, of one length on all processes, in the order of their ranks.
        rank: This process's place in that order, see `selection.lowest_fraction`.

    Returns:
        `(B, T)`.

    Raises:
        ValueError: If the shapes do not fit.
    """
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    check_shapes(mask=(mask, "B T"), old_logps=(old_logps, "B T"), advantages=(advantages, "B T?"))
    weights = torch.ones_like(old_logps)
    for side, weight in ((advantages > 0, positive_weight), (advantages < 0, negative_weight)):
        if weight != 1.0:
            chosen = lowest_fraction(old_logps, mask & side, fraction, gather, round_up=True, rank=rank)
            weights = torch.where(chosen, weight, weights)
    return weights


class STAREWeights:
    """The weights of STARE's adaptive schedule, the same on all processes.

    Once a rollout, `W <- clip(W + a sgn(H_target - mean H), 1, W_max)` and `M <- clip(M - a sgn(..), M_min, 1)`,
    before they are used for it, as in the released code (whose checkpoints do not hold them).
    """

    def __init__(self, positive: float, negative: float) -> None:
        self.positive, self.negative = positive, negative

    def step(self, entropy: float, settings: Any) -> None:
        """Move by the mean entropy of a rollout, nats."""
        error = settings.stare_target_entropy - entropy
        change = math.copysign(settings.stare_adaptive_step, error) if error else 0.0
        self.positive = min(max(self.positive + change, 1.0), settings.stare_positive_max)
        self.negative = min(max(self.negative - change, settings.stare_negative_min), 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"positive": self.positive, "negative": self.negative}

    def load_state_dict(self, state: dict[str, Any], *, own: bool = True) -> None:
        self.positive, self.negative = state["positive"], state["negative"]


def adaptive_weights(config: Any) -> STAREWeights | None:
    """The state of a configuration: none where the weights stay."""
    if not config.stare_adaptive_step:
        return None
    return STAREWeights(config.stare_positive_weight, config.stare_negative_weight)


def on_rollout(
    rollout: Rollout, context: Context, adaptive: STAREWeights | None
) -> tuple[Mapping[str, Tensor], Metrics]:
    settings, old_logps = context.settings, rollout.old_logps
    entropy = rollout_entropy(rollout, context)
    if old_logps is None:
        raise ValueError(
            "STARE needs the rollout's log-probs, which it does not have. Let the trainer make the rollout."
        )
    positive, negative = settings.stare_positive_weight, settings.stare_negative_weight
    if adaptive is not None:
        if context.training and entropy is not None:
            adaptive.step(entropy, settings)
        positive, negative = adaptive.positive, adaptive.negative
    gate = entropy is not None and entropy < settings.stare_target_entropy
    weights = torch.ones_like(old_logps)
    if gate:
        weights = stare_weights(
            old_logps,
            rollout.advantages,
            rollout.mask,
            fraction=settings.stare_fraction,
            positive_weight=positive,
            negative_weight=negative if settings.stare_variant == "C2" else 1.0,
            gather=context.gather,
        )
    seen = {"gate": float(gate), "positive_weight": positive, "negative_weight": negative}
    if entropy is not None:
        seen |= {"entropy": entropy, "set_point": settings.stare_target_entropy}
    return {"stare_weight": weights}, {
        f"stare/{name}": TokenMean(weights.new_tensor(value), rollout.mask) for name, value in seen.items()
    }


def shape(
    batch: MicroBatch, tokens: PolicyTokens, context: Context, adaptive: STAREWeights | None
) -> tuple[PolicyTokens, Metrics]:
    weights = rollout_column(batch.columns, "stare_weight", "STARE")
    return replace(tokens, advantages=weights * tokens.advantages), {
        "stare/raised_fraction": TokenMean(weights > 1.0, tokens.mask),
        "stare/weakened_fraction": TokenMean(weights < 1.0, tokens.mask),
    }


def stare_does_not_hold(log_history: LogHistory) -> Finding | None:
    """The gate is on all the time, and the entropy goes on falling."""
    gates, entropies = enough(log_history, "stare/gate"), enough(log_history, "stare/entropy")
    size = window(gates, log_history)
    if not gates or not entropies or min(gates[-2 * size :]) < 1.0:
        return None
    before, now = fmean(entropies[-2 * size : -size]), fmean(entropies[-size:])
    if not now < STILL_FALLING * before:
        return None
    return Finding(
        "stare_does_not_hold",
        f"STARE's gate has been on for {2 * size} log entries, and the entropy fell from {before:.3g} to {now:.3g} "
        "nats.",
        "Try stare_adaptive_step=0.01, stare_variant=C2, a larger stare_positive_weight or stare_fraction, or a "
        "smaller learning_rate.",
    )


FIELDS = tuple(one.name for one in fields(STAREFields))

STARE = Control(
    name="STARE",
    prefix="stare",
    summary="While the mean entropy of the rollout is below a target, the most surprising tokens with a positive "
    "advantage are weighted up, and with `C2` those with a negative one down.",
    published="0.3; `O1`; 0.1; 1.1 and 0.9 (14B and 32B: 1.05 and 0.95); 0.01, 1.5, 0.5 where the weights move",
    paper="STARE: Surprisal-guided Token-level Advantage Reweighting for policy Entropy stability",
    arxiv="2606.19236",
    fields=FIELDS,
    check=check,
    loss_types=LINEAR_LOSSES,
    loss_reason="whose weights couple the tokens of a sequence",
    levels=("token",),
    level_reason="whose ratio mixes the weights of a sequence's tokens, and STARE's are each token's own",
    steers_entropy=True,
    target_loop=TargetLoop("stare", lambda target: {"stare_target_entropy": target}),
    needs_old_entropies=True,
    needs_rollout_pass=True,
    rollout_settings=FIELDS,
    state=adaptive_weights,
    on_rollout=on_rollout,
    shape=shape,
    metrics=(
        Metric("set_point", "nats", "the mean entropy below which STARE acts", "constant"),
        Metric(
            "entropy", "nats", "mean entropy of the rollout, before its first update", "near `stare_target_entropy`"
        ),
        Metric("gate", "0 or 1", "whether that is below the target, so that tokens are re-weighted", "now and then 1"),
        Metric("positive_weight", "-", "weight of the raised tokens while the gate is on", "below its bound"),
        Metric("negative_weight", "-", "weight of the weakened tokens (`C2`) likewise", "above its bound"),
        Metric(
            "raised_fraction",
            "share of tokens",
            "most surprising tokens with a positive advantage, whose weight is above 1",
            "`stare_fraction` of those with a positive advantage while the gate is on, else 0",
        ),
        Metric(
            "weakened_fraction",
            "share of tokens",
            "most surprising tokens with a negative advantage, whose weight is below 1 (`C2`)",
            "likewise; 0 with `O1`",
        ),
    ),
    marks=(
        Mark(
            "stare_raised",
            "R",
            "raised by STARE",
            "surprising, A > 0: weighted above 1 by STARE",
            ("#d6f0e0", "1px solid", "#1b6b3a"),
            "stare/raised_fraction",
        ),
        Mark(
            "stare_weakened",
            "N",
            "weakened by STARE",
            "surprising, A < 0: weighted below 1 by STARE",
            ("#f6e3cf", "1px dotted", "#7a4a12"),
            "stare/weakened_fraction",
        ),
    ),
    figures=(
        Figure(
            "stare",
            "STARE: entropy, gate and weight",
            (
                Panel("entropy (nats)", ("stare/entropy",), guides=("stare/set_point",)),
                Panel("gate", ("stare/gate",)),
                Panel("weight of the raised", ("stare/positive_weight",)),
            ),
            "Healthy: the entropy stays around stare_target_entropy (dotted) and the gate goes on and off; a gate "
            "that is on all the time while the entropy falls cannot hold it.",
        ),
    ),
    token_views=(
        TokenView(
            "token_stare_entropy",
            "Entropy of single tokens, raised and left alone by STARE",
            "split",
            "H_old",
            "Healthy: the raised lie further right, at the states where the policy is unsure; far left, they are "
            "slips of a policy that was certain, and a smaller stare_fraction does not help.",
            flags=(("stare_raised", "raised"),),
        ),
    ),
    rules=(stare_does_not_hold,),
    remedies=(("entropy_collapse", "stare_target_entropy=0.3"),),
)
