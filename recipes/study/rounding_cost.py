"""What the remedies against rounding cost: a training step with each, against one with the published gate in bfloat16.

From the repository, with what `rounding.py` needs and TRL 1.16:

    python recipes/study/rounding_cost.py

A step is what training does with a micro-batch: the pass over it that the rollout makes for its log-probs and
entropies, then forward, backward and AdamW. One process, one model, one micro-batch. The arms are interleaved in
random order, round after round, and every ratio is taken within its round. On a CPU the clock is the process's own.
The rows go to `rounding_cost.json`, from which `rounding.py --report` makes the table of `rounding.md`.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from rounding import Row
from transformers.utils import logging as transformers_logging
from trl.trainer.utils import add_fused_lm_head

from trl_entropy import EntropyGRPOTrainer
from trl_entropy.commands.probe import prepare_probe
from trl_entropy.commands.train import open_trainer
from trl_entropy.controls import ENTROPY_FLOOR
from trl_entropy.trainers.grpo import ROWS_PER_REPEAT
from trl_entropy.trainers.rollout_contact import REPEAT_PADDING

RESULTS = Path(__file__).parent / "rounding_cost.json"
AUTOCAST = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
SLOW_ROUNDS = 3
"""Of float16 on a CPU: ten times slower without instructions for it."""
TENSORS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


@dataclass(frozen=True)
class Arm:
    """How a step is made; the defaults are the published gate in bfloat16 autocast.

    Attributes:
        dtype: What float32 weights are computed in.
        floor: `erc_entropy_floor`.
        float32_head: `cast_lm_head_to_fp32`.
        float32_entropies: Whether the entropies, old and new, come from passes of their own in float32.
        repeats: Whether the rollout's pass is repeated on one row of 32, for `erc/rounding_fraction`.
    """

    dtype: torch.dtype = torch.bfloat16
    floor: float = ENTROPY_FLOOR
    float32_head: bool = False
    float32_entropies: bool = False
    repeats: bool = False


ARMS = {
    "published gate": Arm(),
    "erc_entropy_floor": Arm(floor=0.01),
    "erc/rounding_fraction": Arm(repeats=True),
    "cast_lm_head_to_fp32": Arm(float32_head=True),
    "float16": Arm(dtype=torch.float16),
    "float32 forward for the entropies": Arm(float32_entropies=True),
    "float32": Arm(dtype=torch.float32),
}


class Stepper:
    """Makes steps on one micro-batch, each in the way of an arm; the weights stay where they are.

    Args:
        trainer: Of a model with float32 weights, not yet training.
        completions: Of the micro-batch.
    """

    def __init__(self, trainer: EntropyGRPOTrainer, completions: int) -> None:
        self._trainer, self._on_gpu = trainer, trainer.accelerator.device.type == "cuda"
        trainer.args.erc_low, trainer.args.erc_high = 0.95, 1.05
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        with self._computing_in(torch.bfloat16):
            rollout = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
        self.batch = {name: rollout[name][:completions] for name in TENSORS}
        self.batch["num_items_in_batch"] = self.batch["completion_mask"].sum()
        # A learning rate of 0, at the cost of a full optimizer step
        self._optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0, weight_decay=0.0)
        self._scaler = torch.amp.GradScaler(trainer.accelerator.device.type, init_scale=2.0**10)
        model, self._forwards = trainer.model, {False: trainer.model.forward}
        add_fused_lm_head(model, trainer.temperature, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
        self._forwards[True] = model.forward

    def step(self, arm: Arm) -> float:
        """Seconds of one step."""
        trainer, started = self._trainer, self._clock()
        trainer.model.forward = self._forwards[arm.float32_head]
        trainer.args.erc_entropy_floor = arm.floor
        with self._computing_in(arm.dtype):
            old_logps, old_entropies = self._forward()
        if arm.float32_entropies:
            with self._computing_in(torch.float32):
                old_entropies, _ = self._forward()[1], self._forward()[1]
        batch = {**self.batch, "old_per_token_logps": old_logps, "old_entropies": old_entropies}
        with self._computing_in(arm.dtype):
            loss = trainer.compute_loss(trainer.model, batch)
        scaler = self._scaler if arm.dtype == torch.float16 else None
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(self._optimizer)
            scaler.update()
        else:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        seconds = self._clock() - started
        return seconds + self._repeat() if arm.repeats else seconds

    def _repeat(self) -> float:
        """Seconds that a step's share of the repeated pass takes: one row, with more padding, for every 32."""
        started = self._clock()
        with self._computing_in(torch.bfloat16):
            self._forward(rows=1, padding=REPEAT_PADDING)
        return (self._clock() - started) * len(self.batch["completion_ids"]) / ROWS_PER_REPEAT

    @torch.no_grad()
    def _forward(self, rows: int | None = None, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = (
            torch.cat([self.batch[f"prompt_{kind}"], self.batch[f"completion_{kind}"]], 1)[:rows]
            for kind in ("ids", "mask")
        )
        ids, mask = (torch.nn.functional.pad(values, (padding, 0)) for values in (ids, mask))
        length = self.batch["completion_ids"].size(1)
        return self._trainer._get_per_token_logps_and_entropies(
            self._trainer.model, ids, mask, length, compute_entropy=True
        )[:2]

    @contextmanager
    def _computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Within it, the trainer's autocast is to this type; float32 is none."""
        accelerator = self._trainer.accelerator
        before = accelerator.native_amp, accelerator.state._mixed_precision
        accelerator.native_amp, accelerator.state._mixed_precision = dtype != torch.float32, AUTOCAST[dtype]
        try:
            yield
        finally:
            accelerator.native_amp, accelerator.state._mixed_precision = before

    def _clock(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def measure(trainer: EntropyGRPOTrainer, completions: int, rounds: int) -> list[dict[str, Any]]:
    """A row for every arm, after a round that does not count."""
    stepper = Stepper(trainer, completions)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    order = random.Random(0)
    slow = trainer.accelerator.device.type == "cpu"
    for index in range(rounds + 1):
        arms = [name for name, arm in ARMS.items() if not slow or arm.dtype != torch.float16 or index <= SLOW_ROUNDS]
        for name in order.sample(arms, len(arms)):
            took = stepper.step(ARMS[name])
            if index:
                seconds[name].append(took)
        print(f"\rround {index}/{rounds}", end="", file=sys.stderr, flush=True)
    base = seconds["published gate"]
    return [{"arm": name, **_summary(own, base)} for name, own in seconds.items()]


def _summary(seconds: list[float], base: list[float]) -> dict[str, Any]:
    ratios = [own / published for own, published in zip(seconds, base, strict=False)]
    low, _, high = statistics.quantiles(ratios, n=4)
    numbers = {
        "seconds": statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
    }
    return {"rounds": len(seconds), **json.loads(json.dumps(numbers), parse_float=lambda x: float(f"{float(x):.4g}"))}


def machine(device: str) -> dict[str, str]:
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    return {"device": name, "python": platform.python_version(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="at least 2")
    parser.add_argument("--completions", type=int, default=4, help="of the micro-batch, at most 16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="JSON of results")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    probe = prepare_probe(Row("SmolLM2", "autocast", 1.0).arguments(options.device))
    with open_trainer(probe.plan, EntropyGRPOTrainer) as trainer:
        rows = measure(trainer, options.completions, options.rounds)
    about = {"completions": options.completions, **machine(options.device)}
    options.results.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
