"""Figures and tables of `README.md`, between their markers, from `results.jsonl`, as far as there are results:

    python recipes/study/smollm2/page.py

What has not been run yet is left out of the figures, and named in the table of what is missing.
"""

import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from arms import (
    ARMS,
    BASE,
    BEST,
    DECISIVE,
    SECOND_TASK,
    SEEDS,
    TASK,
    Results,
    Run,
    base_run,
    best_rate,
    failed,
    tuned_rate,
    tuning_scores,
)
from compare import (
    COMMON,
    QUANTITIES,
    TUNED,
    Beating,
    Outcome,
    against_control,
    beating,
    cell,
    compare,
    last_quarter,
    outcomes,
    regime,
    verdict,
)
from curves import curves_figure, effects_figure
from epo_oscillation import put_table
from paired import Paired
from plan import best_pair, extra_arm, remaining
from registered import CLAIMS, CONTROL, DECIDING, EQUAL_REWARD, LAST_CLAIM, PRIMARY
from run import read_results

FOLDER = Path(__file__).parent
PAGE, RESULTS = FOLDER / "README.md", FOLDER / "results.jsonl"
SET_ASIDE = FOLDER / "set-aside.jsonl"
"""Runs of 96 steps, too short for PPO-clip to stop rising."""


@dataclass(frozen=True)
class Symptom:
    """What a user sees, and an arm that is meant for it.

    Attributes:
        seen: In words.
        quantity: What tells whether the arm helps.
        arm: The arm.
        setting: Its fields.
        than: What it is compared with.
        lower: Whether less of the quantity is better.
    """

    seen: str
    quantity: str
    arm: str
    setting: str
    than: str = CONTROL
    lower: bool = False


COLLAPSES = "Entropy collapses while the reward rises"
LOST = "pass@32 stops too low"
SLOW, LOW = "The reward rises too slowly", "The reward stops too low"
CE_GPPO, ERC = (
    "`ce_gppo_alpha1: 0.75`, `ce_gppo_alpha2: 1`",
    "`erc_low: 0.95`, `erc_high: 1.05`, `cast_lm_head_to_fp32`",
)
STEERED, TOO_FAR = "`target_entropy: 0.5`, `target_entropy_by: coefficient`", "The policy moves too far in a rollout"
SYMPTOMS = (
    Symptom(COLLAPSES, EQUAL_REWARD, "adaptive-entropy", STEERED),
    Symptom(COLLAPSES, EQUAL_REWARD, "kl", "`beta: 0.1`"),
    Symptom(COLLAPSES, EQUAL_REWARD, "clip-higher", "`epsilon_high: 0.28`"),
    Symptom(COLLAPSES, EQUAL_REWARD, "stare", "`stare_target_entropy: 0.5`"),
    Symptom(LOST, "pass@32", "adaptive-entropy", STEERED),
    Symptom(LOST, "pass@32", "kl", "`beta: 0.1`"),
    Symptom(SLOW, "AUC of reward", "ce-gppo", CE_GPPO),
    Symptom(SLOW, "AUC of reward", "cispo", "`loss_type: cispo`, `epsilon_high: 5`"),
    Symptom(LOW, "pass@1", "clip-higher", "`epsilon_high: 0.28`"),
    Symptom(LOW, "pass@1", "asyppo", "two LoRA critics"),
    Symptom("Entropy swings from rollout to rollout", "entropy oscillation", "epo", "`epo_coef: 0.02`", lower=True),
    Symptom(TOO_FAR, "clipped by PPO", "erc", ERC, lower=True),
    Symptom(TOO_FAR, "pass@1", "erc", ERC),
    Symptom("ERC clips too much", "pass@1", "erc-target", "`erc_target_fraction: 0.2`", than="erc"),
    Symptom("ERC clips too much", "pass@1", "erc-outward", "`erc_side: outward`", than="erc"),
)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def symptom_table(results: Results) -> str:
    """What the paired test of each row says: at the own rates, once these have been run with the first seeds."""
    rows = []
    for one in SYMPTOMS:
        tests = {rates: compare(results, one.quantity, one.arm, one.than, rates=rates) for rates in (TUNED, COMMON)}
        own = tests[TUNED]
        rates = TUNED if own and len(own.differences) >= len(SEEDS) else COMMON
        paired = tests[rates]
        shown = (paired, rates, advice(paired, one.lower)) if paired else ("not run", "-", "-")
        without = f"`{one.than}`: {_without(results, one, rates)}"
        rows.append((one.seen, without, f"`{one.arm}`", one.setting, one.quantity, *shown))
    header = (
        "symptom",
        "without the control",
        "control",
        "setting",
        "measured by",
        "difference (seeds)",
        "at",
        "expect",
    )
    return table(header, rows)


