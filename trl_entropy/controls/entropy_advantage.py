"""Entropy-based advantage shaping: uncertain tokens get a larger advantage (arXiv 2506.14758)."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_not_negative, check_shapes, is_number
from .control import LINEAR_LOSSES, Context, Control, Figure, Mark, Metric, Metrics, MicroBatch, Panel
from .tokens import PolicyTokens, TokenMean, in_float32


@dataclass
class EntropyAdvantageFields:
    """The fields of entropy-based advantage shaping (arXiv 2506.14758).

    Args:
        entropy_advantage_alpha (`float`, *optional*, defaults to `0.0`):
            What a token's advantage grows by for each nat of its entropy, at least 0; 0 is off. It is on the scale of
            the advantages. Published, by second-hand accounts: 0.4 (GRPO), 0.1 (PPO).
        entropy_advantage_kappa (`float`, *optional*, defaults to `2.0`):
            It grows by at most `|A| / kappa`, above 1, so that no advantage changes its sign. Published, likewise: 2.
    """

    entropy_advantage_alpha: float = field(
        default=0.0,
        metadata={"help": "Entropy-based advantage: growth per nat; 0 is off. Published: 0.4 (GRPO), 0.1 (PPO)."},
    )
    entropy_advantage_kappa: float = field(
        default=2.0, metadata={"help": "Entropy-based advantage: at most |A| / kappa, above 1. Published: 2."}
    )

    @property
    def entropy_advantage_enabled(self) -> bool:
        return self.entropy_advantage_alpha != 0.0


def check(config: Any) -> None:
    """Refuse values that entropy-based advantage shaping cannot work with."""
    check_not_negative(config, "entropy_advantage_alpha", "0.4 (GRPO), 0.1 (PPO); 0 is off")
    kappa = config.entropy_advantage_kappa
    if not (is_number(kappa) and 1.0 < kappa < math.inf):
        raise ValueError(
            f"entropy_advantage_kappa={kappa!r} must be finite and above 1: at 1 a negative advantage can become 0, "
            "below it change its sign. Published: 2."
        )


def entropy_advantage(
    tokens: PolicyTokens, entropies: Tensor, *, alpha: float, kappa: float
) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """Add a token's entropy to its advantage, bounded by a share of the advantage itself (arXiv 2506.14758).

        psi = min(alpha sg(H), |A| / kappa),   A' = A + psi

    A token with `A > 0` is reinforced more where the policy is unsure, one with `A < 0` is pushed down less there; one
    with `A = 0` stays as it is. It is no entropy bonus: no gradient goes through `H`, which is that of the policy
    being trained. As no sign changes, neither does which tokens PPO-clip drops.

    The paper's text and code were not at hand: the formula is the one that its readers and a public re-implementation
    agree on.

    Args:
        tokens: The micro-batch.
        entropies: Of the policy being trained, nats, `(B, T)`; one that is no number adds nothing.
        alpha: At least 0, per nat.
        kappa: Above 1.

    Returns:
        The micro-batch with shaped `advantages`, and the metrics.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(mask=(tokens.mask, "B T"), entropies=(entropies, "B T"))
    # rounding can make the entropy of a certain token slightly negative
    wanted = alpha * in_float32(entropies.detach()).nan_to_num(nan=0.0).clamp(min=0.0)
    size = tokens.advantages.abs()
    added = torch.minimum(wanted, size / kappa)
    weighed = tokens.mask & (size > 0.0)
    return replace(tokens, advantages=tokens.advantages + added), {
        "entropy_advantage/added": TokenMean(added, tokens.mask & added.isfinite()),
        "entropy_advantage/relative": TokenMean(added / size, weighed),
        "entropy_advantage/capped_fraction": TokenMean((wanted > size / kappa) & weighed, tokens.mask),
    }


def shape(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: None) -> tuple[PolicyTokens, Metrics]:
    settings = context.settings
    return entropy_advantage(
        tokens,
        batch.entropies,
        alpha=settings.entropy_advantage_alpha,
        kappa=settings.entropy_advantage_kappa,
    )


ENTROPY_ADVANTAGE = Control(
    name="Entropy-based advantage",
    prefix="entropy_advantage",
    summary="Adds a token's entropy to its advantage, at most a share of the advantage's size: uncertain tokens are "
    "reinforced more and pushed down less.",
    published="0.4 (GRPO), 0.1 (PPO); 2",
    paper="Reasoning with Exploration: An Entropy Perspective",
    arxiv="2506.14758",
    fields=("entropy_advantage_alpha", "entropy_advantage_kappa"),
    check=check,
    loss_types=LINEAR_LOSSES,
    loss_reason="whose weights couple the tokens of a sequence",
    levels=("token",),
    level_reason="whose ratio mixes the advantages of a sequence's tokens, and these are each token's own",
    shape=shape,
    metrics=(
        Metric("added", "advantage", "mean of what is added to a token's advantage", "falls with the entropy"),
        Metric(
            "relative",
            "share of the advantage",
            "the same over the advantage's size, of the tokens that have one",
            "well below `1 / entropy_advantage_kappa`; at it, entropy does not tell the tokens apart",
        ),
        Metric(
            "capped_fraction",
            "share of tokens",
            "tokens where `|A| / entropy_advantage_kappa` bounds what is added",
            "the few of high entropy; above 0.5, `entropy_advantage_alpha` is too large for these advantages",
        ),
    ),
    marks=(
        Mark(
            "entropy_advantage_capped",
            "X",
            "entropy-based advantage at its bound",
            "uncertain: advantage grown by its largest share",
            ("#eef3c8", "1px dashed", "#5f6b00"),
            "entropy_advantage/capped_fraction",
        ),
    ),
    figures=(
        Figure(
            "entropy_advantage",
            "Entropy-based advantage",
            (
                Panel("added to the advantage", ("entropy_advantage/added",)),
                Panel("share at the bound", ("entropy_advantage/capped_fraction",)),
            ),
            "Healthy: what is added falls slowly with the entropy, and most tokens stay below the bound; where nearly "
            "all are at it, every advantage grows by the same share and entropy decides nothing.",
            from_zero=True,
        ),
    ),
)
