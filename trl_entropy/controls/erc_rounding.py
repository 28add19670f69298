"""What leaves ERC's bounds by rounding alone, with the same weights."""

from statistics import fmean

from torch import Tensor

from .control import Context, Metrics
from .entropy_ratios import entropy_ratio, inside_bounds
from .erc_target import BoundPower, bounds_now
from .health import Finding, LogHistory, ends, enough, finite_values, window
from .tokens import TokenMean

MUCH_ROUNDING = 0.25
"""Above a quarter of what ERC clips, too much of it is chance for the gate to measure the policy."""


def on_repeat(
    entropies: Tensor, old_entropies: Tensor, mask: Tensor, context: Context, state: BoundPower | None
) -> Metrics:
    settings = context.settings
    if settings.erc_side != "both":  # which tokens are dropped depends on an update, which there is none of
        return {}
    ratio = entropy_ratio(entropies, old_entropies, settings.erc_entropy_floor)
    outside = ~inside_bounds(ratio, *bounds_now(settings, state))
    return {"erc/rounding_fraction": TokenMean(outside, mask)}


def clip_is_rounding(log_history: LogHistory) -> Finding | None:
    """More than `MUCH_ROUNDING` of what ERC clips leaves its bounds by rounding alone."""
    clipped, rounding = enough(log_history, "erc/clip_fraction"), finite_values(log_history, "erc/rounding_fraction")
    if not clipped or not rounding:
        return None
    share = ends(clipped, log_history)[1]
    by_rounding = fmean(rounding[-window(clipped, log_history) :])
    if not by_rounding > MUCH_ROUNDING * share > 0.0:
        return None
    return Finding(
        "clip_is_rounding",
        f"ERC clips {share:.1%} of the tokens, and {by_rounding:.1%} leave its bounds by rounding alone, with "
        "the same weights: much of what it drops is chance.",
        "With bf16=True, try fp16=True, which rounds 8 times finer and by data sheet is as fast. Else "
        "cast_lm_head_to_fp32=True, or float32.",
    )