def _without(results: Results, symptom: Symptom, rates: str) -> str:
    """How far the symptom shows in the runs that the control is compared with."""
    runs = cell(results, TASK, symptom.than, rates)
    if not runs:
        return "not run"
    if symptom.quantity == EQUAL_REWARD:
        ends = ([run["entropy"][0] for run in runs.values()], [last_quarter(run["entropy"]) for run in runs.values()])
        return "entropy from {:.2f} to {:.2f}".format(*map(statistics.fmean, ends))
    mean, base = _mean(runs, symptom.quantity).partition(" ")[0], results.get(base_run(TASK).name)
    return f"from {QUANTITIES[symptom.quantity](base):.3f} to {mean}" if base and symptom.seen == LOST else mean


def advice(paired: Paired, lower: bool) -> str:
    """In words, what an interval says."""
    so_far = " so far" if len(paired.differences) < len(SEEDS) else ""
    if abs(paired.mean) <= paired.half_width:
        return "no difference seen" + so_far
    return ("better" if (paired.mean < 0) == lower else "worse") + so_far


def claims_table(results: Results) -> str:
    """The claims with the verdicts of both studies."""
    rows = []
    for number, claim in CLAIMS.items():
        own, common = (outcomes(results, claim, rates) for rates in (TUNED, COMMON))
        rows.append((number, claim.text, claim.source, claim.first, verdict(own), _shown(own), _shown(common)))
    last = LAST_CLAIM
    rows.append((len(rows) + 1, last.text, last.source, last.first, last_verdict(results), "see below", "see below"))
    header = ("", "claim", "who", "first study", "here", "tests at own rates", "tests at the common rate")
    return table(header, rows)


def _shown(found: list[Outcome]) -> str:
    return "; ".join(f"{one.paired or 'not run'}{_adjusted(one)}" for one in found)


def _adjusted(outcome: Outcome) -> str:
    return f", p {outcome.adjusted:.3f}" if outcome.paired else ""


def ten_seed_arms(results: Results) -> list[str]:
    """The arms that ten seeds are registered for, as far as they are chosen."""
    return [arm for arm in (*DECISIVE, extra_arm(results), BEST) if arm and arm != CONTROL]


def last_verdict(results: Results) -> str:
    """Of the claim that a control beats PPO-clip: at own rates, on any of its endpoints."""
    arms = ten_seed_arms(results)
    found = [beating(results, quantity, TUNED, arms) for quantity in DECIDING]
    if not any(one.family for one in found):
        return "not run"
    complete = all(set(one.family) == set(arms) for one in found) and extra_arm(results)
    return ("holds" if any(one.holds for one in found) else "not resolved") + ("" if complete else " so far")


def best_table(results: Results) -> str:
    """The last claim on each endpoint: the arms with ten seeds, and the best one of the first seeds on the others."""
    rows = []
    for quantity, rates in product(DECIDING, (TUNED, COMMON)):
        found = beating(results, quantity, rates, ten_seed_arms(results))
        if found.best:
            later = f"{found.later}, p {found.later.probability:.3f}" if found.later else "not run"
            rows.append((quantity, rates, _top(found), f"`{found.best}`", found.first, later))
    header = ("", "at", "of the arms with ten seeds", "best over seeds 0-4", "over these", "over seeds 5-9 alone")
    return table(header, rows) if rows else "Not run yet."


def _top(found: Beating) -> str:
    if not found.family:
        return "not run"
    top = found.top
    return f"`{top.test.arm}` {top.paired}{_adjusted(top)}" if top else "none above PPO-clip"


def arms_table(results: Results, rates: str, task: str = TASK) -> str:
    """Every arm that was run against PPO-clip, on the primary endpoints; bold: Holm's probability is below 0.05."""
    found = {quantity: against_control(results, quantity, task=task, rates=rates) for quantity in PRIMARY}
    control = cell(results, task, CONTROL, rates)
    rows = [(f"`{CONTROL}` itself", *(_mean(control, quantity) for quantity in PRIMARY))] if control else []
    for arm in (*ARMS, BEST):
        if any(arm in family for family in found.values()):
            rows.append((f"`{arm}`", *(_marked(found[quantity].get(arm)) for quantity in PRIMARY)))
    return table(("arm", *PRIMARY), rows) if rows else "Not run yet."


