"""Does EPO calm the entropy of a multi-turn agent? Five seeds of a small environment, with and without it.

Run from the repository, with the extra `plots`:

    python recipes/study/epo_oscillation.py

Seeds 0 to 4; each seed's policy, data order and sampling seed are the same in every arm. Three quarters of an hour of
one core. Results are kept run by run in `epo_oscillation.json` beside this file, so a second call continues where the
first one stopped; `--report` only draws the figure and writes the tables of `epo_oscillation.md` again.

Two settings: that of `recipes/epo-corridor.yaml`, and the same with 1.5 times its learning rate, where GRPO is no
longer stable. Oscillation is what arXiv 2509.22576 looks at: the standard deviation, from RL step 10 on, of the change
of mean token entropy from one RL step to the next. Entropies are those of the rollout policy on its own rollout (64
episodes).
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trl_entropy import EntropyGRPOTrainer
from trl_entropy.commands.train import parse
from trl_entropy.controls.turns import turn_indices
from trl_entropy.evaluation.estimates import half_width
from trl_entropy.recipes import recipe_path
from trl_entropy.tasks import get_task
from trl_entropy.trainers.loss_call import LossCall, loss_mask

BONUS = "GRPO + entropy bonus 0.02"
SETTINGS: dict[str, dict[str, float]] = {"recipe": {}, "steep": {"learning_rate": 1.5e-3}}
ARMS = {
    "GRPO": {"epo_coef": 0.0},
    "GRPO + EPO, lambda 0.001": {"epo_coef": 0.001},
    BONUS: {"epo_coef": 0.02, "epo_penalty": 0.0},
    "GRPO + EPO, lambda 0.02": {"epo_coef": 0.02},
    "GRPO + EPO, lambda 0.02, alpha 2": {"epo_coef": 0.02, "epo_penalty": 2.0},
    "GRPO + EPO, lambda 0.02, decaying": {"epo_coef": 0.02},
    "GRPO + EPO, lambda 0.02, alpha 2, decaying": {"epo_coef": 0.02, "epo_penalty": 2.0},
}
DECAYING = tuple(arm for arm in ARMS if arm.endswith("decaying"))
"""Both entropy terms weigh twice as much at an episode's first turn, nothing at its last, evenly falling between."""
UNIFORM = "uniform"
COMPARED = {"values": None, "minus GRPO": "GRPO", "minus bonus": BONUS, "minus uniform": UNIFORM}
SEEDS = (0, 1, 2, 3, 4)
FIRST_STEP = 10
LAST_STEPS = 10
EARLY_TURNS, DOOR_TURNS = slice(0, 3), slice(11, 14)

FOLDER = Path(__file__).parent
RESULTS, FIGURE, SECTION = (FOLDER / f"epo_oscillation.{ending}" for ending in ("json", "png", "md"))


class RecordingTrainer(EntropyGRPOTrainer):
    """Keeps the entropies of every rollout, also where no control asks for them; it changes nothing else."""

    hooks_active = True
    wants_old_entropies = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rollouts: list[dict[str, Any]] = []
        self.decaying = False

    def added_loss(self, call: LossCall) -> Tensor | None:
        if self.decaying:
            call.bonus_entropies = decay_over_turns(call.entropies, call.mask)
            call.batch = replace(call.batch, entropies=call.bonus_entropies)
        return super().added_loss(call)

    def on_rollout(self, output: dict[str, Any], rewards: Tensor) -> None:
        super().on_rollout(output, rewards)
        if self.mode == "eval":
            return
        mask, entropies = loss_mask(output), output["old_entropies"]
        turns = turn_indices(mask)
        self.rollouts.append(
            {
                "entropy": round(entropies[mask].mean().item(), 5),
                "success": rewards.mean().item(),
                "turns": [round(entropies[turns == i].mean().item(), 5) for i in range(int(turns.max()) + 1)],
            }
        )


def decay_over_turns(entropies: Tensor, mask: Tensor) -> Tensor:
    """The same values, with gradients that weigh 2 at an episode's first turn and fall evenly to 0 at its last."""
    turns = turn_indices(mask).clamp(min=0)
    last = turns.amax(1, keepdim=True).clamp(min=1)
    fixed = entropies.detach()
    return fixed + 2 * (1 - turns / last) * (entropies - fixed)


def run(setting: str, arm: str, seed: int, output_dir: str) -> dict[str, Any]:
    """Train one arm with one seed; returns its rollouts and the success rate on the 400 held-out episodes."""
    task = get_task("corridor")
    assert task.build_policy is not None
    assert task.build_rollout is not None
    policy = task.build_policy(os.path.join(output_dir, f"policy-{seed}"), seed)
    overrides = {"seed": seed, "output_dir": output_dir, "disable_tqdm": True, **SETTINGS[setting], **ARMS[arm]}
    overrides |= {"num_generations_eval": 1, "per_device_eval_batch_size": 100}
    argv = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    _, config, _, _ = parse(["--config", str(recipe_path("epo-corridor")), *argv])
    with task.build_rollout() as rollout:
        trainer = RecordingTrainer(
            model=policy,
            args=config,
            reward_funcs=list(task.reward_funcs),
            train_dataset=task.load("train"),
            eval_dataset=task.load("test"),
            processing_class=PreTrainedTokenizerFast.from_pretrained(policy),
            rollout_func=rollout,
        )
        trainer.decaying = arm in DECAYING
        trainer.train()
        test = trainer.evaluate()["eval_episode/success_rate"]
    return {"rollouts": trainer.rollouts, "test_success": test}


