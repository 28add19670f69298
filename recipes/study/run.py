"""The study's runs: every arm of `settings.py` tuned alike, then trained with every seed.

From the repository, with the extras `plots` and `gym`, under four hours of one CPU core:

    python recipes/study/run.py

Split over cores or machines, here the first of two shares (from several machines, join the lines of the files):

    python recipes/study/run.py --share 1/2

One run again, beside its result in the file:

    python recipes/study/run.py --only arithmetic/erc/8/6e-05/0

A finished run is a line of `results.jsonl` and is not done again. Afterwards `report.py` draws figures and tables.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import disable_progress_bars
from policies import STUDY_TASKS, StudyTask, answer_probabilities, start
from probes import EntropyProbe, MeasuringAsyPPOTrainer, MeasuringTrainer
from settings import ALL_ARMS, DEGREE, OWN_SETTINGS, TASKS, TRAINING, TUNED, Run, common_runs, tuning_runs, with_seeds
from tqdm import tqdm
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from trl_entropy import AsyPPOConfig, EntropyGRPOConfig
from trl_entropy.controls.health import finite_values

RESULTS = Path(__file__).parent / "results.jsonl"
POLICIES = Path("runs/study/policies")
PASS_AT = 8
PROBED = 64
"""Held-out problems on whose right answers the entropy is probed."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
CRITIC_METRICS = ("asyppo/value_std", "asyppo/explained_variance")

Results = dict[str, dict[str, Any]]


def train(run: Run, policies: Path = POLICIES, steps: int | None = None) -> dict[str, Any]:
    """Train and measure one run.

    Args:
        run: Which.
        policies: Folder where the models that runs start from are kept.
        steps: Optimizer steps; `None` for the settings'.
    """
    started = time.monotonic()
    settings = TRAINING | TASKS[run.task] | ALL_ARMS[run.arm]
    settings |= {"learning_rate": run.learning_rate, "steps_per_generation": run.degree, "seed": run.seed}
    settings["max_steps"] = steps or settings["max_steps"]
    own = {name: settings.pop(name) for name in OWN_SETTINGS if name in settings}
    task = STUDY_TASKS[run.task]
    arguments = {"reward_funcs": [task.reward], "train_dataset": task.load("train"), "eval_dataset": task.load("test")}
    arguments["model"] = start(run.task, "policy", run.seed, policies)
    with ExitStack() as stack:
        settings["output_dir"] = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        if task.build_rollout:
            arguments["rollout_func"] = stack.enter_context(task.build_rollout())
        if "critics" in own:
            size = own.pop("critics")
            own["critics"] = start(run.task, size, run.seed if size == "policy" else 0, policies)
            trainer: MeasuringTrainer = MeasuringAsyPPOTrainer(args=AsyPPOConfig(**settings), **arguments, **own)
        else:
            trainer = MeasuringTrainer(args=EntropyGRPOConfig(**settings), **arguments, **own)
        trainer.remove_callback(PrinterCallback)
        probed = (demonstrations[:PROBED] for demonstrations in task.demonstrations(trainer.processing_class, "test"))
        trainer.add_callback(probe := EntropyProbe(*probed))
        trainer.train()
        numbers = measured(trainer) | {"probe_entropy": probe.entropies} | _held_out(trainer, task)
    return {"run": run.name, **numbers, "seconds": round(time.monotonic() - started, 1)}


def _held_out(trainer: MeasuringTrainer, task: StudyTask) -> dict[str, float]:
    """Success on the problems that were not trained on: of sampled episodes, or exact where one answer is right."""
    if task.build_rollout:
        return {"accuracy": round(trainer.evaluate()["eval_episode/success_rate"], 5)}
    trainer.model.eval()
    right = answer_probabilities(trainer.model, trainer.processing_class, trainer.eval_dataset).double()
    pass_at = (1 - (1 - right) ** PASS_AT).mean().item()
    return {"accuracy": round(right.mean().item(), 5), f"pass_at_{PASS_AT}": round(pass_at, 5)}


