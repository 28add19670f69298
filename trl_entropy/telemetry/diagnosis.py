"""What a run's log says about its health, in words, and which field to try.

Every rule reads the trainer's log entries alone, so it works on a finished run (the report) and on one that runs
(`DiagnosisCallback`). Trends compare the means of a metric over the first and over the last entries: at least 8 steps
and, of a longer log, a quarter of the entries, up to 8.
"""

import warnings
from collections.abc import Sequence
from statistics import median

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..controls import CONTROLS
from ..controls.health import Finding, LogHistory, Rule, ends, enough, finite_values

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
MOSTLY_EQUAL_GROUPS = 0.5
"""Above a half, most of the rollout has advantage 0 and is generated for nothing."""


def diagnose(log_history: LogHistory) -> list[Finding]:
    """All findings of a run, in the order of `RULES`.

    Args:
        log_history: Log entries of a transformers trainer. A metric that covers fewer than 16 optimizer steps,
            or has fewer than 8 finite values, gives no finding; evaluation's metrics are not read.
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


def _remedies(rule: str) -> str:
    """The fields that are a remedy for a rule's finding, by the controls' rows, in words."""
    return ", ".join(advice for control in CONTROLS for name, advice in control.remedies if name == rule)


def entropy_collapse(log_history: LogHistory) -> Finding | None:
    """The entropy has fallen below `COLLAPSE_SHARE` of its start."""
    entropies = enough(log_history, "entropy")
    if not entropies:
        return None
    start, now = ends(entropies, log_history)
    if not 0.0 <= now < COLLAPSE_SHARE * start:
        return None
    return Finding(
        "entropy_collapse",
        f"Entropy collapse: {start:.3g} nats at the start, {now:.3g} now. Little is explored any more.",
        f"Try {_remedies('entropy_collapse')}, a KL penalty (beta), a larger epsilon_high (DAPO: 0.28), or a smaller "
        "learning_rate.",
    )


def entropy_explosion(log_history: LogHistory) -> Finding | None:
    """The entropy has risen above `EXPLOSION_RATIO` times its start."""
    entropies = enough(log_history, "entropy")
    if not entropies:
        return None
    start, now = ends(entropies, log_history)
    if not now > EXPLOSION_RATIO * start > 0.0:
        return None
    return Finding(
        "entropy_explosion",
        f"Entropy explosion: {start:.3g} nats at the start, {now:.3g} now. The policy is coming apart.",
        "Try a smaller learning_rate, fewer optimizer steps per rollout (steps_per_generation), a smaller "
        f"entropy_coef, epo_coef or ce_gppo_alpha2, or {_remedies('entropy_explosion')}.",
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
    entropies = enough(log_history, "entropy")
    if not entropies or median(entropies) <= 0.0:
        return None
    swings = num_swings(entropies, SWING_SHARE * median(entropies))
    if swings <= MAX_SWINGS:
        return None
    return Finding(
        "entropy_oscillation",
        f"Entropy oscillation: {swings} reversals of more than {SWING_SHARE:.0%} of the median, "
        f"{median(entropies):.3g} nats.",
        f"Try {_remedies('entropy_oscillation')}, or a smaller learning_rate.",
    )


def clip_never_acts(log_history: LogHistory) -> Finding | None:
    """A clip is on and has not touched one token."""
    counts = {
        one.name: [enough(log_history, key) for key in one.counts]
        for one in CONTROLS
        if one.counts and not one.reads_sampler
    }
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
    dropped = {control.name: control.drops for control in CONTROLS if control.drops is not None}
    replaced = [control.counts for control in CONTROLS if control.replaces_ppo_clip]
    if not any(finite_values(log_history, key) for keys in replaced for key in keys):
        ppo = ("ppo_clip/low_fraction", "ppo_clip/high_fraction")
        logged = finite_values(log_history, ppo[0])
        dropped["PPO-clip"] = ppo if logged else ("clip_ratio/region_mean",), "a larger epsilon"
    for name, (keys, bounds) in dropped.items():
        values = [enough(log_history, key) for key in keys]
        share = sum(ends(of_key, log_history)[1] for of_key in values) if all(values) else 0.0
        if share > MOSTLY_CLIPPED:
            return Finding(
                "clip_removes_most",
                f"{name} takes the gradient of {share:.0%} of the tokens. Most of the rollout is thrown away.",
                "Try a smaller learning_rate, fewer optimizer steps per rollout (steps_per_generation, "
                f"num_iterations), or {bounds}.",
            )
    return None


def groups_without_variance(log_history: LogHistory) -> Finding | None:
    """More than `MOSTLY_EQUAL_GROUPS` of the groups have one and the same reward throughout."""
    shares = enough(log_history, "frac_reward_zero_std")
    # with critics, a group of equal rewards teaches too
    with_critics = any("asyppo/explained_variance" in entry for entry in log_history)
    share = ends(shares, log_history)[1] if shares and not with_critics else 0.0
    if share <= MOSTLY_EQUAL_GROUPS:
        return None
    return Finding(
        "groups_without_variance",
        f"{share:.0%} of the groups have the same reward for all their completions: they teach nothing.",
        "Take prompts that the policy solves sometimes (neither always nor never), or a larger num_generations or "
        "temperature.",
    )


RULES: tuple[Rule, ...] = (
    entropy_collapse,
    entropy_explosion,
    entropy_oscillation,
    clip_never_acts,
    clip_removes_most,
    *(rule for control in CONTROLS for rule in control.rules),
    groups_without_variance,
)
