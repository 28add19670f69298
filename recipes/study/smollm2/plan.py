"""The order of the study's runs, as `PREREGISTRATION.md` says, and the arms that earlier runs choose."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from arms import (
    ARMS,
    BASE,
    BEST,
    DECISIVE,
    MAIN,
    MIDDLE_RATE,
    MORE_SEEDS,
    REST,
    SECOND_TASK,
    SEEDS,
    TASK,
    TRAINING,
    TUNING_SEEDS,
    Results,
    Run,
    base_run,
    failed,
    missing_rates,
    tuned_rate,
    tuning_scores,
)
from compare import COMMON, TUNED, against_control, compare, runs_of
from registered import CONTROL, PRIMARY

from trl_entropy import AsyPPOConfig, EntropyGRPOConfig

NOT_SINGLE = (CONTROL, "ppo-clip-float32", "erc-float32", "erc+ce-gppo", "ppo-critic")
"""Arms that are none of the single controls in bfloat16."""


def make_config(settings: dict[str, Any]) -> EntropyGRPOConfig:
    """The configuration of the trainer that some settings need, beside those of all arms."""
    return (AsyPPOConfig if "num_critics" in settings else EntropyGRPOConfig)(**TRAINING | settings)


def compatible(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two arms' settings are of different fields, or equal, and the trainer takes both."""
    if any(second.get(name, value) != value for name, value in first.items()):
        return False
    try:
        make_config(first | second | {"output_dir": "unused"})
    except ValueError:
        return False
    return True


def all_tried(results: Results, arms: Sequence[str], rates: str) -> bool:
    """Whether every run of some arms with the first seeds is there, failed or not."""
    names = [run.name for arm in arms for run in runs_of(results, TASK, arm, rates, SEEDS)]
    found = [results.get(name, {}) for name in names]
    return len(names) == len(SEEDS) * len(arms) and all("pass" in result or failed(result) for result in found)


def extra_arm(results: Results) -> str | None:
    """The arm outside `DECISIVE` that gets ten seeds too; `None` while runs that choose it are missing.

    The one with the smallest adjusted probability in any primary endpoint, at own rates, over the first five seeds.
    """
    if not all_tried(results, list(ARMS), TUNED):
        return None
    # of the arms that were there when it was chosen: without the best combination, which comes later
    of = {"rates": TUNED, "arms": list(ARMS), "seeds": SEEDS}
    families = [against_control(results, quantity, **of) for quantity in PRIMARY]
    found = {arm: min(family[arm].adjusted for family in families if arm in family) for arm in set().union(*families)}
    others = [arm for arm in ARMS if arm in found and arm not in DECISIVE]
    return min(others, key=lambda arm: found[arm], default=None)


def best_pair(results: Results) -> tuple[str, str] | None:
    """The two controls of the arm `best`; `None` while runs that choose them are missing.

    The one with the largest mean gain in pass@1 and the one with the largest in pass@32, at the common rate over the
    first five seeds. Where these are the same, the next in pass@1; where they exclude each other, the next in pass@32.
    """
    singles = [arm for arm in ARMS if arm not in NOT_SINGLE]
    if not all_tried(results, [CONTROL, *singles], COMMON):
        return None
    by_first, by_second = (_ranked(results, singles, quantity) for quantity in ("pass@1", "pass@32"))
    first = by_first[0]
    others = by_first if by_second[0] == first else by_second
    return first, next(arm for arm in others if arm != first and compatible(ARMS[first], ARMS[arm]))


def _ranked(results: Results, arms: list[str], quantity: str) -> list[str]:
    found = {arm: compare(results, quantity, arm, CONTROL, rates=COMMON, seeds=SEEDS) for arm in arms}
    means = {arm: paired.mean for arm, paired in found.items() if paired}
    return sorted(means, key=lambda arm: -means[arm])


def settings_of(arm: str, results: Results) -> dict[str, Any]:
    """What an arm sets; for the best combination, what both of its controls do.

    Raises:
        LookupError: If it is the best combination, and runs that choose it are missing.
    """
    if arm != BEST:
        return ARMS[arm]
    pair = best_pair(results)
    if pair is None:
        raise LookupError(f"{BEST!r} is chosen by the single controls' runs at the common rate: some are missing.")
    return ARMS[pair[0]] | ARMS[pair[1]]


def plan(results: Results, arms: Sequence[str] = (BASE, *ARMS, BEST)) -> Iterator[Run]:
    """Every run of some arms, in order; `results` has those that came before by the time the next one is asked for.

    What other arms' runs have to choose is left out while these are missing.
    """
    if BASE in arms:
        yield from (base_run(task) for task in (TASK, SECOND_TASK))
    if CONTROL in arms:
        # first, whether its entropy collapses and its reward stops rising
        yield from (Run(TASK, CONTROL, MIDDLE_RATE, seed) for seed in SEEDS)
    for stage, seeds in ((MAIN, (*SEEDS, *MORE_SEEDS)), (REST, SEEDS)):
        chosen = [arm for arm in stage if arm in arms]
        yield from (Run(TASK, arm, MIDDLE_RATE, seed) for seed in SEEDS for arm in chosen)
        yield from _tuned(TASK, chosen, seeds, results)
    decisive = [arm for arm in (*DECISIVE, extra_arm(results)) if arm in arms]
    yield from _tuned(TASK, decisive, MORE_SEEDS, results)
    if BEST in arms and best_pair(results):
        yield from (Run(TASK, BEST, MIDDLE_RATE, seed) for seed in SEEDS)
        yield from _tuned(TASK, [BEST], (*SEEDS, *MORE_SEEDS), results)
        decisive.append(BEST)
    yield from _tuned(SECOND_TASK, [arm for arm in MAIN if arm in arms], SEEDS, results)
    yield from (Run(TASK, arm, MIDDLE_RATE, seed) for seed in MORE_SEEDS for arm in decisive)  # these decide nothing


def _tuned(task: str, arms: list[str], seeds: tuple[int, ...], results: Results) -> Iterator[Run]:
    """The tuning runs of some arms that are not done yet, then their runs at the rates that these chose."""
    for arm in arms:
        while rates := missing_rates(tuning_scores(task, arm, results)):
            yield from (Run(task, arm, rate, seed) for rate, seed in product(rates, TUNING_SEEDS))
    for seed in seeds:
        for arm in arms:
            rate = tuned_rate(task, arm, results)
            assert rate is not None
            yield Run(task, arm, rate, seed)


def remaining(results: Results, arms: Sequence[str] = (BASE, *ARMS, BEST)) -> list[Run]:
    """The runs still to do if no grid has to grow and every best rate not known yet is the middle one.

    Without those of arms that are not chosen yet.
    """
    pretended, missing = dict(results), []
    for run in plan(pretended, arms):
        if run.name not in pretended:
            missing.append(run)
            pretended[run.name] = {"reward": [float(run.learning_rate == MIDDLE_RATE)]}
    return missing
