"""Figures of the study, and the tables of `README.md` between their markers, from `results.jsonl`:

    python recipes/study/report.py

What has not been run yet is an error that names the missing run.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from claims import (
    QUANTITIES,
    STEEP,
    TESTS,
    TUNED,
    Setting,
    cell,
    outcome_table,
    slope_table,
    tuning_table,
    value_table,
)
from epo_oscillation import put_table
from probes import ENTROPY_BINS, RATIO_BINS
from run import Results, read_results
from settings import (
    ABLATIONS,
    ALPHA_ARMS,
    ALPHAS,
    ALPHAS_DEGREE,
    COMMON_TASK,
    CRITIC_ARMS,
    DEGREE,
    DEGREE_ARMS,
    DEGREES,
    ON_POLICY_ARMS,
    SEEDS,
    STEEP_DEGREE,
    TASKS,
)
from settings import TUNED as TUNED_ARMS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from trl_entropy.evaluation.estimates import half_width

FOLDER = Path(__file__).parent
PAGE = FOLDER / "README.md"
SMOOTHED = 8  # optimizer steps of a gradient norm's moving mean


def clipping_figure(results: Results) -> None:
    """Shares of tokens that ERC and PPO-clip clip: by off-policy degree, by importance ratio, by entropy."""
    figure, (by_degree, by_ratio, by_entropy) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name, label in {"outside ERC's bounds": "outside ERC's bounds", "clipped by PPO": "clipped by PPO"}.items():
        runs = [cell(results, COMMON_TASK, degree, "dapo") for degree in DEGREES]
        _with_intervals(by_degree, DEGREES, [[QUANTITIES[name](run) for run in of] for of in runs], label)
    by_degree.set(xlabel="optimizer steps per rollout", ylabel="share of tokens", yscale="log", xticks=DEGREES)
    by_degree.legend()
    counted = cell(results, COMMON_TASK, DEGREE, "dapo")
    _rates(by_ratio, counted, "by_ratio", RATIO_BINS)
    by_ratio.set(xlabel="abs(log importance ratio), from", ylabel="share of the bin's tokens")
    _rates(by_entropy, counted, "by_entropy", ENTROPY_BINS)
    by_entropy.set(xlabel="entropy of the rollout policy (nats), from", ylabel="share of the bin's tokens")
    for axes in (by_ratio, by_entropy):
        axes.legend(fontsize=8)
    figure.suptitle(f"Runs of DAPO ({COMMON_TASK}, common learning rate); middle and right: degree {DEGREE}")
    _save(figure, "clipping")


def _rates(axes: Axes, runs: list[dict[str, Any]], name: str, edges: Sequence[float]) -> None:
    counts = {
        of: [sum(column) for column in zip(*(run["tokens"][name][of] for run in runs), strict=True)]
        for of in ("all", "erc", "ppo")
    }
    places = range(len(edges) + 1)
    for of, label in {"erc": "outside ERC's bounds", "ppo": "clipped by PPO"}.items():
        rates = [some / max(total, 1) for some, total in zip(counts[of], counts["all"], strict=True)]
        axes.plot(places, rates, marker="o", label=label)
    total = sum(counts["all"])
    axes.bar(places, [count / total for count in counts["all"]], color="lightgrey", label="all tokens, by bin")
    axes.set_xticks(places, ["0", *(f"{edge:g}" for edge in edges)])


def entropy_figure(results: Results) -> None:
    """Entropy on the probe and gradient norm, step by step: mean over the seeds, a column a degree."""
    settings: tuple[Setting, ...] = (*DEGREES, STEEP)
    figure, rows = plt.subplots(2, len(settings), figsize=(18, 8), sharex=True, layout="constrained")
    for (entropy, norm), setting in zip(zip(*rows, strict=True), settings, strict=True):
        for arm in DEGREE_ARMS:
            runs = cell(results, COMMON_TASK, setting, arm)
            entropy.plot(_mean_curve(runs, "probe_entropy"), label=arm)
            norm.plot(_smooth(_mean_curve(runs, "grad_norm")))
        entropy.set(title=STEEP if setting == STEEP else f"degree {setting}")
        norm.set(xlabel="optimizer step")
    rows[0][0].set(ylabel="entropy on held-out answers (nats)")
    rows[1][0].set(ylabel=f"gradient norm, mean of {SMOOTHED} steps")
    rows[0][0].legend(fontsize=8)
    figure.suptitle(f"{COMMON_TASK}, every arm at the same learning rate; mean over {len(SEEDS)} seeds")
    _save(figure, "entropy")


def success_figure(results: Results) -> None:
    """Held-out success of every tuned arm minus that of PPO-clip, with 95 % intervals, a panel a task."""
    figure, columns = plt.subplots(1, len(TASKS), figsize=(16, 8), layout="constrained")
    for axes, (task, arms) in zip(columns, TUNED_ARMS.items(), strict=True):
        base = [run["accuracy"] for run in cell(results, task, TUNED, "ppo-clip")]
        for place, arm in enumerate(reversed(arms)):
            values = [run["accuracy"] for run in cell(results, task, TUNED, arm)]
            differences = [value - other for value, other in zip(values, base, strict=True)]
            colour = "black" if abs(statistics.fmean(differences)) <= half_width(differences) else "tab:red"
            axes.errorbar(statistics.fmean(differences), place, xerr=half_width(differences), fmt="o", color=colour)
        axes.set_yticks(range(len(arms)), reversed(arms))
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(title=f"{task} (ppo-clip: {statistics.fmean(base):.3f})", xlabel="held-out success minus ppo-clip's")
    figure.suptitle("Every arm at its own learning rate, paired by seed; red: the 95 % interval leaves out 0")
    _save(figure, "success")


def alphas_figure(results: Results) -> None:
    """CE-GPPO's two weights: change of entropy and success over the grid."""
    figure, columns = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axes, quantity in zip(columns, ("entropy change", "success"), strict=True):
        grid = [[_mean(results, ALPHA_ARMS[alpha1, alpha2], quantity) for alpha1 in ALPHAS] for alpha2 in ALPHAS]
        axes.imshow(grid, origin="lower", cmap="viridis")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", bbox={"fc": "white", "pad": 1.5})
        axes.set(xlabel="alpha1 (negative advantage)", ylabel="alpha2 (positive advantage)", title=quantity)
        axes.set_xticks(range(len(ALPHAS)), ALPHAS)
        axes.set_yticks(range(len(ALPHAS)), ALPHAS)
    figure.suptitle(f"CE-GPPO, {COMMON_TASK}, degree {ALPHAS_DEGREE}; mean over {len(SEEDS)} seeds")
    _save(figure, "alphas")


