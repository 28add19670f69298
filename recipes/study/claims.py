"""What the papers claim, as differences between two arms' runs, and what the study's results say to each."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from probes import RATIO_BINS
from run import Results, last_half, tuned_learning_rate, tuned_runs
from settings import (
    ALPHA_ARMS,
    ALPHAS_DEGREE,
    COMMON_LEARNING_RATE,
    COMMON_TASK,
    DEGREES,
    SEEDS,
    STEEP_DEGREE,
    STEEP_LEARNING_RATE,
    with_seeds,
)
from settings import TUNED as TUNED_ARMS

from trl_entropy.evaluation.estimates import half_width

TUNED = "tuned"
"""Setting: every arm at its own learning rate, degree 8. Other settings are degrees, at the common learning rate."""
STEEP = "steep"
"""Setting: the degree and the learning rate at which PPO-clip comes apart."""
Setting = str | int
Result = dict[str, Any]


def interval(values: list[float]) -> str:
    """Mean and `half_width`, with two digits of the latter but at least three decimals."""
    half = half_width(values)
    decimals = max(3, 1 - math.floor(math.log10(half))) if half else 3
    return f"{statistics.fmean(values):.{decimals}f} ± {half:.{decimals}f}"


def oscillation(values: list[float]) -> float:
    """Standard deviation of the change from one optimizer step to the next."""
    return statistics.stdev(after - before for before, after in pairwise(values))


def share(result: Result, of: str) -> float:
    """Share of all tokens that `"erc"` or `"ppo"` clips, or would."""
    counts = result["tokens"]["by_ratio"]
    return sum(counts[of]) / sum(counts["all"])


def clipped_minus_kept(result: Result, name: str) -> float:
    """Mean entropy or |log importance ratio| of the tokens outside ERC's bounds, minus that of the tokens inside."""
    sums, counts = result["tokens"][name], result["tokens"]["by_ratio"]
    outside, total = sum(counts["erc"]), sum(counts["all"])
    return sums["erc"] / max(outside, 1) - (sums["all"] - sums["erc"]) / (total - outside)


def near_boundary(result: Result) -> float:
    """Share of tokens with |log ratio| of 0.1 or more among those outside ERC's bounds, divided by the same inside."""
    counts, first = result["tokens"]["by_ratio"], RATIO_BINS.index(0.1) + 1
    (far, outside), (far_all, total) = ((sum(counts[of][first:]), sum(counts[of])) for of in ("erc", "all"))
    return far / outside / ((far_all - far) / (total - outside))


QUANTITIES: dict[str, Callable[[Result], float]] = {
    "success": lambda result: result["accuracy"],
    "pass@8": lambda result: result["pass_at_8"],
    "reward, last half": lambda result: last_half(result["reward"]),
    "entropy, last half": lambda result: last_half(result["probe_entropy"]),
    "entropy change": lambda result: result["probe_entropy"][-1] - result["probe_entropy"][0],
    "entropy drift": lambda result: abs(result["probe_entropy"][-1] - result["probe_entropy"][0]),
    "entropy oscillation": lambda result: oscillation(result["probe_entropy"]),
    "gradient norm": lambda result: statistics.fmean(result["grad_norm"]),
    "gradient norm, relative spread": lambda result: (
        statistics.stdev(result["grad_norm"]) / statistics.fmean(result["grad_norm"])
    ),
    "outside ERC's bounds": lambda result: share(result, "erc"),
    "clipped by PPO": lambda result: share(result, "ppo"),
    "ratio of the two": lambda result: share(result, "erc") / share(result, "ppo"),
    "entropy, outside - inside": lambda result: clipped_minus_kept(result, "sum_entropy"),
    "abs(log ratio), outside - inside": lambda result: clipped_minus_kept(result, "sum_ratio"),
    "abs(log ratio) over 0.1, outside / inside": near_boundary,
    "spread of the critics": lambda result: result["value_std"],
    "explained variance": lambda result: result["explained_variance"],
}
"""Of one run; entropies in nats, on the same held-out tokens all along; `success` is on problems not trained on."""


@dataclass(frozen=True)
class Test:
    """A claim as "`quantity` of `arm` is higher (or lower) than that of `than`".

    Attributes:
        claim: Letter of the claim, or the table of what explains its result.
        quantity: Of `QUANTITIES`.
        arm: The method.
        than: What it is compared with.
        expected: `"higher"`, `"lower"`, or `"same"` where the claim is that there is no difference.
        cells: Task and setting of each comparison.
    """

    claim: str
    quantity: str
    arm: str
    than: str
    expected: str
    cells: tuple[tuple[str, Setting], ...]


