"""`trl-entropy probe --model M --dtype D [--task T | --dataset D]`: does ERC clip the policy's change, or rounding?

Every field of `trl-entropy train` is taken too, on the command line or in a recipe given as `--config`, so that the
probe computes what that run would.
"""

import argparse
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trl_entropy.commands.errors import one_line_if_full, one_line_if_wrong
from trl_entropy.commands.train import TrainingPlan, leave_processes, open_trainer, prepare
from trl_entropy.commands.train_rows import check_number_of_rows
from trl_entropy.files import write_json
from trl_entropy.telemetry.rounding import Gates, Measurement, summarise
from trl_entropy.telemetry.rounding_report import advice, draw_rounding, tables
from trl_entropy.trainers.probe import RoundingProbe, alternating_reward, probe_config

PRECISIONS = {
    "float32": ("--dtype", "float32", "--bf16", "false", "--fp16", "false"),
    "bfloat16": ("--dtype", "bfloat16", "--bf16", "false", "--fp16", "false"),
    "autocast": ("--dtype", "float32", "--bf16", "true", "--fp16", "false"),
    "float16": ("--dtype", "float32", "--bf16", "false", "--fp16", "true"),
}
"""What `--dtype` stands for: weights and activations in float32, both in bfloat16, or float32 weights computed in
bfloat16 (TRL's default) or in float16."""
ALIASES = {"model": "--model_name_or_path", "dataset": "--dataset_name"}
PUBLISHED_BOUNDS = (0.95, 1.05)
USAGE = "trl-entropy probe [--model M] [--dtype D] [--dataset D | --task T] [--config FILE] [--FIELD VALUE ...]"


@dataclass(frozen=True)
class Probe:
    """A checked probe. No model has been loaded for it yet.

    Attributes:
        plan: The few steps to train: a small copy of the run that is asked about.
        gates: The controls' bounds.
        steps: After which optimizer steps to measure.
    """

    plan: TrainingPlan
    gates: Gates
    steps: tuple[int, ...]


def parser() -> argparse.ArgumentParser:
    """The probe's own fields; those of `trl-entropy train` come beside them."""
    made = argparse.ArgumentParser(prog="trl-entropy probe", usage=USAGE, allow_abbrev=False, description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.epilog = "FIELD is any field of `trl-entropy train`, FILE a recipe of them; the command line overrides it."
    made.add_argument("--model", help="hub name or folder; also as --model_name_or_path")
    made.add_argument("--dataset", help="rows to complete, as `train` takes them; also as --dataset_name")
    made.add_argument("--dtype", choices=PRECISIONS, help="precision; left out, what dtype and bf16 of the recipe say")
    made.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="measure after these optimizer steps")
    made.add_argument("--max_completion_length", type=int, default=64, help="longest completion, in tokens")
    made.add_argument("--output_dir", default="probe", help="folder for probe.json, the tables and the figure")
    return made


def prepare_probe(argv: list[str] | None = None) -> Probe:
    """Parse and check everything that can be checked before a model is loaded, and load the rows.

    Raises:
        ValueError: If a field is unknown or has a bad value, or the rows do not fit.
        FileNotFoundError: If the recipe or a local dataset does not exist.
        ImportError: If a task needs a package that is not installed.
    """
    own, fields = parser().parse_known_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("probe runs as one process. Start it without accelerate.")
    if min(own.steps) < 1:
        raise ValueError(f"steps={own.steps} must all be at least 1: optimizer steps after which to measure.")
    if own.max_completion_length < 1:
        raise ValueError(f"max_completion_length={own.max_completion_length} must be at least 1.")
    plan = prepare([*_of_training(own), *fields, *_LEFT_OUT, "--output_dir", own.output_dir])
    if plan.config.fp16 and not torch.accelerator.is_available():
        raise ValueError("fp16=True needs a GPU. Set dtype to float32, bfloat16 or autocast, or probe on one.")
    low, high = plan.config.erc_bounds or PUBLISHED_BOUNDS
    gates = Gates(
        *(low, high, plan.config.epsilon, plan.config.eps_high, plan.config.importance_sampling_level),
        erc_floor=plan.config.erc_entropy_floor,
    )
    config = probe_config(plan.config, max_steps=max(own.steps), max_completion_length=own.max_completion_length)
    check_number_of_rows(plan.train_dataset, config)
    script = replace(plan.script, critics=None, critic_lora_r=None)
    plan = replace(plan, script=script, config=config, reward_funcs=[alternating_reward], eval_dataset=None)
    return Probe(plan, gates, tuple(sorted(set(own.steps))))


_LEFT_OUT = (
    *("--eval_strategy", "no", "--use_vllm", "false", "--resume_from_checkpoint", "false", "--push_to_hub", "false"),
    *("--reward_funcs", f"{alternating_reward.__module__}.{alternating_reward.__name__}"),
)
"""What a run has and its probe has not; at the end of the command line, where it overrides the recipe."""


def _of_training(own: argparse.Namespace) -> list[str]:
    """The probe's own fields as `trl-entropy train` calls them."""
    named = [word for name, flag in ALIASES.items() if getattr(own, name) for word in (flag, getattr(own, name))]
    on_cpu = [] if torch.accelerator.is_available() else ["--use_cpu", "true"]
    return [*PRECISIONS.get(own.dtype, ()), *named, *on_cpu]


def measure(probe: Probe) -> tuple[Measurement, str | None]:
    """Load the model and measure.

    Returns:
        The passes, and why those in float32 were left out (`None` where they were not).
    """
    made = partial(RoundingProbe, measured_steps=probe.steps, progress=_progress)
    with open_trainer(probe.plan, made) as trainer:
        return trainer.measure(), trainer.float32_is_left_out


def summary_of(probe: Probe, measured: Measurement, left_out: str | None) -> dict[str, Any]:
    """What `probe.json` holds: settings, `summarise`'s numbers, and advice."""
    config, model = probe.plan.config, probe.plan.model
    settings = {
        "model": model.model_name_or_path or probe.plan.script.task,
        "dtype": str(model.dtype),
        "autocast": "bfloat16" if config.bf16 else "float16" if config.fp16 else None,
        "lora_r": model.lora_r if model.use_peft else None,
        **{name: getattr(config, name) for name in ("temperature", "learning_rate", "cast_lm_head_to_fp32", "seed")},
        "gates": vars(probe.gates),
    }
    summary = {"settings": settings, "float32_left_out": left_out, **summarise(measured, probe.gates)}
    return {**summary, "advice": advice(summary)}


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy probe`.

    Args:
        argv: The command line without the command's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With a one-line message if the arguments are wrong.
    """
    with one_line_if_full("probe", "and run it again."):
        with one_line_if_wrong("probe"):
            probe = prepare_probe(argv)
        _measure_and_write(probe)
    leave_processes()


def _measure_and_write(probe: Probe) -> None:
    summary = summary_of(probe, *measure(probe))
    folder = Path(probe.plan.config.output_dir)
    write_json(folder / "probe.json", summary)
    print(tables(summary))
    print("\n" + "\n".join(summary["advice"]))
    try:
        draw_rounding(summary, folder / "probe")
    except ImportError as error:
        print(f"No figure: {error}", file=sys.stderr)
    print(f"Results: {folder / 'probe.json'}")


def _progress(what: str) -> None:
    print(f"probe: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