def critics_figure(results: Results) -> None:
    """What the critics explain of the returns, and how far they differ, on both tasks."""
    figure, columns = plt.subplots(1, 2, figsize=(13, 4.2), sharey=True, layout="constrained")
    for axes, quantity in zip(columns, ("explained variance", "spread of the critics"), strict=True):
        for shift, (task, arms) in enumerate(critic_arms().items()):
            values = [[QUANTITIES[quantity](run) for run in cell(results, task, TUNED, arm)] for arm in arms]
            places = [CRITIC_ARMS.index(arm) + 0.2 * shift for arm in arms]
            means, halves = [statistics.fmean(of) for of in values], [half_width(of) for of in values]
            axes.errorbar(means, places, xerr=halves, fmt="o", label=task)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(xlabel=quantity)
    columns[0].set_yticks(range(len(CRITIC_ARMS)), CRITIC_ARMS)
    columns[0].legend()
    _save(figure, "critics")


def critic_arms() -> dict[str, list[str]]:
    """The arms with critics, of each task that has them."""
    found = {task: [arm for arm in CRITIC_ARMS if arm in arms] for task, arms in TUNED_ARMS.items()}
    return {task: arms for task, arms in found.items() if arms}


def _with_intervals(axes: Axes, places: Sequence[float], values: list[list[float]], label: str) -> None:
    means, halves = [statistics.fmean(of) for of in values], [half_width(of) for of in values]
    axes.errorbar(places, means, yerr=halves, marker="o", capsize=3, label=label)


