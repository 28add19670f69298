"""How much of what ERC, PPO-clip and CE-GPPO act on is rounding: a small policy and SmolLM2, in several precisions.

From the repository, with the extras `plots` and `gym`, and for SmolLM2 its packages (see `trl_entropy/pretrained.py`),
about an hour of one CPU core:

    python recipes/study/rounding.py

A row is a rollout of one model, computed in one way at one temperature, and the first optimizer step on it at each of
four learning rates; its result names the `trl-entropy probe` that measures one of them. The passes of a finished row
are kept in `runs/study/rounding`, its numbers in `rounding.jsonl`, and neither is made again. `--only ROW ...` makes
these rows alone, `--report` only draws the figures and writes the tables of `rounding.md`. `--device cuda` computes on
an NVIDIA GPU, which has not been tried; its rows belong in a file of their own (`--results FILE`).
"""

import argparse
import json
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from float16 import Float16Anywhere
from policies import start
from rounding_gates import remedies
from rounding_report import report
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging as transformers_logging

from trl_entropy import EntropyGRPOTrainer
from trl_entropy.commands.probe import PRECISIONS, prepare_probe
from trl_entropy.commands.train import open_trainer, prepare
from trl_entropy.pretrained import SMOLLM2, resolve_model
from trl_entropy.telemetry.rounding import Gates, Measurement, Pass, Updated, summarise
from trl_entropy.trainers.probe import RoundingProbe

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "rounding.jsonl"
SCRATCH, POLICIES = Path("runs/study/rounding"), Path("runs/study/policies")
RATES = (1e-6, 3e-6, 1e-5, 1e-4)
LORA = ("--use_peft", "true", "--lora_r", "16", "--lora_alpha", "32")
ARMS = {
    "float32": ("--dtype", "float32"),
    "autocast": ("--dtype", "autocast"),
    "autocast, float32 head": ("--dtype", "autocast", "--cast_lm_head_to_fp32", "true"),
    "bfloat16": ("--dtype", "bfloat16"),
    "float16": ("--dtype", "float16"),
    "LoRA in autocast": ("--dtype", "autocast", *LORA),
    "LoRA in float16": ("--dtype", "float16", *LORA),
    "LoRA in float32": ("--dtype", "float32", *LORA),
    "float32, exact entropies": ("--dtype", "float32"),
    "autocast, exact entropies": ("--dtype", "autocast"),
}
CHAIN_SUM = {"name": "chain_sum", "size": 64, "test_size": 8, "answer_format": "plain"}
SMOLLM2_ARGUMENTS = (
    *("--task", "reasoning_gym", "--task_args", json.dumps(CHAIN_SUM)),
    *("--max_completion_length", "40", "--per_device_train_batch_size", "16"),
)
MODELS = {
    "arithmetic": ("--task", "arithmetic", "--max_completion_length", "6", "--per_device_train_batch_size", "160"),
    "SmolLM2": SMOLLM2_ARGUMENTS,
    "SmolLM2, off the grid": SMOLLM2_ARGUMENTS,
    "SmolLM2, 4-bit": SMOLLM2_ARGUMENTS,
}
TRAINING = (
    *("--task", "arithmetic", "--max_completion_length", "6", "--output_dir", str(SCRATCH / "training")),
    *("--max_steps", "16", "--steps_per_generation", "8", "--per_device_train_batch_size", "64"),
    *("--num_generations", "4", "--erc_low", "0.95", "--erc_high", "1.05", "--lr_scheduler_type", "constant"),
    *("--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"),
    *("--gradient_checkpointing", "false", "--seed", "0"),
)
"""Of `trl-entropy train`: two rollouts of eight optimizer steps."""


@dataclass(frozen=True)
class Row:
    """One rollout: a model, how it is computed, and the sampling temperature. A step is taken at each of `RATES`."""

    model: str
    arm: str
    temperature: float

    @property
    def name(self) -> str:
        return f"{self.model}/{self.arm}/{self.temperature:g}"

    @property
    def file(self) -> Path:
        return SCRATCH / f"{re.sub('[^a-z0-9.]+', '-', self.name.lower())}.pt"

    @property
    def probe_class(self) -> type[RoundingProbe]:
        return ExactProbe if "exact" in self.arm else Float16Probe if "float16" in self.arm else TimedProbe

    def arguments(self, device: str = "cpu") -> list[str]:
        """Of `trl-entropy probe`, but for the learning rate."""
        return [
            *("--model", model_path(self.model), *_accepted(ARMS[self.arm], device), *MODELS[self.model]),
            *("--temperature", f"{self.temperature:g}", "--steps", "1", "--seed", "0"),
            *("--gradient_checkpointing", "false", "--output_dir", str(SCRATCH / "probe")),
            *_on(device),
        ]