def measured(trainer: MeasuringTrainer) -> dict[str, Any]:
    """What a finished training has logged and counted."""
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    critics = {name: finite_values(logs, name) for name in CRITIC_METRICS}  # equal returns have no explained variance
    critics_warmup = getattr(trainer.args, "critic_warmup_rollouts", 0)
    return {
        **{name: values[critics_warmup:] for name, values in trainer.rollouts.items()},
        "grad_norm": [float(f"{entry['grad_norm']:.4g}") for entry in logs],
        "tokens": trainer.tokens.result(),
        **{name.partition("/")[2]: round(sum(values) / len(values), 5) for name, values in critics.items() if values},
    }


def last_half(values: list[float]) -> float:
    """Mean over the last half of a run's rollouts."""
    kept = values[len(values) // 2 :]
    return sum(kept) / len(kept)


def tuned_learning_rate(task: str, arm: str, results: Results) -> float:
    """The learning rate with the highest mean reward over the last half of the tuning run's rollouts."""
    return max(tuning_runs(task, arm), key=lambda run: last_half(results[run.name]["reward"])).learning_rate


def tuned_runs(task: str, arm: str, results: Results) -> list[Run]:
    """An arm's runs at its own learning rate."""
    return with_seeds(task, arm, DEGREE, tuned_learning_rate(task, arm, results))


def runs_of(arm: str, results: Results) -> Iterator[Run]:
    """All runs of an arm, those that others depend on first; `results` has them by the time they are needed."""
    for task in (task for task, arms in TUNED.items() if arm in arms):
        yield from tuning_runs(task, arm)
        yield from tuned_runs(task, arm, results)
    yield from common_runs(arm)


def read_results(file: Path = RESULTS) -> Results:
    """The finished runs by name. A line that a killed process left unfinished counts as not there."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = filter(None, map(_whole, lines))
    return {result["run"]: result for result in found}


def _whole(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def append_result(result: dict[str, Any], file: Path = RESULTS) -> None:
    """Add a line in one write, so that several processes may."""
    line = (json.dumps(result) + "\n").encode()
    with file.open("a+b", buffering=0) as lines:
        if lines.tell() and lines.seek(-1, os.SEEK_END) >= 0 and lines.read(1) != b"\n":
            line = b"\n" + line  # after what a killed process left
        lines.write(line)


def run_share(arms: list[str], file: Path = RESULTS) -> None:
    """Do what is not done yet of these arms' runs."""
    results = read_results(file)
    for arm in tqdm(arms, unit="arm"):
        with tqdm(unit="run", desc=arm, leave=False) as bar:
            for run in runs_of(arm, results):
                if run.name not in results:
                    bar.set_postfix_str(run.name)
                    results[run.name] = train(run)
                    append_result(results[run.name], file)
                    gc.collect()  # a trainer is in reference cycles
                bar.update()


def show_again(run: Run) -> None:
    """Train one run and print its numbers beside those of the results."""
    show_beside(read_results().get(run.name, {}), train(run))


def show_beside(known: dict[str, Any], found: dict[str, Any]) -> None:
    """Print a run's numbers, each with that of the results."""
    for name, value in found.items():
        print(
            f"{name}: {value}\n"
            + ("  the same in the results" if known.get(name) == value else f"  in the results: {known.get(name)}")
        )


def _share(text: str) -> list[str]:
    return share_of(list(ALL_ARMS), text)


def share_of(names: list[str], text: str) -> list[str]:
    """The first of two shares of some names for `"1/2"`, and so on.

    Raises:
        argparse.ArgumentTypeError: If the text is not a share.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 1/2.")
    return names[int(index) - 1 :: int(count)]


def _run(text: str) -> Run:
    try:
        return Run.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def keep_memory() -> None:
    """Have glibc keep freed memory: to return and ask for that of every tensor takes up to a third of the time."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--share", type=_share, default="1/1", help="share of the arms, such as 1/2 (default: all)")
    what.add_argument("--only", type=_run, help="train this run again and print its numbers")
    arguments = parser.parse_args()
    # sums in another order round differently, and so small a network gains little from more
    torch.set_num_threads(1)
    keep_memory()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    if arguments.only:
        show_again(arguments.only)
    else:
        run_share(arguments.share)


if __name__ == "__main__":
    main()