def oscillation(rollouts: list[dict[str, Any]]) -> float:
    """Standard deviation of the step-to-step change of entropy from `FIRST_STEP` on, nats."""
    entropies = [rollout["entropy"] for rollout in rollouts[FIRST_STEP:]]
    return statistics.stdev(after - before for before, after in pairwise(entropies))


def level(rollouts: list[dict[str, Any]]) -> float:
    """Mean entropy of the steps that `oscillation` looks at, nats."""
    return statistics.fmean(rollout["entropy"] for rollout in rollouts[FIRST_STEP:])


def mean_of(pick: Callable[[dict[str, Any]], float], last: int = 0) -> Callable[[dict[str, Any]], float]:
    """Mean of a quantity of a run's rollouts, of the last ones where `last` is not 0."""
    return lambda result: statistics.fmean(pick(rollout) for rollout in result["rollouts"][-last:])


QUANTITIES: dict[str, Callable[[dict[str, Any]], float]] = {
    "oscillation (nats)": lambda result: oscillation(result["rollouts"]),
    "relative to entropy": lambda result: oscillation(result["rollouts"]) / level(result["rollouts"]),
    "success, held-out": lambda result: result["test_success"],
    "success, all steps": mean_of(lambda rollout: rollout["success"]),
    "success, last steps": mean_of(lambda rollout: rollout["success"], LAST_STEPS),
    "entropy, last steps": mean_of(lambda rollout: rollout["entropy"], LAST_STEPS),
    "of turns 1-3": mean_of(lambda rollout: statistics.fmean(rollout["turns"][EARLY_TURNS]), LAST_STEPS),
    "of turns 12-14": mean_of(lambda rollout: statistics.fmean(rollout["turns"][DOOR_TURNS]), LAST_STEPS),
}


def interval(values: Iterable[float]) -> str:
    """Mean and half-width of its 95 % confidence interval over the seeds."""
    values = list(values)
    return f"{statistics.fmean(values):.3f} ± {half_width(values):.3f}"


def table(runs: dict[str, list[dict[str, Any]]], minus: str | None = None) -> str:
    """Markdown table of all quantities of the arms' runs; with `minus`, of the paired difference from that arm.

    `minus=UNIFORM` has the decaying arms alone, and subtracts from each the one with the same weights at every turn.
    """
    lines = ["| arm | " + " | ".join(QUANTITIES) + " |", "|---" * (len(QUANTITIES) + 1) + "|"]
    for arm in DECAYING if minus == UNIFORM else (arm for arm in ARMS if arm != minus):
        cells, other = [], arm.removesuffix(", decaying") if minus == UNIFORM else minus
        for quantity in QUANTITIES.values():
            values = [quantity(result) for result in runs[arm]]
            base = [quantity(result) for result in runs[other]] if other else [0.0] * len(values)
            cells.append(interval(value - other for value, other in zip(values, base, strict=True)))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Entropy and success against the RL step, and entropy against the turn: means over the seeds, a row a setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(len(SETTINGS), 3, figsize=(15, 4.2 * len(SETTINGS)), layout="constrained")
    for (entropy, success, by_turn), (setting, arms) in zip(rows, results.items(), strict=True):
        for arm, runs in arms.items():
            (line,) = entropy.plot(_mean(runs, "entropy"), label=arm)
            for result in runs:
                entropies = [rollout["entropy"] for rollout in result["rollouts"]]
                entropy.plot(entropies, color=line.get_color(), alpha=0.2, linewidth=0.7)
            success.plot(_mean(runs, "success"))
            last = [rollout["turns"] for result in runs for rollout in result["rollouts"][-LAST_STEPS:]]
            longest = max(map(len, last))
            columns = [[turns[i] for turns in last if len(turns) > i] for i in range(longest)]
            by_turn.plot(range(1, longest + 1), [statistics.fmean(column) for column in columns])
        entropy.set(xlabel="RL step", ylabel="mean token entropy (nats)", title=f"{setting}: entropy; thin: one seed")
        success.set(xlabel="RL step", ylabel="success rate of the rollout", title=f"{setting}: success")
        by_turn.set(xlabel="turn", ylabel="mean token entropy (nats)", title=f"{setting}: last {LAST_STEPS} steps")
        entropy.legend(fontsize=8)
    figure.savefig(FIGURE, dpi=90)


def _mean(runs: list[dict[str, Any]], name: str) -> list[float]:
    steps = zip(*(result["rollouts"] for result in runs), strict=True)
    return [statistics.fmean(rollout[name] for rollout in step) for step in steps]


def put_table(text: str, name: str, table: str) -> str:
    """A page with the table between `<!-- name -->` and the next `<!-- end -->` replaced."""
    start, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, rest = text.split(start)
    return before + start + table + "\n" + end + rest.split(end, maxsplit=1)[1]


def report(results: dict[str, Any]) -> None:
    """Draw the figure and replace the tables of the section, between its markers."""
    grouped = {
        setting: {arm: [results[f"{setting} / {arm} / {seed}"] for seed in SEEDS] for arm in ARMS}
        for setting in SETTINGS
    }
    draw(grouped)
    text = SECTION.read_text(encoding="utf-8")
    for setting, runs in grouped.items():
        for name, minus in COMPARED.items():
            text = put_table(text, f"{setting}: {name}", table(runs, minus))
    SECTION.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="only draw the figure and the tables again")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for setting, seed, arm in [] if arguments.report else product(SETTINGS, SEEDS, ARMS):
        name = f"{setting} / {arm} / {seed}"
        if name not in results:
            with tempfile.TemporaryDirectory() as folder:
                results[name] = run(setting, arm, seed, folder)
            RESULTS.write_text(json.dumps(results), encoding="utf-8")
    report(results)


if __name__ == "__main__":
    main()