def _accepted(words: Sequence[str], device: str) -> list[str]:
    """float16 is refused on a CPU: `Float16Anywhere` computes in it where a run says bfloat16."""
    return ["autocast" if device == "cpu" and word == "float16" else word for word in words]


def _on(device: str) -> tuple[str, ...]:
    return ("--use_cpu", "true") if device == "cpu" else ()


def model_path(model: str) -> str:
    """Folder of a row's model, made if it is not there; or the name that the package knows it by.

    SmolLM2's packaged weights are 4-bit; in float32 many of them lie exactly between two numbers of bfloat16.
    `SmolLM2` has them rounded to bfloat16 (on its grid), as published checkpoints are. `SmolLM2, off the grid` has
    those moved by less than what bfloat16 would see, at random, as training in float32 does in the long run.
    """
    if model == "arithmetic":
        return start("arithmetic", "policy", 0, POLICIES)
    if model == "SmolLM2, 4-bit":
        return SMOLLM2
    source = resolve_model(SMOLLM2)
    folder = SCRATCH / model.lower().replace(", ", "-").replace(" ", "-")
    if not folder.is_dir():
        rounded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        if model != "SmolLM2":
            rounded = off_the_grid(rounded)
        rounded.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def off_the_grid(model: torch.nn.Module) -> torch.nn.Module:
    """A bfloat16 model in float32, every weight anywhere between those that round to the same number of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    model.float()
    for weight in model.parameters():
        mantissa, exponent = torch.frexp(weight)
        half_spacing = torch.ldexp(torch.full_like(weight, 0.5), exponent - 8)
        half_spacing[mantissa.abs() == 0.5] /= 2  # at a power of two the numbers below are twice as near
        weight += (2 * torch.rand(weight.shape, generator=generator) - 1) * half_spacing
    return model


def rows() -> list[Row]:
    """All, the quick ones and the telling ones first."""
    small = ("float32", "autocast", "bfloat16", "float16", "float32, exact entropies", "autocast, exact entropies")
    return [
        *(Row("arithmetic", arm, temperature) for temperature in (1.0, 0.6) for arm in small),
        *(Row("SmolLM2", arm, 1.0) for arm in ("float32", "autocast", "bfloat16", "autocast, float32 head")),
        *(Row("SmolLM2", arm, 0.6) for arm in ("autocast", "float32")),
        *(Row("SmolLM2, off the grid", arm, 1.0) for arm in ("autocast", "float16", "autocast, float32 head")),
        *(Row("SmolLM2", arm, 1.0) for arm in ("LoRA in autocast", "LoRA in float32", "LoRA in float16")),
        *(Row("SmolLM2, off the grid", arm, 0.6) for arm in ("autocast", "float16", "autocast, float32 head")),
        Row("SmolLM2, 4-bit", "autocast", 1.0),
        *(Row("SmolLM2", arm, 0.6) for arm in ("bfloat16", "autocast, float32 head")),
        Row("SmolLM2", "float16", 1.0),
    ]


class TimedProbe(RoundingProbe):
    """Keeps how long each pass took: processor time, on a GPU its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, measured_steps=(), **kwargs)
        self.seconds: list[float] = []

    def forward_pass(self, rollout: dict[str, Any], batch_size: int | None = None) -> Pass:
        started = self._now()
        found = super().forward_pass(rollout, batch_size)
        self.seconds.append(self._now() - started)
        return found

    def _now(self) -> float:
        if self.accelerator.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class ExactProbe(TimedProbe):
    """Computes entropies in float64 from logits that are centred on the largest, in place of TRL's `log Z - E[z]`."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if torch.is_grad_enabled():  # the training step
            return found
        with self.accelerator.autocast(), torch.no_grad():
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
        scaled = logits.double() / self.temperature
        log_probs = F.log_softmax(scaled - scaled.amax(-1, keepdim=True), dim=-1)
        return found[0], -(log_probs.exp() * log_probs).sum(-1), *found[2:]


class Float16Probe(Float16Anywhere, TimedProbe):
    pass


class Float16Trainer(Float16Anywhere, EntropyGRPOTrainer):
    pass


class EveryRate(TrainerCallback):
    """Takes the first optimizer step at each of several rates from the same weights, and measures after each."""

    def __init__(self, probe: RoundingProbe, rates: Sequence[float]) -> None:
        self._probe, self._rates = probe, rates
        self.updates: list[Updated] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self._probe.optimizer
        if self._probe.accelerator.scaler is not None:  # clipping has taken the scale out of the gradients already
            optimizer = optimizer.optimizer
        groups, parameters = optimizer.param_groups, [p for p in self._probe.model.parameters() if p.requires_grad]
        if not all(parameter.grad.isfinite().all() for parameter in parameters):
            raise OverflowError("the gradients of the first step overflow float16")
        before, own_rate = [parameter.detach().clone() for parameter in parameters], groups[0]["lr"]
        for rate in self._rates:
            for group in groups:
                group["lr"] = rate
            optimizer.step()
            self.updates.append(self._probe.pass_after(1))
            optimizer.state.clear()
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
        for group in groups:
            group["lr"] = own_rate


def measure(row: Row, device: str = "cpu") -> tuple[Measurement, float]:
    """The passes of a row, its updates in the order of `RATES`, and the processor seconds of one pass of training."""
    if not row.file.is_file():
        probe = prepare_probe(row.arguments(device))
        with open_trainer(probe.plan, row.probe_class) as trainer:
            callback = EveryRate(trainer, RATES)
            trainer.add_callback(callback)
            measured = replace(trainer.measure(), updates=tuple(callback.updates))
            seconds = trainer.seconds[0]
        row.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save((measured, seconds), row.file)
    return torch.load(row.file, weights_only=False)


def run(row: Row, device: str = "cpu") -> dict[str, Any]:
    """Measure a row, and summarise it."""
    measured, seconds = measure(row, device)
    found = summarise(measured, Gates())
    updates = [{"learning_rate": rate, **update} for rate, update in zip(RATES, found["updates"], strict=True)]
    for update, passes in zip(updates, measured.updates, strict=True):
        update["remedies"] = remedies(measured, passes)
    probed = row.arguments("cuda" if "float16" in row.arm else device)
    command = shlex.join(["trl-entropy", "probe", *probed, "--learning_rate", f"{RATES[0]:g}"])
    result = {"row": row.name, "command": command, "pass_seconds": seconds, **found, "updates": updates}
    return json.loads(json.dumps(result), parse_float=_four_digits)


def train(arm: str, rate: float, device: str = "cpu") -> dict[str, Any]:
    """Shares that ERC clips in training: the small policy, two rollouts of eight optimizer steps."""
    (precision,) = _accepted([arm], device)
    given = [*PRECISIONS[precision], *TRAINING, "--learning_rate", f"{rate:g}", *_on(device)]
    run = prepare([*given, "--model_name_or_path", model_path("arithmetic")])
    with open_trainer(run, Float16Trainer if arm == "float16" else EntropyGRPOTrainer) as trainer:
        trainer.train()
        shares = [entry["erc/clip_fraction"] for entry in trainer.state.log_history if "erc/clip_fraction" in entry]
    return {"row": f"training/{arm}/{rate:g}", "clip_fraction": [_four_digits(str(share)) for share in shares]}


def _four_digits(number: str) -> float:
    return float(f"{float(number):.4g}")


def read_results(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """By row; nothing where there is no file yet."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {line["row"]: line for line in map(json.loads, lines)}


def run_all(wanted: Sequence[str] | None, path: Path, device: str) -> None:
    """Run what is wanted (`None`: all) and not in the file yet, and add it."""
    jobs: dict[str, Callable[[], dict[str, Any]]] = {row.name: partial(run, row, device) for row in rows()}
    trainings = {f"training/{arm}/{rate:g}": partial(train, arm, rate, device) for arm in PRECISIONS for rate in RATES}
    for name, job in (trainings | jobs).items():
        if name not in read_results(path) and (wanted is None or name in wanted):
            print(name, file=sys.stderr, flush=True)
            result = job()
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="such as SmolLM2/autocast/1")
    parser.add_argument("--report", action="store_true", help="only draw the figures and write the tables again")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="lines of results")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    if not arguments.report:
        run_all(arguments.only, arguments.results, arguments.device)
    if arguments.results == RESULTS and arguments.only is None:
        report(read_results())


if __name__ == "__main__":
    main()
