"""QAE: the baseline of a group is a quantile of its rewards instead of their mean (arXiv 2509.22611)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .checks import check_shapes, is_number
from .control import Context, Control, Figure, Metric, Metrics, Panel, Rollout
from .selection import own_rows
from .tokens import TokenMean


@dataclass
class QAEFields:
    """The field of QAE (arXiv 2509.22611).

    Args:
        qae_quantile (`float`, *optional*):
            The baseline of a group is this quantile K of its rewards, in (0, 1); off if not set. Published: 0.4, or
            0.6 where the entropy collapses: with rewards 0 and 1 a prompt that is solved in more than 1 - K of its
            completions teaches by its failures alone, any other by its successes alone.
    """

    qae_quantile: float | None = field(
        default=None, metadata={"help": "QAE: quantile of the group's rewards that is the baseline. Published: 0.4."}
    )

    @property
    def qae_enabled(self) -> bool:
        return self.qae_quantile is not None


def check(config: Any) -> None:
    """Refuse values that QAE cannot work with."""
    quantile = config.qae_quantile
    if quantile is None:
        return
    if not (is_number(quantile) and 0.0 < quantile < 1.0):
        raise ValueError(f"qae_quantile={quantile} must be in (0, 1). Published: 0.4 and 0.6.")
    if getattr(config, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        raise ValueError(
            f"qae_quantile={quantile} is a quantile of the total reward, and multi_objective_aggregation="
            f"{config.multi_objective_aggregation!r} normalises each reward on its own. Set "
            "multi_objective_aggregation='sum_then_normalize', or leave qae_quantile out."
        )


def qae(advantages: Tensor, group_size: int, quantile: float) -> Tensor:
    """`A' = A - Q_K(A)`, the quantile over each group (arXiv 2509.22611).

    The paper's advantage is `(R - Q_K(R)) / (std + eps)`. TRL's is `(R - mean R) / (std + eps)`, or that without the
    division or with the batch's deviation: within a group always an increasing affine function of the reward, with
    which a quantile commutes, so the difference is the paper's under each `scale_rewards`. Groups of equal rewards
    keep advantage 0.

    `Q_K` of `n` rewards is the smallest that at least `n K` of them do not exceed, element `ceil(n K)` in order. This
    is the rule that the abstract states for rewards of 0 and 1: baseline 0 iff the success rate is at most `1 - K`,
    else 1. The released code interpolates between two elements and differs at the border. `quantile` is read as the
    decimal number that it prints as. The text of the paper could not be compared.

    Args:
        advantages: Of whole groups, one after the other, `(N,)`; NaN for a completion without a reward, which counts
            in no quantile.
        group_size: Completions of a group.
        quantile: `K`, in (0, 1).

    Returns:
        `(N,)`, 0 where `advantages` is NaN.

    Raises:
        ValueError: If the shape does not fit, or `N` is no multiple of `group_size`.
    """
    check_shapes(advantages=(advantages, "N"))
    if len(advantages) % group_size:
        raise ValueError(f"{len(advantages)} advantages are not whole groups of group_size={group_size}.")
    grouped = advantages.view(-1, group_size)
    counts = (~grouped.isnan()).sum(1, keepdim=True)
    orders = [max(math.ceil(Fraction(str(quantile)) * count), 1) for count in range(group_size + 1)]
    order = torch.tensor(orders, device=advantages.device)[counts]
    # NaN is sorted last
    baseline = grouped.sort(1).values.gather(1, order - 1)
    return (grouped - baseline).nan_to_num(0.0).flatten()


def on_rollout(rollout: Rollout, context: Context, state: None) -> tuple[Mapping[str, Tensor], Metrics]:
    scored = rollout.advantages.masked_fill(rollout.rewards.isnan(), torch.nan)
    # a group may be spread over processes
    everywhere = qae(context.gather(scored), context.group_size, context.settings.qae_quantile)
    advantages = own_rows(everywhere, len(scored))
    counted = ~scored.isnan()
    return {"advantages": advantages}, {
        "qae/positive_fraction": TokenMean(advantages > 0, counted),
        "qae/zero_fraction": TokenMean(advantages == 0, counted),
        "qae/negative_fraction": TokenMean(advantages < 0, counted),
    }


QAE = Control(
    name="QAE",
    prefix="qae",
    summary="The baseline of a completion is a quantile of its group's rewards instead of their mean: on easy prompts "
    "only failures, on hard ones only successes have an advantage.",
    published="0.4; 0.6 where the entropy collapses",
    paper="Quantile Advantage Estimation: Stabilizing RLVR for LLM Reasoning",
    arxiv="2509.22611",
    fields=("qae_quantile",),
    check=check,
    excludes=(("asyppo", "its advantages come from critics, and QAE's from the rewards of a group"),),
    sets_advantages=True,
    rollout_settings=("qae_quantile",),
    on_rollout=on_rollout,
    metrics=(
        Metric(
            "positive_fraction",
            "share of completions",
            "advantage above 0: better than the baseline",
            "steady; all of it from prompts that are mostly failed",
        ),
        Metric(
            "zero_fraction",
            "share of completions",
            "advantage 0: as good as the baseline, or no difference in the group",
            "about 0.8 in the paper",
        ),
        Metric(
            "negative_fraction",
            "share of completions",
            "advantage below 0: worse than the baseline",
            "steady; all of it from prompts that are mostly solved",
        ),
    ),
    figures=(
        Figure(
            "qae",
            "Advantages with QAE's baseline",
            (
                Panel("zero (share)", ("qae/zero_fraction",)),
                Panel("positive (share)", ("qae/positive_fraction",)),
                Panel("negative (share)", ("qae/negative_fraction",)),
            ),
            "Healthy: most are 0 (about 0.8 in the paper), and the others shift from positive to negative as prompts "
            "become solved.",
            from_zero=True,
        ),
    ),
    remedies=(("entropy_explosion", "qae_quantile=0.4"),),
)