COMMON: tuple[tuple[str, Setting], ...] = (*((COMMON_TASK, degree) for degree in DEGREES), (COMMON_TASK, STEEP))
HARD: tuple[tuple[str, Setting], ...] = ((COMMON_TASK, STEEP_DEGREE), (COMMON_TASK, STEEP))
SINGLE_TURN = (("arithmetic", TUNED), ("spell_backward", TUNED))
SPELLING = (("spell_backward", TUNED),)
MULTI_TURN = (("corridor", TUNED),)
WITH_CORRIDOR = (*SINGLE_TURN, *MULTI_TURN)
WITH_CRITICS = (("arithmetic", TUNED), *MULTI_TURN)

TESTS = (
    *(
        Test("b", quantity, "erc", "dapo", "lower", COMMON)
        for quantity in (
            "entropy oscillation",
            "entropy drift",
            "gradient norm",
            "gradient norm, relative spread",
        )
    ),
    Test("b", "entropy oscillation", "erc", "kl", "lower", COMMON),
    Test("b", "entropy oscillation", "erc", "bonus", "lower", COMMON),
    Test("b", "success", "erc", "dapo", "higher", (*COMMON, *WITH_CORRIDOR)),
    Test("b", "success", "erc", "kl", "higher", (*COMMON, *SINGLE_TURN)),
    Test("b", "success", "erc", "bonus", "higher", (*COMMON, *SINGLE_TURN)),
    Test("b", "success", "erc", "ce-gppo-0-1", "higher", SPELLING),
    Test("b", "success", "kl", "dapo", "higher", COMMON),
    Test("b explained", "success", "erc-wide", "erc", "higher", HARD),
    Test("b explained", "success", "erc-wide", "dapo", "higher", HARD),
    Test("b explained", "success", "erc-random", "erc", "same", HARD),
    Test("b explained", "success", "erc-away", "erc", "higher", (*HARD, *MULTI_TURN)),
    Test("b explained", "success", "erc-away", "dapo", "higher", (*HARD, *MULTI_TURN)),
    Test("b explained", "entropy oscillation", "erc-away", "dapo", "lower", HARD),
    Test("c", "success", "erc+gppo", "gppo", "higher", SINGLE_TURN),
    Test("c", "success", "erc+gspo", "gspo", "higher", SINGLE_TURN),
    Test("d", "entropy drift", "ce-gppo", "ppo-clip", "lower", COMMON),
    Test("d", "entropy drift", "ce-gppo", "dapo", "lower", COMMON),
    Test("d", "success", "ce-gppo", "ppo-clip", "higher", COMMON),
    Test("d", "success", "gppo", "ppo-clip", "higher", COMMON),
    Test("d", "success", "ce-gppo", "ppo-clip", "higher", WITH_CORRIDOR),
    Test("d", "success", "ce-gppo", "dapo", "higher", WITH_CORRIDOR),
    Test("d", "success", "ce-gppo", "ce-gppo-0-1", "higher", SPELLING),
    Test("d", "entropy, last half", "ce-gppo-0-1", "dapo", "same", COMMON),
    Test("d", "entropy, last half", "dapo", "ppo-clip", "higher", COMMON),
    Test("d", "entropy, last half", "ce-gppo-0-1", "ppo-clip", "higher", COMMON),
    Test("e", "entropy oscillation", "epo", "ppo-clip", "lower", MULTI_TURN),
    Test("e", "success", "epo", "ppo-clip", "higher", MULTI_TURN),
    Test("f", "success", "asyppo", "ppo-clip", "higher", WITH_CRITICS),
    Test("f", "success", "asyppo", "dapo", "higher", WITH_CRITICS),
    Test("f", "success", "asyppo", "ppo-small", "higher", WITH_CRITICS),
    Test("f", "success", "asyppo", "ppo-symmetric", "higher", WITH_CRITICS),
    Test("f", "spread of the critics", "asyppo", "asyppo-shared-data", "higher", MULTI_TURN),
    Test("f", "explained variance", "asyppo", "asyppo-shared-data", "lower", MULTI_TURN),
    Test("f", "success", "asyppo", "asyppo-shared-data", "higher", MULTI_TURN),
    Test("f", "success", "asyppo", "asyppo-entropy-mask", "higher", MULTI_TURN),
    Test("g", "success", "asyppo+ce-gppo", "asyppo", "higher", MULTI_TURN),
    Test("g", "success", "asyppo+erc", "asyppo", "higher", MULTI_TURN),
    Test("g", "success", "asyppo+epo", "asyppo", "higher", MULTI_TURN),
    Test("g", "success", "asyppo+epo", "epo", "higher", MULTI_TURN),
    Test("g", "success", "ce-gppo+epo", "epo", "higher", MULTI_TURN),
    Test("g", "success", "ce-gppo+epo", "ce-gppo", "higher", MULTI_TURN),
    Test("g", "success", "erc+ce-gppo", "ce-gppo", "higher", SINGLE_TURN),
    Test("g", "success", "erc+ce-gppo", "erc", "higher", SINGLE_TURN),
)


