"""What the study compares: quantities of a run, paired differences between arms, and the claims with their tests."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from arms import (
    ARMS,
    BASE,
    BEST,
    MIDDLE_RATE,
    MORE_SEEDS,
    PASS_AT,
    SEEDS,
    TASK,
    Results,
    Run,
    base_run,
    tuned_rate,
)
from paired import Paired, holm
from registered import CLIPPED, CONTROL, EQUAL_REWARD, LEVEL, Claim, Test

SMOOTHED = 4
"""Rollouts of a moving mean."""
COMMON, TUNED = "common rate", "own rate"
ALL_SEEDS = (*SEEDS, *MORE_SEEDS)
Result = dict[str, Any]


def last_quarter(values: Sequence[float]) -> float:
    """Mean over the last quarter of a run's rollouts."""
    return statistics.fmean(values[-max(1, len(values) // 4) :])


def rise(values: Sequence[float]) -> float:
    """Mean over the last quarter minus that over the quarter before."""
    quarter = max(1, len(values) // 4)
    return statistics.fmean(values[-quarter:]) - statistics.fmean(values[-2 * quarter : -quarter])


def smooth(values: Sequence[float]) -> list[float]:
    """Moving mean over the last `SMOOTHED` rollouts; the first ones have fewer."""
    return [statistics.fmean(values[max(0, end - SMOOTHED) : end]) for end in range(1, len(values) + 1)]


def spread(values: Sequence[float]) -> float:
    """Standard deviation; NaN if a value is."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


QUANTITIES: dict[str, Callable[[Result], float]] = {
    **{f"pass@{k}": lambda result, k=k: result["pass"][str(k)] for k in PASS_AT},
    "AUC of reward": lambda result: statistics.fmean(result["reward"]),
    "reward, last quarter": lambda result: last_quarter(result["reward"]),
    "entropy, last quarter": lambda result: last_quarter(result["entropy"]),
    "entropy oscillation": lambda result: spread([b - a for a, b in pairwise(result["entropy"])]),
    "gradient norm, relative spread": lambda result: (
        spread(result["grad_norm"]) / (statistics.fmean(result["grad_norm"]) or 1.0)
    ),
    "outside ERC's bounds": lambda result: share(result, "erc"),
    "clipped by PPO": lambda result: share(result, "ppo"),
}
"""Of one run; entropies in nats per token, of the rollout policy on its own rollout."""


def share(result: Result, of: str) -> float:
    """Share of all tokens of the updates that `"erc"` or `"ppo"` clips, or would."""
    counts = result["tokens"]["by_ratio"]
    return sum(counts[of]) / sum(counts["all"])


def entropies_at_equal_reward(own: Result, other: Result) -> tuple[float, float]:
    """Entropy of two runs where each first reaches the highest reward that both reach; curves are smoothed."""
    curves = [(smooth(result["reward"]), smooth(result["entropy"])) for result in (own, other)]
    level = min(max(rewards) for rewards, _ in curves)
    first, second = (
        next(entropy for reward, entropy in zip(*curve, strict=True) if reward >= level) for curve in curves
    )
    return first, second


def difference(quantity: str, own: Result, other: Result) -> float:
    """A quantity of one run minus that of another."""
    if quantity == EQUAL_REWARD:
        first, second = entropies_at_equal_reward(own, other)
        return first - second
    return QUANTITIES[quantity](own) - QUANTITIES[quantity](other)


def runs_of(results: Results, task: str, arm: str, rates: str, seeds: Sequence[int]) -> list[Run]:
    """An arm's runs at the common rate or at its own; none while that is not known."""
    rate = MIDDLE_RATE if rates == COMMON else tuned_rate(task, arm, results)
    return [] if rate is None else [Run(task, arm, rate, seed) for seed in seeds]


def cell(results: Results, task: str, arm: str, rates: str) -> dict[int, Result]:
    """An arm's results by seed, at the common rate or at its own; those that are there and have not failed."""
    runs = runs_of(results, task, arm, rates, ALL_SEEDS)
    return {run.seed: results[run.name] for run in runs if "pass" in results.get(run.name, {})}


def compare(
    results: Results,
    quantity: str,
    arm: str,
    than: str,
    *,
    task: str = TASK,
    rates: str,
    seeds: Sequence[int] = ALL_SEEDS,
) -> Paired | None:
    """Two arms paired by seed, or `None` if fewer than two of the seeds have both, in finite numbers."""
    own, other = (cell(results, task, name, rates) for name in (arm, than))
    return finite(difference(quantity, own[seed], other[seed]) for seed in seeds if seed in own and seed in other)


def finite(differences: Iterable[float]) -> Paired | None:
    """A test of those that are numbers, or `None` if they are fewer than two."""
    found = tuple(filter(math.isfinite, differences))
    return Paired(found) if len(found) > 1 else None


def beyond_base(results: Results, quantity: str, arm: str, *, task: str = TASK, rates: str) -> Paired | None:
    """An arm's runs minus the model that they start from."""
    base = results.get(base_run(task).name)
    runs = cell(results, task, arm, rates).values() if base else ()
    return finite(difference(quantity, run, base) for run in runs)


@dataclass(frozen=True)
class Outcome:
    """A test and what the results say to it."""

    test: Test
    paired: Paired | None
    adjusted: float = 1.0

    @property
    def verdict(self) -> str:
        if self.paired is None:
            return "not run"
        if self.adjusted >= LEVEL:
            return "not resolved"
        return "holds" if (self.paired.mean > 0) == (self.test.expected == "higher") else "opposite"

    @property
    def complete(self) -> bool:
        """Whether all seeds are there that it is registered with."""
        return self.paired is not None and len(self.paired.differences) >= self.test.num_seeds


def outcomes(results: Results, claim: Claim, rates: str) -> list[Outcome]:
    """A claim's tests, with Holm's correction over them."""
    found = [(test, _test(results, test, rates)) for test in claim.tests]
    adjusted = holm([1.0 if paired is None else paired.probability for _, paired in found])
    return [Outcome(test, paired, value) for (test, paired), value in zip(found, adjusted, strict=True)]


def _test(results: Results, test: Test, rates: str) -> Paired | None:
    if test.than == BASE:
        return beyond_base(results, test.quantity, test.arm, rates=rates)
    if test.quantity == CLIPPED:
        runs = cell(results, TASK, test.arm, rates).values()
        return finite(share(run, "erc") - share(run, "ppo") for run in runs)
    return compare(results, test.quantity, test.arm, test.than, rates=rates)


def verdict(found: list[Outcome]) -> str:
    """Of a claim's tests: "holds" and "opposite" where all of them say so, "mixed" where they differ.

    With "so far" while a test lacks seeds.
    """
    verdicts = {outcome.verdict for outcome in found}
    if "not run" in verdicts:
        return "not run"
    so_far = "" if all(outcome.complete for outcome in found) else " so far"
    return (verdicts.pop() if len(verdicts) == 1 else "mixed") + so_far


def against_control(
    results: Results,
    quantity: str,
    *,
    task: str = TASK,
    rates: str,
    arms: Sequence[str] = (*ARMS, BEST),
    seeds: Sequence[int] = ALL_SEEDS,
    at_least: int = 2,
) -> dict[str, Outcome]:
    """Arms that were run with enough seeds against PPO-clip, with Holm's correction over them; ERC's in float32."""
    found = {}
    for arm in arms:
        than = control_of(arm)
        paired = compare(results, quantity, arm, than, task=task, rates=rates, seeds=seeds) if arm != than else None
        if paired and len(paired.differences) >= at_least:
            found[arm] = (Test(quantity, arm, than, "higher"), paired)
    adjusted = holm([paired.probability for _, paired in found.values()])
    return {arm: Outcome(*pair, value) for (arm, pair), value in zip(found.items(), adjusted, strict=True)}


def control_of(arm: str) -> str:
    """What an arm is compared with: PPO-clip, for ERC in float32 in the same precision."""
    return "ppo-clip-float32" if arm == "erc-float32" else CONTROL


@dataclass(frozen=True)
class Beating:
    """What the last claim asks of one endpoint.

    Attributes:
        family: Every arm with ten seeds against PPO-clip, corrected over them.
        best: The arm that is furthest above PPO-clip over the first seeds, of those that have all of them; or `None`.
        first: It over these seeds.
        later: It over the other seeds alone, which had no part in choosing it.
    """

    family: dict[str, Outcome]
    best: str | None
    first: Paired | None
    later: Paired | None

    @property
    def top(self) -> Outcome | None:
        """Of the arms above PPO-clip the one with the smallest adjusted probability."""
        above = [one for one in self.family.values() if one.paired and one.paired.mean > 0]
        return min(above, key=lambda one: one.adjusted, default=None)

    @property
    def holds(self) -> bool:
        """An arm of the family is above PPO-clip, and the best one of the first seeds is in the other ones too."""
        later = self.later
        return bool(self.top and self.top.adjusted < LEVEL and later and later.mean > 0 and later.probability < LEVEL)


def beating(results: Results, quantity: str, rates: str, arms: Sequence[str]) -> Beating:
    """The last claim's two parts on one endpoint.

    Args:
        results: All results.
        quantity: The endpoint.
        rates: At which learning rates.
        arms: Those that ten seeds are registered for.
    """
    first = against_control(results, quantity, rates=rates, arms=arms, seeds=SEEDS, at_least=len(SEEDS))
    best = max(first, key=lambda arm: first[arm].paired.mean, default=None)
    return Beating(
        family=against_control(results, quantity, rates=rates, arms=arms, at_least=len(ALL_SEEDS)),
        best=best,
        first=first[best].paired if best else None,
        later=compare(results, quantity, best, control_of(best), rates=rates, seeds=MORE_SEEDS) if best else None,
    )


def regime(results: Results, rates: str = COMMON) -> dict[str, Paired] | None:
    """Whether PPO-clip's entropy collapses and its reward stops rising, over the first seeds; `None` if not run.

    The entropy of the last quarter minus half of the first rollout's, and the reward of the last quarter minus that of
    the quarter before.
    """
    runs = [run for seed, run in cell(results, TASK, CONTROL, rates).items() if seed in SEEDS]
    ends = finite(last_quarter(run["entropy"]) - run["entropy"][0] / 2 for run in runs)
    rises = finite(rise(run["reward"]) for run in runs)
    return {"entropy": ends, "reward": rises} if ends and rises else None
