"""`trl-entropy quickstart`: the methods side by side on a small policy, on CPU in minutes, without a download.

It warms up the policy of the task `arithmetic` once, trains it from that same start once an arm, measures each arm on
held-out problems and writes `results.json` and `report.html`. An arm that an earlier run finished with the same
settings is not trained again. With `--model smollm2-135m` the policy is that pretrained model as it is, every arm is a
LoRA adapter on it, and the task is reasoning-gym's sums of two numbers.
"""

import argparse
import gc
import json
import platform
import sys
import time
import warnings
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, get_peft_config

from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer, __version__
from trl_entropy.commands.errors import one_line_if_full, one_line_if_wrong
from trl_entropy.commands.quickstart_setups import ARMS, PRETRAINED, SMALL, Setup
from trl_entropy.evaluation.held_out import Measure
from trl_entropy.files import write_json
from trl_entropy.pretrained import SMOLLM2, resolve_model
from trl_entropy.recipes import recipe_path
from trl_entropy.tasks import Task, get_task
from trl_entropy.telemetry.figures import require_plots
from trl_entropy.telemetry.report import write_report
from trl_entropy.telemetry.runs import RESULT_FILE, RESULTS_FILE


@dataclass(frozen=True)
class Start:
    """What all arms start from.

    Attributes:
        task: The task.
        setup: How the policy is trained and measured.
        train_dataset: The problems to train on.
        problems: The held-out problems to measure on.
        policy: Folder of the policy.
        adapter: LoRA adapter to train on it; `None` to train all weights.
        before: The policy's accuracy.
    """

    task: Task
    setup: Setup
    train_dataset: Dataset
    problems: Dataset
    policy: str
    adapter: LoraConfig | None
    before: dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy quickstart`.

    Args:
        argv: The command line without the command's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With a one-line message if the arguments are wrong, matplotlib is missing or the disk is full.
    """
    arguments = _parse(argv)
    transformers_logging.disable_progress_bar()  # its bars for loading and saving files flash by between ours
    with one_line_if_full("quickstart", "and run it again: finished arms are kept."):
        with one_line_if_wrong("quickstart", (ImportError, OSError)):
            require_plots()
            model = arguments.model and resolve_model(arguments.model)
            if model:
                AutoConfig.from_pretrained(model)
        results, page = _compare(arguments, model)
    print(_table(results))
    print(f"Report: {page}")


def _compare(arguments: argparse.Namespace, model: str | None) -> tuple[dict[str, dict[str, Any]], Path]:
    """The result of each arm, trained where it is not finished, and the page that compares them."""
    setup = PRETRAINED if model else SMALL
    torch.set_num_threads(setup.num_threads)
    output, recipe = Path(arguments.output_dir), yaml.safe_load(recipe_path(setup.recipe).read_text(encoding="utf-8"))
    task = get_task(recipe["task"])
    of_all = {"seed": arguments.seed, **({"model": arguments.model} if model else {})}
    start = _start(task, setup, recipe, model, output / "policy", of_all)
    results = {}
    arms = arguments.arms or setup.default_arms
    for name in arms:
        settings = {**_fields_of(EntropyGRPOConfig, recipe), **setup.arms[name], **of_all}
        settings["max_steps"] = arguments.steps or settings["max_steps"]
        results[name] = _finished(output / name, settings) or _train_arm(name, start, output / name, settings)
    summary = {"arms": results, **of_all, "versions": _versions()}
    write_json(output / RESULTS_FILE, summary)
    title = f"Quickstart: {task.name}, {f'{arguments.model}, ' if model else ''}seed {arguments.seed}"
    note = None if "asyppo" in arms else setup.without_asyppo
    return results, write_report([output], output / "report.html", title, note)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="trl-entropy quickstart", description="Compare the methods on a small policy, on CPU in minutes."
    )
    parser.add_argument("--output_dir", default="runs/quickstart", help="folder to write (default: %(default)s)")
    parser.add_argument("--model", help=f"{SMOLLM2}, or another pretrained model (default: a small one of its own)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the policy and the training (default: 0)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each arm (default: the recipe's)")
    parser.add_argument(
        "--arms",
        help=f"some of {','.join(ARMS)}, with commas (default: all, but asyppo only where its critics are known "
        "to judge the task)",
    )
    arguments = parser.parse_args(argv)
    if arguments.arms is not None:
        arguments.arms = list(dict.fromkeys(arguments.arms.split(",")))
    if unknown := [name for name in arguments.arms or () if name not in ARMS]:
        parser.error(f"--arms: {', '.join(map(repr, unknown))} is unknown. Choose from {', '.join(ARMS)}.")
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps: {arguments.steps} must be at least 1.")
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed: {arguments.seed} must be in 0..2**32 - 1.")
    return arguments


def _start(
    task: Task, setup: Setup, recipe: dict[str, Any], model: str | None, folder: Path, of_all: dict[str, Any]
) -> Start:
    """The policy that all arms start from, made in the folder if it is not there yet."""
    task_args = recipe.get("task_args", {})
    problems = task.load("test", **task_args)
    problems = problems.select(range(min(setup.num_problems or len(problems), len(problems))))
    adapter = get_peft_config(ModelConfig(**_fields_of(ModelConfig, recipe)))
    settings = {"task": task.name, "task_args": task_args, "num_problems": len(problems), **of_all}
    result = _finished(folder, settings)
    policy_folder = model or str(folder)
    if result is None:
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        (folder / RESULT_FILE).unlink(missing_ok=True)
        if not model:
            print(f"Building the policy in {folder}", flush=True)
            assert task.build_policy is not None
            task.build_policy(policy_folder, of_all["seed"])
        print("Measuring the policy that all arms start from", flush=True)
        policy = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(policy_folder)
        measure = Measure(task, problems, tokenizer, of_all["seed"], recipe["max_completion_length"])
        result = {
            **measure(policy, "before"),
            "settings": settings,
            "versions": _versions(),
            "seconds": time.monotonic() - started,
        }
        write_json(folder / RESULT_FILE, result)
    before = {key: value for key, value in result.items() if key.partition("accuracy_")[1]}
    return Start(task, setup, task.load("train", **task_args), problems, policy_folder, adapter, before)


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result in the folder, if it is whole and made with these settings and the versions that are installed."""
    try:
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if (result.get("settings"), result.get("versions")) != (settings, _versions()):
        return None
    print(f"Kept from an earlier run: {folder} (to make it again, delete it)")
    return result


def _train_arm(name: str, start: Start, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    (folder / RESULT_FILE).unlink(missing_ok=True)
    task = start.task
    set_seed(settings["seed"])  # TRL 1.12 makes LoRA's weights before it seeds
    with warnings.catch_warnings():
        # TRL's own defaults use a name that transformers has renamed.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", ".*pin_memory", UserWarning)  # pinned by default, which a CPU cannot do
        arguments = {
            "model": start.policy,
            "reward_funcs": list(task.reward_funcs),
            "train_dataset": start.train_dataset,
            "callbacks": [_Progress(name)],
            "peft_config": start.adapter,
        }
        config = {"output_dir": str(folder), **_fields_of(AsyPPOConfig, settings)}
        if "num_critics" in settings:
            critics = {"critics": start.policy, "critic_peft_config": start.setup.critic_adapter}
            trainer: EntropyGRPOTrainer = AsyPPOTrainer(args=AsyPPOConfig(**config), **critics, **arguments)
        else:
            trainer = EntropyGRPOTrainer(args=EntropyGRPOConfig(**config), **arguments)
        for printer in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printer)
        trainer.train()
    length = settings["max_completion_length"]
    measure = Measure(task, start.problems, trainer.processing_class, settings["seed"], length)
    after = measure(trainer.model, "after")
    trainer.save_model()
    trainer.save_state()
    result = {
        **start.before,
        **after,
        "num_problems": len(start.problems),
        "settings": settings,
        "versions": _versions(),
        "seconds": time.monotonic() - started,
    }
    write_json(folder / RESULT_FILE, result)
    del trainer
    gc.collect()  # the trainer is in reference cycles
    return result


class _Progress(TrainerCallback):
    """One bar an arm, with the latest reward and entropy, instead of a line of metrics a log entry."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        # Not on a terminal, every refresh is a line of its own.
        interval = 0.2 if sys.stderr.isatty() else 20
        self.bar = tqdm(total=state.max_steps, desc=f"{self.name:12}", unit="step", mininterval=interval)

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.bar.update()

    def on_log(
        self,
        args: object,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        shown = {key: f"{float(logs[key]):.3f}" for key in ("reward", "entropy") if logs and key in logs}
        if shown:
            self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.bar.close()


def _fields_of(kind: Any, recipe: dict[str, Any]) -> dict[str, Any]:
    """Those entries of the recipe that are fields of the dataclass, without `output_dir`."""
    known = {field.name for field in fields(kind)} - {"output_dir"}
    return {key: value for key, value in recipe.items() if key in known}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("trl", "transformers", "torch")}
    return {"trl_entropy": __version__, **packages, "python": platform.python_version()}


def _table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"\n{'held-out accuracy':20}{'before':>8}{'after':>8}   {'95 % interval':16}{'greedy':>8}{'after':>8}"]
    for name, result in results.items():
        before, after = (f"{result[f'accuracy_{when}']:8.3f}" for when in ("before", "after"))
        greedy = "".join(f"{result[f'greedy_accuracy_{when}']:8.3f}" for when in ("before", "after"))
        low, high = result["accuracy_after_ci95"]
        lines.append(f"{name:20}{before}{after}   {f'{low:.3f} to {high:.3f}':16}{greedy}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
