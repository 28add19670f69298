"""What a run's log says about its health, in words, and which field to try.

Every rule reads the trainer's log entries alone, so it works on a finished run (the report) and on one that runs
(`DiagnosisCallback`). Trends compare the first `WINDOW` entries of a metric with the last `WINDOW`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LogHistory = Sequence[dict[str, Any]]

WINDOW = 8
"""Entries per mean: one rollout of the papers' 8 optimizer steps when every step is logged."""
MIN_ENTRIES = 2 * WINDOW
"""Fewer entries of a metric than two windows are no trend."""
COLLAPSE_SHARE = 0.2
"""Entropy below a fifth of its start: most of what the policy could still explore is gone."""
EXPLOSION_RATIO = 2.0
"""Entropy above twice its start: training sharpens a policy, so a policy that spreads this far is coming apart."""
SWING_SHARE = 0.3
"""A swing is a reversal of the entropy by 30 % of its median; the noise between batches is a few per cent."""
MAX_SWINGS = 3
"""One swing up and one back happen in healthy runs; four are an oscillation."""
MOSTLY_CLIPPED = 0.5
"""Above a half, more tokens lose their gradient than keep it; ERC's paper reports 0.2, PPO-clip's share is 0.0002."""
MUCH_ROUNDING = 0.25
"""Above a quarter of what ERC clips, too much of it is chance for the gate to measure the policy."""
REWARD_LOST_SHARE = 0.2
"""Reward below a fifth of its best window: what was learnt is lost, which noise does not do."""
GRADIENT_GROWTH = 2.0
"""Gradient norm above twice its start; healthy runs stay in one band."""
USELESS_VARIANCE = 0.05
"""A critic that explains less than 5 % of the variance of the returns gives the advantages of a constant baseline."""
NOISY_VARIANCE = -0.02
"""A constant explains 0; values that are worse than a constant were learnt from noise."""
MOSTLY_EQUAL_GROUPS = 0.5
"""Above a half, most of the rollout has advantage 0 and is generated for nothing."""


@dataclass(frozen=True)
class Finding:
    """One thing that a run shows.

    Attributes:
        rule: Stable name of the rule, such as `entropy_collapse`.
        seen: What the log shows, a sentence with its numbers.
        remedy: Which fields to try, a sentence.
    """

    rule: str
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.seen} {self.remedy}"


def diagnose(log_history: LogHistory) -> list[Finding]:
    """All findings of a run, in the order of `RULES`.

    Args:
        log_history: Log entries of a transformers trainer. A metric that has fewer than `MIN_ENTRIES` finite values
            gives no finding; evaluation's metrics are not read.
    """
    findings = (rule(log_history) for rule in RULES)
    return [finding for finding in findings if finding is not None]


class DiagnosisCallback(TrainerCallback):
    """Warns during training, once per finding, on the main process.

    Add it with `callbacks=[DiagnosisCallback()]`. The warnings are `UserWarning`s.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if not state.is_world_process_zero:
            return
        for finding in diagnose(state.log_history):
            if finding.rule not in self._warned:
                self._warned.add(finding.rule)
                warnings.warn(f"Step {state.global_step}: {finding}", stacklevel=2)


def finite_values(log_history: LogHistory, key: str) -> list[float]:
    """The finite numbers of a metric, in order."""
    values = (entry.get(key) for entry in log_history)
    return [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]


def _enough(log_history: LogHistory, key: str) -> list[float]:
    values = finite_values(log_history, key)
    return values if len(values) >= MIN_ENTRIES else []


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last window."""
    return fmean(values[:WINDOW]), fmean(values[-WINDOW:])


def entropy_collapse(log_history: LogHistory) -> Finding | None:
    """The entropy has fallen below `COLLAPSE_SHARE` of its start."""
    entropies = _enough(log_history, "entropy")
    if not entropies:
        return None
    start, now = _ends(entropies)
    if not 0.0 <= now < COLLAPSE_SHARE * start:
        return None
    return Finding(
        "entropy_collapse",
        f"Entropy collapse: {start:.3g} nats at the start, {now:.3g} now. Little is explored any more.",
        "Try ce_gppo_alpha2=1 with a smaller ce_gppo_alpha1, epo_coef=0.001, a larger epsilon_high (DAPO: 0.28), or a "
        "smaller learning_rate.",
    )


