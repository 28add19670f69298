"""Figures and tables of `README.md`, between their markers, from `results.jsonl`, as far as there are results:

    python recipes/study/smollm2/page.py

What has not been run yet is left out of the figures, and named in the table of what is missing.
"""

import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import matplotlib
from arms import (
    ARMS,
    BASE,
    MAIN,
    MORE_SEEDS,
    PASS_AT,
    SECOND_TASK,
    SEEDS,
    TASK,
    Results,
    Run,
    base_run,
    remaining,
    tuning_scores,
)
from compare import (
    CLAIMS,
    COMMON,
    CONTROL,
    EQUAL_REWARD,
    PRIMARY,
    QUANTITIES,
    TUNED,
    Outcome,
    against_control,
    best_arm,
    cell,
    compare,
    control_of,
    outcomes,
    regime,
    verdict,
)
from epo_oscillation import put_table
from paired import Paired
from run import read_results

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent
PAGE, RESULTS = FOLDER / "README.md", FOLDER / "results.jsonl"
FIRST_STUDY = {
    "a": "holds, one order of magnitude",
    "b": "does not hold",
    "c": "no effect seen",
    "d": "does not hold",
    "e": "holds at a stronger penalty than published",
    "f": "not seen",
    "": "not tested",
}
"""Verdicts of the first study by the letter of its claim; see its page."""

SYMPTOMS: tuple[tuple[str, str, str, str], ...] = (
    (
        "Entropy collapses while the reward rises",
        "adaptive-entropy",
        "`use_adaptive_entropy`, `entropy_target`",
        EQUAL_REWARD,
    ),
    ("Entropy collapses while the reward rises", "clip-higher", "`epsilon_high: 0.28`", EQUAL_REWARD),
    ("Entropy collapses while the reward rises", "stare", "`stare_target_entropy`", EQUAL_REWARD),
    ("pass@32 falls: answers the model had are lost", "adaptive-entropy", "`use_adaptive_entropy`", "pass@32"),
    ("pass@32 falls: answers the model had are lost", "kl", "`beta: 0.1`", "pass@32"),
    ("The reward rises too slowly", "ce-gppo", "`ce_gppo_alpha1: 0.75`, `ce_gppo_alpha2: 1`", "AUC of reward"),
    ("The reward rises too slowly", "cispo", "`loss_type: cispo`, `epsilon_high: 5`", "AUC of reward"),
    ("The reward stops too low", "clip-higher", "`epsilon_high: 0.28`", "pass@1"),
    ("The reward stops too low", "asyppo", "two LoRA critics", "pass@1"),
    ("Entropy swings from rollout to rollout", "epo", "`epo_coef: 0.02`", "entropy oscillation"),
    (
        "The policy moves too far in a rollout",
        "erc",
        "`erc_low: 0.95`, `erc_high: 1.05`, `cast_lm_head_to_fp32`",
        "pass@1",
    ),
    ("ERC clips too much", "erc-target", "`erc_target_fraction: 0.2`", "pass@1"),
    ("ERC clips too much", "erc-outward", "`erc_side: outward`", "pass@1"),
)
"""What a user sees, an arm that is meant for it, its setting, and the quantity that tells whether it helps."""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def symptom_table(results: Results) -> str:
    """Symptom, control, setting, and what the paired test says, at the own rate where that has been run."""
    rows = []
    for symptom, arm, setting, quantity in SYMPTOMS:
        rates = TUNED if compare(results, quantity, arm, CONTROL, rates=TUNED) else COMMON
        paired = compare(results, quantity, arm, CONTROL, rates=rates)
        rows.append(
            (symptom, f"`{arm}`", setting, quantity, paired or "not run", rates if paired else "-", advice(paired))
        )
    header = ("symptom", "control", "setting", "measured by", "against PPO-clip (seeds)", "at", "expect")
    return table(header, rows)


def advice(paired: Paired | None) -> str:
    """In words, what an interval says."""
    if paired is None:
        return "-"
    if abs(paired.mean) <= paired.half_width:
        return "no difference seen yet" if len(paired.differences) < len(SEEDS) else "no difference seen"
    return "more" if paired.mean > 0 else "less"


