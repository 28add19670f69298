"""ERC: clipping by the entropy ratio of the new and the old policy (arXiv 2512.05591)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_not_negative, check_shapes
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
    TokenView,
)
from .entropy_ratios import ENTROPY_FLOOR, entropy_ratio, inside_bounds
from .erc_rounding import clip_is_rounding, on_repeat
from .erc_target import BoundPower, bounds_now, check_target
from .tokens import PolicyTokens, TokenMean

SIDES = ("both", "outward")


@dataclass
class ERCFields:
    """The fields of ERC (arXiv 2512.05591).

    Args:
        erc_low (`float`, *optional*):
            A token keeps its policy gradient only while its entropy ratio `(H + 1e-8) / (H_old + 1e-8)` is above this
            bound, in [0, 1). Set with `erc_high`. Published: 0.95.
        erc_high (`float`, *optional*):
            And only while the ratio is below this bound, above 1. Published: 1.05.
        erc_entropy_floor (`float`, *optional*, defaults to `1e-8`):
            What is added to both entropies of the ratio, nats, at least 0. Published: 1e-8. A larger one lets tokens
            of less entropy than that change freely, whose ratio is mostly rounding in bfloat16.
        erc_side (`str`, *optional*, defaults to `"both"`):
            Which tokens outside the bounds are dropped: `"both"` for all of them (the paper), or `"outward"` for those
            whose own gradient would move the entropy further out, to first order (see `erc`; not in the paper).
        erc_target_fraction (`float`, *optional*):
            Share of the tokens to be clipped, in (0, 1) (not in the paper, which reports 0.2 with fixed bounds). After
            every rollout both bounds are raised to one power, so that they move symmetrically on a log scale: wider
            where more tokens were clipped than this, narrower where fewer were. They start at `erc_low` and
            `erc_high`, and are in the checkpoints of `EntropyGRPOTrainer`. Off if not set.
    """

    erc_low: float | None = field(
        default=None, metadata={"help": "ERC: lower bound of the entropy ratio, in [0, 1). Published: 0.95."}
    )
    erc_high: float | None = field(
        default=None, metadata={"help": "ERC: upper bound of the entropy ratio, above 1. Published: 1.05."}
    )
    erc_entropy_floor: float = field(
        default=ENTROPY_FLOOR,
        metadata={"help": "ERC: added to both entropies of the ratio, nats. Published: 1e-8."},
    )
    erc_side: str = field(
        default="both", metadata={"help": "ERC: drop all tokens outside the bounds (both), or those going outward."}
    )
    erc_target_fraction: float | None = field(
        default=None, metadata={"help": "ERC: share of tokens to be clipped, for which the bounds move. Try 0.2."}
    )

    @property
    def erc_enabled(self) -> bool:
        return self.erc_low is not None

    @property
    def erc_bounds(self) -> tuple[float, float] | None:
        """`(low, high)`, or `None` where ERC is off."""
        low, high = self.erc_low, self.erc_high
        return None if low is None or high is None else (low, high)


def check(config: Any) -> None:
    """Refuse values that ERC cannot work with."""
    low, high = config.erc_low, config.erc_high
    check_not_negative(config, "erc_entropy_floor", "1e-8")
    if config.erc_side not in SIDES:
        raise ValueError(f"erc_side={config.erc_side!r} is unknown. Choose one of {', '.join(SIDES)}.")
    check_target(config.erc_target_fraction, low, high)
    if low is None and high is None:
        return
    if low is None or high is None:
        raise ValueError(f"erc_low={low} and erc_high={high}: set both (published: 0.95 and 1.05) or neither.")
    if not 0.0 <= low < 1.0:
        raise ValueError(f"erc_low={low} must be in [0, 1): an entropy ratio of 1 is no change. Published: 0.95.")
    if not high > 1.0:
        raise ValueError(f"erc_high={high} must be above 1: an entropy ratio of 1 is no change. Published: 1.05.")
    shared_ratio = getattr(config, "importance_sampling_level", "token") == "sequence" and config.loss_type != "cispo"
    if shared_ratio and config.beta != 0.0 and config.use_bias_correction_kl:
        raise ValueError(
            f"beta={config.beta} with use_bias_correction_kl=True multiplies the KL term by the importance ratio of "
            "the sequence, in which ERC makes constants of the tokens it clips. Set use_bias_correction_kl=False, "
            "or beta=0."
        )


def erc(
    tokens: PolicyTokens,
    entropies: Tensor,
    old_entropies: Tensor,
    *,
    low: float,
    high: float,
    floor: float = ENTROPY_FLOOR,
    side: str = "both",
    sequence_ratio: bool = False,
) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """Keep a token's policy gradient iff `low < rho < high` (arXiv 2512.05591).

    A clipped token's advantage becomes 0, so its term of the policy loss has neither value nor gradient; KL and
    entropy terms are not touched. (The released code detaches the term instead, which leaves its value in the reported
    loss; the gradient is the same.)

    With one differentiable ratio for a whole sequence (GSPO), every token's term moves every token of it, so a term
    left out would still leave a gradient on the clipped token. There the token is `frozen` instead: its log-prob is a
    constant in the sequence's ratio and its advantage stays. With one advantage per sequence these are the gradients
    of GSPO-token (arXiv 2507.18071, eq. 13) with the authors' gate on each token's term; with an advantage per token,
    a kept token's weight is the mean over the sequence, as in GSPO without ERC.

    With `side="outward"`, which is not in the paper, a token outside the bounds is kept if its own gradient brings
    its entropy back. A step along `A grad lp` changes the entropy of the token's state, to first order and as far as
    the sampled token alone tells, by a positive multiple of `-A (lp + H)` (the token's term of the covariance in arXiv
    2505.22617, theorem 1): raising a token that is more probable than its state's tokens are on average, `lp > -H`,
    sharpens the distribution. So above `high` a token is dropped if `A (lp + H) < 0`, below `low` if it is above 0.

    Args:
        tokens: The micro-batch.
        entropies: Nats, `(B, T)`.
        old_entropies: Nats, `(B, T)`.
        low: Lower bound of the entropy ratio, in [0, 1).
        high: Upper bound, above 1.
        floor: Of `entropy_ratio`, nats.
        side: `"both"` or `"outward"`.
        sequence_ratio: Whether the tokens of a sequence share one importance ratio that carries their gradient.

    Returns:
        The micro-batch with shaped `advantages`, or `frozen` tokens with `sequence_ratio`, and the metrics.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(mask=(tokens.mask, "B T"), entropies=(entropies, "B T"), old_entropies=(old_entropies, "B T"))
    ratio = entropy_ratio(entropies, old_entropies, floor)
    below, above, kept = ratio <= low, ratio >= high, inside_bounds(ratio, low, high)
    if side == "outward":
        sharpens = tokens.advantages * (tokens.logps.detach() + entropies.detach())
        kept = kept | (below & ~(sharpens > 0)) | (above & ~(sharpens < 0))
    if sequence_ratio:
        shaped = replace(tokens, frozen=tokens.mask & ~kept)
    else:
        shaped = replace(tokens, advantages=torch.where(kept, tokens.advantages, 0.0))
    clipped, current = tokens.mask & ~kept, entropies.detach()
    return shaped, {
        "erc/clip_fraction": TokenMean(clipped, tokens.mask),
        "erc/low_fraction": TokenMean(below & ~kept, tokens.mask),
        "erc/high_fraction": TokenMean(above & ~kept, tokens.mask),
        "erc/entropy_clipped": TokenMean(current, clipped),
        "erc/entropy_kept": TokenMean(current, tokens.mask & kept),
    }


