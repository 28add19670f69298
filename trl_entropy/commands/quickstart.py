"""`trl-entropy quickstart`: the methods side by side on a small policy, on CPU in minutes, without a download.

It warms up the policy of the task `arithmetic` once, trains it from that same start once an arm, measures each arm on
held-out problems and writes `results.json` and `report.html`. An arm that an earlier run finished with the same
settings is not trained again.
"""

import argparse
import gc
import json
import math
import platform
import sys
import time
import warnings
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging as transformers_logging

from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer, __version__
from trl_entropy.recipes import recipe_path
from trl_entropy.tasks import Task, get_task
from trl_entropy.telemetry.figures import require_plots
from trl_entropy.telemetry.report import write_report
from trl_entropy.telemetry.runs import RESULT_FILE, RESULTS_FILE

ARMS: dict[str, dict[str, Any]] = {
    "ppo-clip": {},
    "erc": {"erc_low": 0.95, "erc_high": 1.05},
    "ce-gppo": {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0},
    "ce-gppo+erc": {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0, "erc_low": 0.95, "erc_high": 1.05},
    # two critics that start from the policy's weights, as the recipe asyppo-corridor has them
    "asyppo": {
        "num_critics": 2,
        "critic_learning_rate": 1e-3,
        "critic_warmup_rollouts": 2,
        "advantage_mask_fraction": 0.2,
        "entropy_filter_fraction": 0.2,
        "entropy_coef": 0.001,
    },
}
"""The arms: what each sets beside the recipe `quickstart`; the one that sets `num_critics` has AsyPPO's trainer."""

# Critics of so small a network explain 1 to 3 % of these returns: to judge a sum they would have to know it.
DEFAULT_ARMS = [name for name in ARMS if name != "asyppo"]