def claims_table(results: Results) -> str:
    """The claims with the verdicts of both studies."""
    rows = []
    for number, claim in CLAIMS.items():
        own, common = (outcomes(results, claim, rates) for rates in (TUNED, COMMON))
        rows.append(
            (number, claim.text, claim.source, FIRST_STUDY[claim.before], verdict(own), _shown(own), _shown(common))
        )
    header = ("", "claim", "who", "first study", "here", "tests at own rates", "tests at the common rate")
    return table(header, rows)


def _shown(found: list[Outcome]) -> str:
    return "; ".join(f"{one.paired or 'not run'}{_adjusted(one)}" for one in found)


def _adjusted(outcome: Outcome) -> str:
    return f", p {outcome.adjusted:.3f}" if outcome.paired else ""


def best_table(results: Results) -> str:
    """On each primary endpoint the arm that is best over the first seeds, and what the other seeds say to it."""
    rows = []
    for quantity, rates in product(PRIMARY, (TUNED, COMMON)):
        if arm := best_arm(results, quantity, rates):
            seeds = (SEEDS, MORE_SEEDS, (*SEEDS, *MORE_SEEDS))
            found = (compare(results, quantity, arm, control_of(arm), rates=rates, seeds=of) for of in seeds)
            rows.append((quantity, rates, f"`{arm}`", *(paired or "not run" for paired in found)))
    return table(("", "at", "best of the arms", "seeds 0-4", "seeds 5-9", "all"), rows) if rows else "Not run yet."


def arms_table(results: Results, rates: str, task: str = TASK) -> str:
    """Every arm that was run against PPO-clip, on the primary endpoints; bold: Holm's probability is below 0.05."""
    found = {quantity: against_control(results, quantity, task=task, rates=rates) for quantity in PRIMARY}
    control = cell(results, task, CONTROL, rates)
    rows = [(f"`{CONTROL}` itself", *(_mean(control, quantity) for quantity in PRIMARY))] if control else []
    for arm in ARMS:
        if arm in found[PRIMARY[0]]:
            rows.append((f"`{arm}`", *(_marked(found[quantity][arm]) for quantity in PRIMARY)))
    return table(("arm", *PRIMARY), rows) if rows else "Not run yet."


def _marked(outcome: Outcome) -> str:
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
    """Means over the seeds of every arm that was run, after the model itself."""
    rows = []
    if base := results.get(base_run(TASK).name):
        rows.append(("the model itself", *(f"{QUANTITIES[name](base):.3f}" for name in VALUES[:2]), *["-"] * 4, 1))
    for arm in ARMS:
        if runs := cell(results, TASK, arm, rates):
            means = [statistics.fmean(QUANTITIES[name](run) for run in runs.values()) for name in VALUES]
            rows.append((f"`{arm}`", *(f"{mean:.3f}" for mean in means), len(runs)))
    return table(("arm", *VALUES, "seeds"), rows) if rows else "Not run yet."


def regime_table(results: Results) -> str:
    """Whether PPO-clip collapses and stops rising, as the pre-registration asks."""
    found = regime(results)
    if found is None:
        return "Not run yet."
    collapsed = "yes" if found["entropy"].mean + found["entropy"].half_width < 0 else "not shown"
    risen = "yes" if found["reward"].mean - found["reward"].half_width <= 0 else "no, it still rises"
    rows = [
        ("entropy, last quarter, minus half of the first rollout's", found["entropy"], f"collapsed: {collapsed}"),
        ("reward, last quarter, minus the quarter before", found["reward"], f"has stopped rising: {risen}"),
    ]
    return table(("PPO-clip at the common rate", "mean, 95 % interval (seeds)", ""), rows)


def rates_table(results: Results) -> str:
    """The score of each learning rate in the tuning runs, the best in bold."""
    rows = []
    for task in (TASK, SECOND_TASK):
        for arm in ARMS:
            if scores := tuning_scores(task, arm, results):
                best = max(scores.values())
                shown = (f"{rate:g}: {value:.3f}" for rate, value in sorted(scores.items()))
                marked = (
                    f"**{one}**" if scores[rate] == best else one
                    for rate, one in zip(sorted(scores), shown, strict=True)
                )
                rows.append((task, f"`{arm}`", ", ".join(marked)))
    return table(("task", "arm", "reward over the last half, by rate"), rows) if rows else "Not run yet."