@dataclass(frozen=True)
class Outcome:
    """A test in one cell: the differences by seed, and what they say."""

    test: Test
    task: str
    setting: Setting
    differences: list[float]

    @property
    def verdict(self) -> str:
        """Whether the 95 % interval of the mean difference leaves out 0, and on which side."""
        mean = statistics.fmean(self.differences)
        half = half_width(self.differences)
        seen = "higher" if mean > half else "lower" if mean < -half else "same"
        if seen == self.test.expected:
            return "no difference seen" if seen == "same" else "holds"
        return "not resolved" if seen == "same" else "opposite" if self.test.expected != "same" else "differs"


def cell(results: Results, task: str, setting: Setting, arm: str) -> list[Result]:
    """The results of an arm's runs, one per seed."""
    if setting == TUNED:
        runs = tuned_runs(task, arm, results)
    elif setting == STEEP:
        runs = with_seeds(task, arm, STEEP_DEGREE, STEEP_LEARNING_RATE)
    else:
        assert isinstance(setting, int)
        runs = with_seeds(task, arm, setting, COMMON_LEARNING_RATE)
    return [results[run.name] for run in runs]


def outcomes(results: Results, tests: tuple[Test, ...] = TESTS) -> Iterator[Outcome]:
    """Every test in every one of its cells."""
    for test in tests:
        quantity = QUANTITIES[test.quantity]
        for task, setting in test.cells:
            pairs = zip(cell(results, task, setting, test.arm), cell(results, task, setting, test.than), strict=True)
            yield Outcome(test, task, setting, [quantity(own) - quantity(other) for own, other in pairs])


def outcome_table(results: Results, claim: str) -> str:
    """Markdown table of a claim's tests: paired differences with their 95 % intervals, and verdicts."""
    lines = ["| quantity | arm | than | claim | task, setting | difference | |", "|---" * 7 + "|"]
    for outcome in outcomes(results, tuple(test for test in TESTS if test.claim == claim)):
        test = outcome.test
        where = _where(outcome.task, outcome.setting)
        cells = [test.quantity, test.arm, test.than, test.expected, where, interval(outcome.differences)]
        lines.append("| " + " | ".join([*cells, outcome.verdict]) + " |")
    return "\n".join(lines)


def value_table(results: Results, cells: list[tuple[str, Setting, str]], names: list[str]) -> str:
    """Markdown table of quantities of arms: mean over the seeds with its 95 % interval."""
    lines = ["| task, setting | arm | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for task, setting, arm in cells:
        runs = cell(results, task, setting, arm)
        values = [interval([QUANTITIES[name](run) for run in runs]) for name in names]
        lines.append(f"| {_where(task, setting)} | {arm} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def alpha_slopes(results: Results, quantity: str) -> dict[str, list[float]]:
    """Least-squares slopes of a quantity against CE-GPPO's two weights over the whole grid, one per seed."""
    slopes: dict[str, list[float]] = {"alpha1": [], "alpha2": []}
    grid = {pair: cell(results, COMMON_TASK, ALPHAS_DEGREE, arm) for pair, arm in ALPHA_ARMS.items()}
    for seed in range(len(SEEDS)):
        for axis, name in enumerate(slopes):
            points = [(pair[axis], QUANTITIES[quantity](runs[seed])) for pair, runs in grid.items()]
            # the grid is balanced, so each slope is that of the joint fit as well
            slopes[name].append(statistics.linear_regression(*zip(*points, strict=True)).slope)
    return slopes


def slope_table(results: Results, quantities: list[str]) -> str:
    """Markdown table of `alpha_slopes`: mean over the seeds with its 95 % interval."""
    lines = ["| quantity | per 1 of alpha1 | per 1 of alpha2 |", "|---|---|---|"]
    for quantity in quantities:
        lines.append(f"| {quantity} | " + " | ".join(map(interval, alpha_slopes(results, quantity).values())) + " |")
    return "\n".join(lines)


def tuning_table(results: Results) -> str:
    """Markdown table of the learning rate that each arm's tuning chose."""
    lines = ["| arm | " + " | ".join(TUNED_ARMS) + " |", "|---" * (len(TUNED_ARMS) + 1) + "|"]
    for arm in dict.fromkeys(arm for arms in TUNED_ARMS.values() for arm in arms):
        rates = [
            f"{tuned_learning_rate(task, arm, results):g}" if arm in arms else "-" for task, arms in TUNED_ARMS.items()
        ]
        lines.append(f"| {arm} | " + " | ".join(rates) + " |")
    return "\n".join(lines)


def _where(task: str, setting: Setting) -> str:
    return f"{task}, {setting}" if isinstance(setting, str) else f"{task}, degree {setting}"