def _mean(results: Results, arm: str, quantity: str) -> float:
    return statistics.fmean(QUANTITIES[quantity](run) for run in cell(results, COMMON_TASK, ALPHAS_DEGREE, arm))


def _mean_curve(runs: list[dict[str, Any]], name: str) -> list[float]:
    return [statistics.fmean(values) for values in zip(*(run[name] for run in runs), strict=True)]


def _smooth(values: list[float]) -> list[float]:
    return [statistics.fmean(values[max(0, end - SMOOTHED) : end]) for end in range(1, len(values) + 1)]


def _save(figure: Any, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.png", dpi=90)
    plt.close(figure)


def on_policy_table(results: Results) -> str:
    """Markdown table: at degree 1 every arm must have the first one's numbers, whatever it would clip."""
    lines = ["| arm | success, seed by seed | the same run as ppo-clip |", "|---|---|---|"]
    base = cell(results, COMMON_TASK, 1, ON_POLICY_ARMS[0])
    for arm in ON_POLICY_ARMS:
        runs = cell(results, COMMON_TASK, 1, arm)
        same = all(run["probe_entropy"] == other["probe_entropy"] for run, other in zip(runs, base, strict=True))
        shown = ", ".join(f"{run['accuracy']:.5f}" for run in runs)
        lines.append(f"| {arm} | {shown} | {'yes' if same else 'no'} |")
    return "\n".join(lines)


def tables(results: Results) -> dict[str, str]:
    """Every generated table of the page by its marker."""
    common: list[tuple[str, Setting, str]] = [
        (COMMON_TASK, setting, arm)
        for setting in (*DEGREES, STEEP)
        for arm in (*DEGREE_ARMS, *(ABLATIONS if setting in (STEEP_DEGREE, STEEP) else ()))
    ]
    tuned: list[tuple[str, Setting, str]] = [(task, TUNED, arm) for task, arms in TUNED_ARMS.items() for arm in arms]
    clipping = ["outside ERC's bounds", "clipped by PPO", "ratio of the two", "entropy, outside - inside"]
    clipping += ["abs(log ratio) over 0.1, outside / inside"]
    critics: list[tuple[str, Setting, str]] = [
        (task, TUNED, arm) for task, arms in critic_arms().items() for arm in arms
    ]
    dynamics = ["entropy change", "entropy oscillation", "gradient norm", "gradient norm, relative spread", "success"]
    counted = [
        *((COMMON_TASK, setting, arm) for setting in (*DEGREES, STEEP) for arm in ("ppo-clip", "dapo", "erc")),
        *((task, TUNED, arm) for task in ("spell_backward", "corridor") for arm in ("ppo-clip", "dapo", "erc")),
    ]
    return {
        "learning rates": tuning_table(results),
        "on policy": on_policy_table(results),
        "clipping": value_table(results, counted, clipping),
        "dynamics": value_table(results, common, dynamics),
        "success": value_table(results, tuned, ["success", "reward, last half", "entropy change"]),
        "alphas": slope_table(results, ["entropy change", "entropy, last half", "success"]),
        "critics": value_table(results, critics, ["explained variance", "spread of the critics"]),
        **{
            f"tests of {claim}": outcome_table(results, claim) for claim in dict.fromkeys(test.claim for test in TESTS)
        },
    }


def main() -> None:
    results = read_results()
    for draw in (clipping_figure, entropy_figure, success_figure, alphas_figure, critics_figure):
        draw(results)
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        text = put_table(text, name, table)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