def state_table(results: Results) -> str:
    """How many runs there are, what they took, and what is missing."""
    missing = remaining(results)
    seconds = [result["cpu_seconds"] for name, result in results.items() if Run.parse(name).arm != BASE]
    rows: list[tuple[object, ...]] = [("finished", len(results)), ("missing, at least", len(missing))]
    if seconds:
        each = statistics.fmean(seconds) / 60
        rows += [
            ("minutes of one thread a run", f"{each:.1f}"),
            ("hours of one thread left", f"{each * len(missing) / 60:.0f}"),
        ]
    by_arm = Counter(run.arm for run in missing)
    rows.append(("missing by arm", ", ".join(f"`{arm}` {count}" for arm, count in by_arm.items()) or "nothing"))
    return table(("runs", ""), rows)


def curves_figure(results: Results) -> None:
    """Reward and entropy by rollout, and pass@k, of the main arms at the common rate; means over the seeds."""
    figure, (reward, entropy, passes) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    if base := results.get(base_run(TASK).name):
        passes.plot(PASS_AT, base["pass"].values(), color="black", linestyle="--", label="the model itself")
    for arm in MAIN:
        if runs := list(cell(results, TASK, arm, COMMON).values()):
            reward.plot(_mean_curve([run["reward"] for run in runs]), label=f"{arm} ({len(runs)})")
            entropy.plot(_mean_curve([run["entropy"] for run in runs]))
            passes.plot(PASS_AT, _mean_curve([list(run["pass"].values()) for run in runs]), marker=".")
    reward.set(xlabel="rollout", ylabel="reward")
    entropy.set(xlabel="rollout", ylabel="entropy of the rollout (nats)")
    passes.set(xlabel="k", ylabel="pass@k, held out", xscale="log")
    passes.set_xticks(PASS_AT, PASS_AT)
    passes.minorticks_off()
    reward.legend(title="arm (seeds)", fontsize=8)
    passes.legend()
    _save(figure, "curves")


def effects_figure(results: Results) -> None:
    """Every arm minus PPO-clip on the primary endpoints, with 95 % intervals, at the common rate."""
    figure, columns = plt.subplots(1, len(PRIMARY), figsize=(17, 6), sharey=True, layout="constrained")
    arms = [arm for arm in reversed(ARMS) if arm != CONTROL]
    for axes, quantity in zip(columns, PRIMARY, strict=True):
        for arm, outcome in against_control(results, quantity, rates=COMMON).items():
            paired = outcome.paired
            assert paired is not None
            colour = "black" if outcome.verdict == "not resolved" else "tab:red"
            axes.errorbar(paired.mean, arms.index(arm), xerr=paired.half_width, fmt="o", color=colour)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(xlabel=f"{quantity} minus PPO-clip's")
    columns[0].set_yticks(range(len(arms)), arms)
    figure.suptitle("Paired by seed; red: Holm's probability below 0.05")
    _save(figure, "effects")


def _mean_curve(curves: list[list[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]


def _save(figure: Any, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.png", dpi=80)
    plt.close(figure)


def tables(results: Results) -> dict[str, str]:
    """Every generated table of the page by its marker."""
    return {
        "state": state_table(results),
        "symptoms": symptom_table(results),
        "claims": claims_table(results),
        "best": best_table(results),
        "regime": regime_table(results),
        "arms at own rates": arms_table(results, TUNED),
        "arms at the common rate": arms_table(results, COMMON),
        "values": values_table(results, COMMON),
        "second task": arms_table(results, TUNED, SECOND_TASK),
        "learning rates": rates_table(results),
    }


def main() -> None:
    results = read_results(RESULTS)
    curves_figure(results)
    effects_figure(results)
    text = PAGE.read_text(encoding="utf-8")
    for name, made in tables(results).items():
        text = put_table(text, name, made)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