# A fixed number, because sums in another order round differently and results must not depend on the environment. One,
# because so small a network gains little from more, and loses much when they wait for each other on a busy machine.
NUM_THREADS = 1


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy quickstart`.

    Args:
        argv: The command line without the command's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With a one-line message if the arguments are wrong or matplotlib is not installed.
    """
    arguments = _parse(argv)
    try:
        require_plots()
    except ImportError as error:
        raise SystemExit(f"trl-entropy quickstart: error: {error}") from error
    torch.set_num_threads(NUM_THREADS)
    transformers_logging.disable_progress_bar()  # its bars for loading and saving files flash by between ours
    output, recipe = Path(arguments.output_dir), yaml.safe_load(recipe_path("quickstart").read_text(encoding="utf-8"))
    task = get_task(recipe["task"])
    policy = _policy(task, output / "policy", arguments.seed)
    results = {}
    for name in arguments.arms:
        settings = {**_config_fields(recipe), **ARMS[name], "seed": arguments.seed}
        settings["max_steps"] = arguments.steps or settings["max_steps"]
        results[name] = _finished(output / name, settings) or _train_arm(name, task, policy, output / name, settings)
    summary = {"arms": results, "seed": arguments.seed, "versions": _versions()}
    _write_json(output / RESULTS_FILE, summary)
    title = f"Quickstart: {task.name}, seed {arguments.seed}"
    page = write_report([output], output / "report.html", title)
    print(_table(results))
    print(f"Report: {page}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="trl-entropy quickstart", description="Compare the methods on a small policy, on CPU in minutes."
    )
    parser.add_argument("--output_dir", default="runs/quickstart", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the policy and the training (default: 0)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each arm (default: the recipe's)")
    parser.add_argument(
        "--arms",
        default=",".join(DEFAULT_ARMS),
        help=f"some of {','.join(ARMS)}, with commas (default: %(default)s; AsyPPO's critics cannot judge this task)",
    )
    arguments = parser.parse_args(argv)
    arguments.arms = list(dict.fromkeys(arguments.arms.split(",")))
    if unknown := [name for name in arguments.arms if name not in ARMS]:
        parser.error(f"--arms: {', '.join(map(repr, unknown))} is unknown. Choose from {', '.join(ARMS)}.")
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps: {arguments.steps} must be at least 1.")
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed: {arguments.seed} must be in 0..2**32 - 1.")
    return arguments


def _policy(task: Task, folder: Path, seed: int) -> str:
    """Path of the policy that all arms start from."""
    settings = {"task": task.name, "seed": seed}
    if _finished(folder, settings) is None:
        print(f"Building the policy in {folder}")
        assert task.build_policy is not None
        started = time.monotonic()
        (folder / RESULT_FILE).unlink(missing_ok=True)
        task.build_policy(str(folder), seed)
        seconds = time.monotonic() - started
        _write_json(folder / RESULT_FILE, {"settings": settings, "versions": _versions(), "seconds": seconds})
    return str(folder)


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result in the folder, if it was made with these settings and the versions that are installed."""
    if not (folder / RESULT_FILE).is_file():
        return None
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    if (result.get("settings"), result.get("versions")) != (settings, _versions()):
        return None
    print(f"Kept from an earlier run: {folder} (to make it again, delete it)")
    return result


def _train_arm(name: str, task: Task, policy: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    (folder / RESULT_FILE).unlink(missing_ok=True)
    problems = task.load("test")
    with warnings.catch_warnings():
        # TRL's own defaults use a name that transformers has renamed.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        arguments = {
            "model": policy,
            "reward_funcs": list(task.reward_funcs),
            "train_dataset": task.load("train"),
            "callbacks": [_Progress(name)],
        }
        if "num_critics" in settings:
            config = AsyPPOConfig(output_dir=str(folder), **settings)
            trainer: EntropyGRPOTrainer = AsyPPOTrainer(args=config, critics=policy, **arguments)
        else:
            trainer = EntropyGRPOTrainer(args=EntropyGRPOConfig(output_dir=str(folder), **settings), **arguments)
        for printer in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printer)
        before = _evaluate(trainer, task, problems, "before")
        trainer.train()
    after = _evaluate(trainer, task, problems, "after")
    trainer.save_model()
    trainer.save_state()
    result = {
        **before,
        **after,
        "num_problems": len(problems),
        "settings": settings,
        "versions": _versions(),
        "seconds": time.monotonic() - started,
    }
    _write_json(folder / RESULT_FILE, result)
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


def _evaluate(trainer: EntropyGRPOTrainer, task: Task, problems: Dataset, when: str) -> dict[str, Any]:
    """Held-out accuracy of one sampled completion a problem, its 95 % interval, and that of the greedy completion."""
    sampled = _num_correct(trainer, task, problems, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    greedy = _num_correct(trainer, task, problems, do_sample=False)
    return {
        f"accuracy_{when}": sampled / len(problems),
        f"accuracy_{when}_ci95": wilson_interval(sampled, len(problems)),
        f"greedy_accuracy_{when}": greedy / len(problems),
    }


@torch.no_grad()
def _num_correct(trainer: EntropyGRPOTrainer, task: Task, problems: Dataset, **generation: Any) -> int:
    model, tokenizer = trainer.model, trainer.processing_class
    columns = {key: list(problems[key]) for key in problems.column_names}
    prompts = columns.pop("prompt")
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.args.seed)
        ids = model.generate(**encoded, max_new_tokens=trainer.args.max_completion_length, **generation)
    completions = tokenizer.batch_decode(ids[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)
    rewards = [reward(prompts=prompts, completions=completions, **columns) for reward in task.reward_funcs]
    return sum(sum(of_problem) >= 1.0 for of_problem in zip(*rewards, strict=True))


def wilson_interval(num_correct: int, num_problems: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    z = 1.959964
    share, spread = num_correct / num_problems, z * z / num_problems
    centre = (share + spread / 2) / (1 + spread)
    half_width = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def _config_fields(recipe: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(EntropyGRPOConfig)} - {"output_dir"}
    return {key: value for key, value in recipe.items() if key in known}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("trl", "transformers", "torch")}
    return {"trl_entropy": __version__, **packages, "python": platform.python_version()}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