def _marked(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    return f"**{outcome.paired}**" if outcome.verdict in ("holds", "opposite") else str(outcome.paired)


def _mean(runs: dict[int, dict[str, Any]], quantity: str) -> str:
    if quantity == EQUAL_REWARD:
        return "-"
    return f"{statistics.fmean(QUANTITIES[quantity](run) for run in runs.values()):.3f} ({len(runs)})"


VALUES = (
    "pass@1",
    "pass@32",
    "reward, last quarter",
    "entropy, last quarter",
    "outside ERC's bounds",
    "clipped by PPO",
)


def values_table(results: Results, rates: str) -> str:
    """Means over the seeds of every arm that was run, and how many end with a lower pass@1 than the model itself."""
    rows, base = [], results.get(base_run(TASK).name)
    if base:
        rows.append(("the model itself", *(f"{QUANTITIES[name](base):.3f}" for name in VALUES[:2]), *["-"] * 5))
    for arm in (*ARMS, BEST):
        if runs := cell(results, TASK, arm, rates):
            means = [statistics.fmean(QUANTITIES[name](run) for run in runs.values()) for name in VALUES]
            below = sum(run["pass"]["1"] < base["pass"]["1"] for run in runs.values()) if base else "-"
            rows.append((f"`{arm}`", *(f"{mean:.3f}" for mean in means), f"{below} of {len(runs)}"))
    return table(("arm", *VALUES, "seeds that end below the model"), rows) if rows else "Not run yet."


def regime_table(results: Results, set_aside: Results | None = None) -> str:
    """Whether PPO-clip collapses and stops rising, as registered, and so in the runs that were set aside."""
    header = ("PPO-clip at the common rate", "mean, 95 % interval (seeds)", "")
    rows = [*_regime_rows(results, ""), *_regime_rows(set_aside or {}, "; set aside, 96 steps")]
    return table(header, rows) if rows else "Not run yet."


def _regime_rows(results: Results, which: str) -> list[tuple[object, ...]]:
    found = regime(results)
    if found is None:
        return []
    undecided = None if len(found["entropy"].differences) == len(SEEDS) else "undecided until all five seeds are there"
    collapsed = undecided or ("yes" if found["entropy"].mean < 0 else "no")
    risen = undecided or ("yes" if found["reward"].mean - found["reward"].half_width <= 0 else "no, it still rises")
    ends = "entropy, last quarter, minus half of the first rollout's"
    rises = "reward, last quarter, minus the quarter before"
    return [
        (ends + which, found["entropy"], f"collapsed: {collapsed}"),
        (rises + which, found["reward"], f"has stopped rising: {risen}"),
    ]


def rates_table(results: Results) -> str:
    """The score of each learning rate in the tuning runs, the best in bold."""
    rows = []
    for task in (TASK, SECOND_TASK):
        for arm in (*ARMS, BEST):
            if scores := tuning_scores(task, arm, results):
                best = best_rate(scores) if tuned_rate(task, arm, results) else None
                shown = {rate: f"{rate:g}: {score:.3f}" for rate, score in sorted(scores.items())}
                marked = (f"**{text}**" if rate == best else text for rate, text in shown.items())
                rows.append((task, f"`{arm}`", ", ".join(marked) + ("" if best else " (not finished)")))
    return table(("task", "arm", "reward over the last half, by rate"), rows) if rows else "Not run yet."


def state_table(results: Results) -> str:
    """How many runs there are, what they took, and what is missing."""
    missing = remaining(results)
    done = {name: result for name, result in results.items() if not failed(result)}
    seconds = [result["cpu_seconds"] for name, result in done.items() if Run.parse(name).arm != BASE]
    rows: list[tuple[object, ...]] = [("finished", len(done)), ("missing, at least", len(missing))]
    if broken := [name for name, result in results.items() if failed(result)]:
        rows.insert(1, ("ended with an error", ", ".join(f"`{name}`" for name in broken)))
    if emulated := sum("products" in result for result in done.values()):
        rows.append(("of the finished, on a processor without bfloat16 instructions", emulated))
    if seconds:
        each = statistics.fmean(seconds) / 60
        rows += [
            ("minutes of one thread a run", f"{each:.1f}"),
            ("hours of one thread left, at least", f"{each * len(missing) / 60:.0f}"),
        ]
    chosen = {
        "an eleventh control with seeds 5 to 9": extra_arm(results),
        "the controls of `best`": best_pair(results),
    }
    if waiting := [what for what, choice in chosen.items() if choice is None]:
        rows.append(("not in these numbers, since earlier runs choose it", ", ".join(waiting)))
    by_arm = Counter(run.arm for run in missing)
    rows.append(("missing by arm", ", ".join(f"`{arm}` {count}" for arm, count in by_arm.items()) or "nothing"))
    return table(("runs", ""), rows)


def tables(results: Results, set_aside: Results | None = None) -> dict[str, str]:
    """Every generated table of the page by its marker."""
    return {
        "state": state_table(results),
        "symptoms": symptom_table(results),
        "claims": claims_table(results),
        "best": best_table(results),
        "regime": regime_table(results, set_aside),
        "arms at own rates": arms_table(results, TUNED),
        "arms at the common rate": arms_table(results, COMMON),
        "values": values_table(results, COMMON),
        "second task": arms_table(results, TUNED, SECOND_TASK),
        "learning rates": rates_table(results),
    }


def main() -> None:
    results = read_results(RESULTS)
    curves_figure(results, FOLDER)
    effects_figure(results, FOLDER)
    text = PAGE.read_text(encoding="utf-8")
    for name, made in tables(results, read_results(SET_ASIDE)).items():
        text = put_table(text, name, made)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