def shape(
    batch: MicroBatch, tokens: PolicyTokens, context: Context, state: BoundPower | None
) -> tuple[PolicyTokens, Metrics]:
    settings = context.settings
    low, high = bounds_now(settings, state)
    if batch.old_entropies is None:
        raise ValueError(
            "ERC needs the rollout's entropies: the micro-batch has `old_per_token_logps` and no "
            "`old_entropies`. Let the trainer make the rollout, or add them."
        )
    shaped, metrics = erc(
        tokens,
        batch.entropies,
        batch.old_entropies,
        low=low,
        high=high,
        floor=settings.erc_entropy_floor,
        side=settings.erc_side,
        sequence_ratio=context.level == "sequence" and not context.constant_ratio,
    )
    if state is None:
        return shaped, metrics
    if context.training:
        state.add(metrics["erc/clip_fraction"])
    bounds = (("erc/bound_low", low), ("erc/bound_high", high))
    return shaped, metrics | {
        name: TokenMean(torch.full((), value, device=tokens.mask.device), tokens.mask) for name, value in bounds
    }


def on_rollout(rollout: Rollout, context: Context, state: "BoundPower | None") -> tuple[Mapping[str, Tensor], Metrics]:
    if state is not None and context.training:
        state.finish_rollout(context.settings.erc_target_fraction, context.sum_over_processes)
    return {}, {}


CLIPPED = (("erc_clipped", "clipped"),)