def entropy_explosion(log_history: LogHistory) -> Finding | None:
    """The entropy has risen above `EXPLOSION_RATIO` times its start."""
    entropies = _enough(log_history, "entropy")
    if not entropies:
        return None
    start, now = _ends(entropies)
    if not now > EXPLOSION_RATIO * start > 0.0:
        return None
    return Finding(
        "entropy_explosion",
        f"Entropy explosion: {start:.3g} nats at the start, {now:.3g} now. The policy is coming apart.",
        "Try erc_low=0.95 and erc_high=1.05, a smaller learning_rate, fewer optimizer steps per rollout "
        "(steps_per_generation), or a smaller entropy_coef, epo_coef or ce_gppo_alpha2.",
    )


def num_swings(values: Sequence[float], swing: float) -> int:
    """How often a series reverses by at least `swing` from its last extreme; the first move does not count."""
    count, direction, low, high = 0, 0, values[0], values[0]
    for value in values:
        low, high = min(low, value), max(high, value)
        if direction <= 0 and value - low >= swing:
            count, direction, high = count + (direction != 0), 1, value
        elif direction >= 0 and high - value >= swing:
            count, direction, low = count + (direction != 0), -1, value
    return count


def entropy_oscillation(log_history: LogHistory) -> Finding | None:
    """The entropy reverses by `SWING_SHARE` of its median more than `MAX_SWINGS` times."""
    entropies = _enough(log_history, "entropy")
    if not entropies or median(entropies) <= 0.0:
        return None
    swings = num_swings(entropies, SWING_SHARE * median(entropies))
    if swings <= MAX_SWINGS:
        return None
    return Finding(
        "entropy_oscillation",
        f"Entropy oscillation: {swings} reversals of more than {SWING_SHARE:.0%} of the median, "
        f"{median(entropies):.3g} nats.",
        "Try epo_coef=0.001, which smooths the entropy against its history, erc_low=0.95 and erc_high=1.05, or a "
        "smaller learning_rate.",
    )


CLIPS = {"ERC": ("erc/clip_fraction",), "CE-GPPO": ("ce_gppo/low_fraction", "ce_gppo/high_fraction")}
"""Clipping controls, and the metrics that together count the tokens they act on."""


def clip_never_acts(log_history: LogHistory) -> Finding | None:
    """A clip is on and has not touched one token."""
    counts = {name: [_enough(log_history, key) for key in keys] for name, keys in CLIPS.items()}
    idle = [name for name, of_keys in counts.items() if all(of_keys) and not any(map(any, of_keys))]
    if not idle:
        return None
    return Finding(
        "clip_never_acts",
        f"{' and '.join(idle)} never acted: not one token in the whole log. With one optimizer step per rollout the "
        "importance and entropy ratios are exactly 1.",
        "Set steps_per_generation to 8 times gradient_accumulation_steps, the papers' schedule, or num_iterations "
        "above 1. If the schedule is off-policy already, the learning_rate is too small to move the policy.",
    )


def clip_removes_most(log_history: LogHistory) -> Finding | None:
    """A clip takes the gradient of more than `MOSTLY_CLIPPED` of the tokens."""
    dropped: dict[str, tuple[str, ...]] = {"ERC": ("erc/clip_fraction",)}
    if not finite_values(log_history, "ce_gppo/low_fraction"):
        ppo = ("ppo_clip/low_fraction", "ppo_clip/high_fraction")
        logged = finite_values(log_history, ppo[0])
        dropped["PPO-clip"] = ppo if logged else ("clip_ratio/region_mean",)
    for name, keys in dropped.items():
        values = [_enough(log_history, key) for key in keys]
        share = sum(_ends(of_key)[1] for of_key in values) if all(values) else 0.0
        if share > MOSTLY_CLIPPED:
            bounds = "wider erc_low and erc_high" if name == "ERC" else "a larger epsilon"
            return Finding(
                "clip_removes_most",
                f"{name} takes the gradient of {share:.0%} of the tokens. Most of the rollout is thrown away.",
                "Try a smaller learning_rate, fewer optimizer steps per rollout (steps_per_generation, "
                f"num_iterations), or {bounds}.",
            )
    return None


