"""What the study compares: quantities of a run, paired differences between arms, and the claims with their tests."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from arms import (
    ARMS,
    BASE,
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

SMOOTHED = 4
"""Rollouts of a moving mean."""
LEVEL = 0.05
CONTROL = "ppo-clip"
COMMON, TUNED = "common rate", "own rate"
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


QUANTITIES: dict[str, Callable[[Result], float]] = {
    **{f"pass@{k}": lambda result, k=k: result["pass"][str(k)] for k in PASS_AT},
    "AUC of reward": lambda result: statistics.fmean(result["reward"]),
    "reward, last quarter": lambda result: last_quarter(result["reward"]),
    "entropy, last quarter": lambda result: last_quarter(result["entropy"]),
    "entropy oscillation": lambda result: statistics.stdev(b - a for a, b in pairwise(result["entropy"])),
    "gradient norm": lambda result: statistics.fmean(result["grad_norm"]),
    "gradient norm, relative spread": lambda result: (
        statistics.stdev(result["grad_norm"]) / statistics.fmean(result["grad_norm"])
    ),
    "outside ERC's bounds": lambda result: share(result, "erc"),
    "clipped by PPO": lambda result: share(result, "ppo"),
    "explained variance": lambda result: result["explained_variance"],
}
"""Of one run; entropies in nats per token, of the rollout policy on its own rollout."""
EQUAL_REWARD = "entropy at equal reward"
"""A quantity of two runs: see `entropies_at_equal_reward`."""
PRIMARY = ("pass@1", "pass@32", "AUC of reward", EQUAL_REWARD)


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


def cell(results: Results, task: str, arm: str, rates: str) -> dict[int, Result]:
    """An arm's runs by seed, at the common rate or at its own; those that are there."""
    rate = MIDDLE_RATE if rates == COMMON else tuned_rate(task, arm, results)
    if rate is None:
        return {}
    runs = {seed: Run(task, arm, rate, seed).name for seed in (*SEEDS, *MORE_SEEDS)}
    return {seed: results[name] for seed, name in runs.items() if name in results}


def compare(
    results: Results,
    quantity: str,
    arm: str,
    than: str,
    *,
    task: str = TASK,
    rates: str,
    seeds: tuple[int, ...] = (*SEEDS, *MORE_SEEDS),
) -> Paired | None:
    """Two arms paired by seed, or `None` if fewer than two of the seeds have both."""
    own, other = (cell(results, task, name, rates) for name in (arm, than))
    found = [seed for seed in seeds if seed in own and seed in other]
    if len(found) < 2:
        return None
    return Paired(tuple(difference(quantity, own[seed], other[seed]) for seed in found))


def beyond_base(results: Results, quantity: str, arm: str, *, task: str = TASK, rates: str) -> Paired | None:
    """An arm's runs minus the model that they start from."""
    runs, base = cell(results, task, arm, rates), results.get(base_run(task).name)
    if len(runs) < 2 or base is None:
        return None
    return Paired(tuple(difference(quantity, run, base) for run in runs.values()))


@dataclass(frozen=True)
class Test:
    """A claim as "`quantity` of `arm` is higher (or lower) than that of `than`"."""

    quantity: str
    arm: str
    than: str
    expected: str


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, or ours, and the tests it is decided by; all of them have to hold.

    Attributes:
        text: In a sentence.
        source: Who claims it.
        tests: Its tests, on the first task, at each arm's own rate.
        before: Its letter in the first study, where it has one.
    """

    text: str
    source: str
    tests: tuple[Test, ...]
    before: str = ""


def _better(arm: str, than: str, *quantities: str) -> tuple[Test, ...]:
    return tuple(Test(quantity, arm, than, "higher") for quantity in quantities)


CLAIMS: dict[str, Claim] = {
    "1": Claim(
        "ERC clips more tokens than PPO-clip",
        "ERC",
        (Test("outside ERC's bounds - clipped", "erc", "", "higher"),),
        "a",
    ),
    "2": Claim(
        "ERC calms the entropy and the gradient norm",
        "ERC",
        (
            Test("entropy oscillation", "erc-float32", "ppo-clip-float32", "lower"),
            Test("gradient norm, relative spread", "erc-float32", "ppo-clip-float32", "lower"),
        ),
        "b",
    ),
    "3": Claim("ERC learns better than PPO-clip", "ERC", _better("erc-float32", "ppo-clip-float32", "pass@1"), "b"),
    "4": Claim(
        "ERC is better than a KL penalty and than steering the entropy",
        "ERC",
        (*_better("erc", "kl", "pass@1"), *_better("erc", "adaptive-entropy", "pass@1")),
        "b",
    ),
    "5": Claim("ERC helps CE-GPPO", "ERC", _better("erc+ce-gppo", "ce-gppo", "pass@1"), "c"),
    "6": Claim(
        "CE-GPPO keeps more entropy than PPO-clip at equal reward",
        "CE-GPPO",
        _better("ce-gppo", "ppo-clip", EQUAL_REWARD),
        "d",
    ),
    "7": Claim("CE-GPPO learns better than PPO-clip", "CE-GPPO", _better("ce-gppo", "ppo-clip", "pass@1"), "d"),
    "8": Claim(
        "CE-GPPO learns better than clip-higher, and than GPPO",
        "CE-GPPO",
        (*_better("ce-gppo", "clip-higher", "pass@1"), *_better("ce-gppo", "gppo", "pass@1")),
        "d",
    ),
    "9": Claim(
        "EPO damps the oscillation of entropy", "EPO", (Test("entropy oscillation", "epo", "ppo-clip", "lower"),), "e"
    ),
    "10": Claim("EPO learns better than PPO-clip", "EPO", _better("epo", "ppo-clip", "pass@1"), "e"),
    "11": Claim("AsyPPO learns better than GRPO", "AsyPPO", _better("asyppo", "ppo-clip", "pass@1"), "f"),
    "12": Claim(
        "AsyPPO learns better than PPO with one critic", "AsyPPO", _better("asyppo", "ppo-critic", "pass@1"), "f"
    ),
    "13": Claim(
        "In bfloat16 ERC clips more than in float32, and its remedy clips less",
        "ours",
        (
            Test("outside ERC's bounds", "erc-bf16", "erc-float32", "higher"),
            Test("outside ERC's bounds", "erc", "erc-bf16", "lower"),
        ),
    ),
    "14": Claim("The remedy makes ERC learn better in bfloat16", "ours", _better("erc", "erc-bf16", "pass@1")),
    "15": Claim("One-sided ERC learns better than ERC", "ours", _better("erc-outward", "erc", "pass@1"), "b"),
    "16": Claim("ERC at a target share learns better than ERC", "ours", _better("erc-target", "erc", "pass@1")),
    "17": Claim(
        "PPO-clip costs answers that the model had: its pass@32 falls below the model's own",
        "field",
        (Test("pass@32", CONTROL, BASE, "lower"),),
    ),
}
"""By number. Claim 1 compares two shares of one arm's tokens; the last compares with the model itself."""
CLIPPED = "outside ERC's bounds - clipped"


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


