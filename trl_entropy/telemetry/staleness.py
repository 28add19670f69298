"""How old the samples of an update are, and what PPO-clip drops of them by their age.

The age of a sample is counted in weight versions: how often the weights have been handed to the inference server
between the request for the sample and the update that uses it.
"""

import math

from torch import Tensor

from ..controls import TokenMean
from ..controls.reporting import Figure, Panel

AGES = {
    "age_0": (0, 0),
    "age_1": (1, 1),
    "age_2": (2, 2),
    "ages_3_to_4": (3, 4),
    "ages_from_5": (5, math.inf),
}
"""The youngest and the oldest age that each metric is a mean over."""
NAMES = {name: name.replace("_", " ") for name in AGES}


def clipped_by_age(ages: Tensor, clipped: Tensor, mask: Tensor) -> dict[str, TokenMean]:
    """Share of the tokens that PPO-clip drops among those of an age, and each age's share of the tokens.

    Args:
        ages: In weight versions, `(B, T)`.
        clipped: Whether PPO-clip drops the token's gradient, bool `(B, T)`.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
    """
    metrics = {"staleness/age": TokenMean(ages, mask)}
    for name, (youngest, oldest) in AGES.items():
        among = (ages >= youngest) & (ages <= oldest)
        metrics[f"staleness/clipped_{name}"] = TokenMean(clipped, mask & among)
        metrics[f"staleness/tokens_{name}"] = TokenMean(among, mask)
    return metrics


METRICS = (
    (
        "staleness/age",
        "weight versions",
        "mean age of the tokens of an update; only with `EntropyAsyncGRPOTrainer`, as all of `staleness`",
        "1 to 2, steady; growing: the server falls behind",
    ),
    (
        ", ".join(f"staleness/clipped_{name}" for name in AGES),
        "share of tokens",
        "of the tokens of this age, those outside the PPO clip range (`ppo_clip`), before any control",
        "near 0 at age 0, where only the server's rounding differs, and a little more with each version",
    ),
    (", ".join(f"staleness/tokens_{name}" for name in AGES), "share of tokens", "tokens of this age", "steady"),
    (
        "staleness/behaviour_gap",
        "nats",
        "with ERC: mean distance of a token's recorded log-prob from the one under the weights of its version, for "
        "tokens whose weights are not the current ones",
        "the server's rounding; more: tokens written after the version that their sample is tagged with",
    ),
)
"""Key, unit, meaning and what a healthy run shows, as the table of metrics has them."""

FIGURES = (
    Figure(
        "staleness",
        "Age of the samples, in versions of the weights",
        (
            Panel("mean age", ("staleness/age",)),
            *(Panel(f"tokens, {NAMES[name]}", (f"staleness/tokens_{name}",)) for name in AGES),
        ),
        "Healthy: a steady mix of ages; an age that grows means that updates outrun the inference server.",
        from_zero=True,
    ),
    Figure(
        "staleness_clip",
        "Tokens outside the PPO clip range by the age of their sample",
        tuple(Panel(f"share, {NAMES[name]}", (f"staleness/clipped_{name}",)) for name in AGES),
        "Healthy: near 0 at age 0, a little more with each version; many at age 0 are the rounding of the inference "
        "server, many at the oldest age call for a smaller max_staleness or learning rate.",
        from_zero=True,
    ),
)