def clip_is_rounding(log_history: LogHistory) -> Finding | None:
    """More than `MUCH_ROUNDING` of what ERC clips leaves its bounds by rounding alone."""
    clipped, rounding = _enough(log_history, "erc/clip_fraction"), finite_values(log_history, "erc/rounding_fraction")
    if not clipped or not rounding:
        return None
    share, by_rounding = _ends(clipped)[1], fmean(rounding[-WINDOW:])
    if not by_rounding > MUCH_ROUNDING * share > 0.0:
        return None
    return Finding(
        "clip_is_rounding",
        f"ERC clips {share:.1%} of the tokens, and {by_rounding:.1%} leave its bounds by rounding alone, with "
        "the same weights: much of what it drops is chance.",
        "With bf16=True, try fp16=True, which rounds 8 times finer at the same cost. Else cast_lm_head_to_fp32=True, "
        "a larger erc_entropy_floor (0.1), or float32.",
    )


def ce_gppo_runaway(log_history: LogHistory) -> Finding | None:
    """The reward is lost while the gradient norm grows, and CE-GPPO is on."""
    rewards, norms = _enough(log_history, "reward"), _enough(log_history, "grad_norm")
    if not rewards or not norms or not finite_values(log_history, "ce_gppo/low_fraction"):
        return None
    best = max(fmean(rewards[end - WINDOW : end]) for end in range(WINDOW, len(rewards) + 1))
    now, (norm_start, norm_now) = _ends(rewards)[1], _ends(norms)
    if not (now < REWARD_LOST_SHARE * best and norm_now > GRADIENT_GROWTH * norm_start):
        return None
    return Finding(
        "ce_gppo_runaway",
        f"The reward fell from {best:.3g} to {now:.3g} while the gradient norm grew from {norm_start:.3g} to "
        f"{norm_now:.3g}: ce_gppo_alpha1 goes on pushing down tokens that are already far below the trust region.",
        "Try fewer optimizer steps per rollout (steps_per_generation, num_iterations), a smaller learning_rate, or a "
        "smaller ce_gppo_alpha1.",
    )


def critic_explains_nothing(log_history: LogHistory) -> Finding | None:
    """The critics explain less than `USELESS_VARIANCE` of the variance of the returns."""
    explained = _enough(log_history, "asyppo/explained_variance")
    share = _ends(explained)[1] if explained else math.nan
    if not share < USELESS_VARIANCE:
        return None
    remedy = (
        "They fit noise: try a smaller critic_learning_rate, critic_num_epochs=1 or more completions per rollout, and "
        "bootstrap_truncated=False where a truncated completion has failed."
        if share < NOISY_VARIANCE
        else "If the share still rises, try critic_warmup_rollouts or a larger critic_learning_rate. If not, these "
        "critics cannot tell from a state how its completion ends: take critics that know the task better, or the "
        "group's advantages (EntropyGRPOTrainer)."
    )
    return Finding(
        "critic_explains_nothing",
        f"The critics explain {share:.1%} of the variance of the returns: the advantages are those of a constant "
        "baseline or worse.",
        remedy,
    )


def groups_without_variance(log_history: LogHistory) -> Finding | None:
    """More than `MOSTLY_EQUAL_GROUPS` of the groups have one and the same reward throughout."""
    shares = _enough(log_history, "frac_reward_zero_std")
    # with critics, a group of equal rewards teaches too
    with_critics = finite_values(log_history, "asyppo/explained_variance")
    if not shares or with_critics or _ends(shares)[1] <= MOSTLY_EQUAL_GROUPS:
        return None
    return Finding(
        "groups_without_variance",
        f"{_ends(shares)[1]:.0%} of the groups have the same reward for all their completions: they teach nothing.",
        "Take prompts that the policy solves sometimes (neither always nor never), or a larger num_generations or "
        "temperature.",
    )


RULES: tuple[Callable[[LogHistory], Finding | None], ...] = (
    ce_gppo_runaway,
    entropy_collapse,
    entropy_explosion,
    entropy_oscillation,
    clip_never_acts,
    clip_removes_most,
    clip_is_rounding,
    critic_explains_nothing,
    groups_without_variance,
)
