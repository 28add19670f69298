"""The figures of the page."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from arms import ARMS, BEST, MAIN, PASS_AT, TASK, Results, base_run
from compare import COMMON, SMOOTHED, against_control, cell, smooth
from registered import CONTROL, PRIMARY

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def curves_figure(results: Results, folder: Path) -> None:
    """Reward and entropy by rollout, and pass@k, of the main arms at the common rate; means over the seeds.

    The first two are smoothed as for the entropy at equal reward. The axis of the entropy is logarithmic, so that one
    arm that comes apart leaves the others to be seen.
    """
    figure, (reward, entropy, passes) = plt.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    if base := results.get(base_run(TASK).name):
        passes.plot(PASS_AT, base["pass"].values(), color="black", linestyle="--", label="the model itself")
    for arm in MAIN:
        if runs := list(cell(results, TASK, arm, COMMON).values()):
            reward.plot(_mean_curve([smooth(run["reward"]) for run in runs]), label=f"{arm} ({len(runs)})")
            entropy.plot(_mean_curve([smooth(run["entropy"]) for run in runs]))
            passes.plot(PASS_AT, _mean_curve([list(run["pass"].values()) for run in runs]), marker=".")
    reward.set(xlabel="rollout", ylabel="reward")
    entropy.set(xlabel="rollout", ylabel="entropy of the rollout (nats)", yscale="log")
    entropy.set_yticks(*[(0.1, 0.2, 0.5, 1, 2, 5, 10)] * 2)
    entropy.minorticks_off()
    passes.set(xlabel="k", ylabel="pass@k, held out", xscale="log")
    passes.set_xticks(PASS_AT, PASS_AT)
    passes.minorticks_off()
    figure.suptitle(f"Means over the seeds (their number in brackets); reward and entropy over {SMOOTHED} rollouts")
    if any(axes.lines for axes in figure.axes):
        figure.legend(loc="outside lower center", ncols=len(MAIN) + 1)
    _save(figure, folder / "curves.png")


def effects_figure(results: Results, folder: Path) -> None:
    """Every arm minus PPO-clip on the primary endpoints, with 95 % intervals, at the common rate."""
    figure, columns = plt.subplots(1, len(PRIMARY), figsize=(17, 6), sharey=True, layout="constrained")
    arms = [arm for arm in (BEST, *reversed(ARMS)) if arm != CONTROL]
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
    _save(figure, folder / "effects.png")


def _mean_curve(curves: list[list[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=80)
    plt.close(figure)