def outcomes(results: Results, claim: Claim, rates: str) -> list[Outcome]:
    """A claim's tests, with Holm's correction over them."""
    found = [(test, _paired(results, test, rates)) for test in claim.tests]
    adjusted = holm([1.0 if paired is None else paired.probability for _, paired in found])
    return [Outcome(test, paired, value) for (test, paired), value in zip(found, adjusted, strict=True)]


def _paired(results: Results, test: Test, rates: str) -> Paired | None:
    if test.than == BASE:
        return beyond_base(results, test.quantity, test.arm, rates=rates)
    if test.quantity == CLIPPED:
        runs = cell(results, TASK, test.arm, rates).values()
        differences = tuple(share(run, "erc") - share(run, "ppo") for run in runs)
        return Paired(differences) if len(differences) > 1 else None
    return compare(results, test.quantity, test.arm, test.than, rates=rates)


def verdict(found: list[Outcome]) -> str:
    """Of a claim's tests: "holds" and "opposite" where all of them say so, "mixed" where they differ."""
    verdicts = {outcome.verdict for outcome in found}
    return verdicts.pop() if len(verdicts) == 1 else "not run" if "not run" in verdicts else "mixed"


def against_control(results: Results, quantity: str, *, task: str = TASK, rates: str) -> dict[str, Outcome]:
    """Every arm that was run against PPO-clip, with Holm's correction over the arms.

    Float32 arms are compared with PPO-clip in float32.
    """
    found = {}
    for arm in ARMS:
        than = control_of(arm)
        if arm != than and (paired := compare(results, quantity, arm, than, task=task, rates=rates)):
            found[arm] = (Test(quantity, arm, than, "higher"), paired)
    adjusted = holm([paired.probability for _, paired in found.values()])
    return {arm: Outcome(*pair, value) for (arm, pair), value in zip(found.items(), adjusted, strict=True)}


def best_arm(results: Results, quantity: str, rates: str) -> str | None:
    """The arm that is furthest above its control over the first seeds, of those that have all of them."""
    found = {arm: compare(results, quantity, arm, control_of(arm), rates=rates, seeds=SEEDS) for arm in ARMS}
    means = {arm: one.mean for arm, one in found.items() if one and len(one.differences) == len(SEEDS)}
    means = {arm: mean for arm, mean in means.items() if arm != control_of(arm)}
    return max(means, key=lambda arm: means[arm]) if means else None


def control_of(arm: str) -> str:
    """PPO-clip in the precision of an arm."""
    return "ppo-clip-float32" if arm.endswith("-float32") else CONTROL


def regime(results: Results, rates: str = COMMON) -> dict[str, Paired] | None:
    """Whether PPO-clip's entropy collapses and its reward stops rising, over the first seeds; `None` if not run.

    The entropy of the last quarter minus half of the first rollout's, and the reward of the last quarter minus that of
    the quarter before.
    """
    runs = [run for seed, run in cell(results, TASK, CONTROL, rates).items() if seed in SEEDS]
    if len(runs) < 2:
        return None
    ends = [last_quarter(run["entropy"]) - run["entropy"][0] / 2 for run in runs]
    rises = [rise(run["reward"]) for run in runs]
    return {"entropy": Paired(tuple(ends)), "reward": Paired(tuple(rises))}