ERC = Control(
    name="ERC",
    prefix="erc",
    summary="A token keeps its policy gradient only while the ratio of its new to its old entropy lies between "
    "the two bounds.",
    published="0.95, 1.05, 1e-8",
    paper="Entropy Ratio Clipping as a Soft Global Constraint for Stable Reinforcement Learning",
    arxiv="2512.05591",
    fields=("erc_low", "erc_high", "erc_entropy_floor", "erc_side", "erc_target_fraction"),
    switch="`erc_low`, `erc_high`",
    check=check,
    acts_on_policy=False,
    loss_types=LINEAR_LOSSES,
    loss_reason="whose weights couple the tokens of a sequence",
    needs_old_entropies=True,
    state=lambda config: None if config.erc_target_fraction is None else BoundPower(),
    on_rollout=on_rollout,
    shape=shape,
    on_repeat=on_repeat,
    metrics=(
        Metric(
            "clip_fraction",
            "share of tokens",
            "tokens that ERC clips: their entropy ratio is outside `(erc_low, erc_high)`",
            "0 at a rollout's first step; about 0.2 on average in the paper; above 0.5, the steps are too large",
        ),
        Metric(
            "low_fraction",
            "share of tokens",
            "of those, entropy fell",
            "about as many as rose; many more: entropy is collapsing",
        ),
        Metric(
            "high_fraction",
            "share of tokens",
            "of those, entropy rose",
            "about as many as fell; many more: entropy is exploding",
        ),
        Metric(
            "entropy_clipped",
            "nats",
            "mean entropy of the tokens that ERC clips",
            "below `erc/entropy_kept` in the paper, which clips mostly confident tokens",
        ),
        Metric("entropy_kept", "nats", "mean entropy of the others", "near `entropy`"),
        Metric(
            "rounding_fraction",
            "share of tokens",
            "with `erc_side` `both`: tokens outside the bounds between two forward passes with the same weights, the "
            "second padded otherwise, on 1 of 32 completions before their first update (a process with fewer a "
            "rollout skips rollouts): what `erc/clip_fraction` would be if nothing but rounding changed. Not for "
            "models with learned positions or images",
            "below a quarter of `erc/clip_fraction`; about 0 in float32",
        ),
        Metric("bound_low", "-", "lower bound of the entropy ratio, where `erc_target_fraction` moves it", "settles"),
        Metric("bound_high", "-", "upper bound, likewise", "settles"),
    ),
    marks=(
        Mark(
            "erc_clipped",
            "E",
            "clipped by ERC",
            "clipped by ERC: no gradient",
            ("#ffe0c2", "3px solid", "#b34700"),
            "erc/clip_fraction",
        ),
    ),
    figures=(
        Figure(
            "erc",
            "Tokens clipped by ERC",
            (Panel("fraction of tokens", ("erc/clip_fraction",)),),
            "Healthy: about 0.2 in the paper; near 0 the bounds do nothing, above 0.5 most of the rollout is thrown "
            "away and the learning rate or the number of updates per rollout is too large.",
            from_zero=True,
        ),
        Figure(
            "erc_entropy",
            "Entropy of the tokens that ERC clips and keeps",
            (Panel("clipped (nats)", ("erc/entropy_clipped",)), Panel("kept (nats)", ("erc/entropy_kept",))),
            "Healthy: the clipped tokens have lower entropy (mostly so in the paper) or about the same; if it is far "
            "higher, ERC holds back the tokens that explore.",
        ),
    ),
    token_views=(
        TokenView(
            "token_entropy_ratio",
            "Entropy ratio",
            "histogram",
            "entropy_ratio",
            "Healthy: a peak at 1 with thin tails; dotted: ERC's bounds (where they began, if erc_target_fraction "
            "moves them), the published ones where ERC is off. Tails that grow fat call for a smaller learning rate "
            "or fewer updates per rollout.",
            guides=(("erc_low", 0.95), ("erc_high", 1.05)),
        ),
        TokenView(
            "token_erc_probability",
            "What ERC clips: probability against entropy ratio",
            "scatter",
            "p_old",
            "Healthy: the clipped tokens (crosses) are mostly probable ones, on the right, whose entropy is small, so "
            "that a small change is a large ratio.",
            y="entropy_ratio",
            flags=CLIPPED,
            guides=(("erc_low", 0.95), ("erc_high", 1.05)),
        ),
        TokenView(
            "token_erc_entropy",
            "Entropy of single tokens, clipped and kept by ERC",
            "split",
            "H",
            "Healthy: the clipped lie further left, at lower entropy, as in the paper; the tokens that explore are "
            "kept.",
            flags=CLIPPED,
        ),
        TokenView(
            "token_erc_region",
            "What ERC clips, in and around the trust region",
            "split",
            "ratio",
            "Healthy: the clipped are wider spread than the kept and crowd towards the trust region's edges (dotted); "
            "those inside are the ones that PPO-clip alone would have let through.",
            flags=CLIPPED,
        ),
    ),
    rules=(clip_is_rounding,),
    remedies=(
        ("entropy_explosion", "erc_low=0.95 and erc_high=1.05"),
        ("entropy_oscillation", "erc_low=0.95 and erc_high=1.05"),
    ),
    counts=("erc/clip_fraction",),
    drops=(("erc/clip_fraction",), "wider erc_low and erc_high"),
)
