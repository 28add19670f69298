"""What the recorder costs: optimizer steps with `record_tokens` against the same steps without.

A measurement is one rollout of a few optimizer steps (forward, backward, AdamW) on the same micro-batch, whole
completions and the writing of a Parquet file included: a file every rollout, where training writes one every 20,000
rows. The arms are interleaved in random order, round after round, and every ratio is taken within its round, against
the arm of the same controls without the recorder. The recorder's own share of the step is measured too, on the clock
around its calls, because it is smaller than what machines differ by from one minute to the next.

    python tests/benchmarks/recorder_cost.py                                              # CPU sizes, table
    python tests/benchmarks/recorder_cost.py --sizes r1-distill-1.5b --rounds 15 --steps 8       # one NVIDIA GPU, bf16
"""

import argparse
import functools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from step_overhead import ERC, OFF, SIZES, build_trainer, machine, make_rollout, switch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trl_entropy import EntropyGRPOTrainer
from trl_entropy.telemetry.recorder import Schedule, TokenRecorder
from trl_entropy.trainers.recording import add_recorder

CPU_SIZES = ["5M-8k-256", "24M-32k-512"]
CONTROLS = {"no control": OFF, "erc": {**OFF, **ERC}}
ARMS = [(controls, tokens) for controls in CONTROLS for tokens in (0, 256, 1024)]
RUN_STEPS = 900
"""Steps of the run that is pretended, few enough for every step to be recorded."""


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer that has a text for every token, which the recorder writes down."""
    words = {f"w{index}": index for index in range(vocabulary)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0")


def clock(on_gpu: bool) -> float:
    """The time, once the device has done all that it was given."""
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(recorder: TokenRecorder, on_gpu: bool) -> list[float]:
    """Have a recorder note how long each of its calls takes."""
    seconds: list[float] = []

    def call(method, *args) -> None:
        start = clock(on_gpu)
        method(*args)
        seconds.append(clock(on_gpu) - start)

    for name in ("add", "flush"):
        setattr(recorder, name, functools.partial(call, getattr(recorder, name)))
    return seconds


def rollout(
    trainer: EntropyGRPOTrainer, arm: tuple[str, int], batch: dict, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[float, float]:
    """Seconds of the optimizer steps of one rollout, and those of them that the recorder took."""
    controls, tokens = arm
    switch(trainer, {**CONTROLS[controls], "record_tokens": tokens})
    trainer._recorder = (
        add_recorder(trainer, trainer._tokenizer, trainer._micro_batches_per_rollout) if tokens else None
    )
    if trainer._recorder is not None:
        trainer._recorder.start(0, Schedule(1, steps, RUN_STEPS))
    on_gpu = trainer.accelerator.device.type == "cuda"
    recording = timed(trainer._recorder, on_gpu) if tokens else []
    start = clock(on_gpu)
    for step in range(steps):
        trainer.state.global_step = trainer._step = step
        trainer.accelerator.backward(trainer.compute_loss(trainer.model, batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if trainer._recorder is not None:
        trainer._recorder.flush()
    return clock(on_gpu) - start, sum(recording)


def measure(name: str, rounds: int, steps: int, device: str) -> list[dict]:
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(size, folder, device)
        trainer._tokenizer = word_tokenizer(size.vocabulary)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = make_rollout(trainer, size)
        batch["completion_index"] = torch.arange(size.completions, device=trainer.accelerator.device)
        # a learning rate of 0: every arm steps from the same weights, at the cost of a full optimizer step
        optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0, weight_decay=0.0)
        seconds: dict[tuple[str, int], list[tuple[float, float]]] = {arm: [] for arm in ARMS}
        order = random.Random(0)
        for index in range(rounds + 1):
            for arm in order.sample(ARMS, len(ARMS)):
                found = rollout(trainer, arm, batch, optimizer, steps)
                if index:
                    seconds[arm].append((found[0] / steps, found[1] / steps))
            print(f"\r{name}: round {index}/{rounds}", end="", flush=True)
        print()
    return [row(name, arm, seconds) for arm in ARMS]


def row(name: str, arm: tuple[str, int], seconds: dict[tuple[str, int], list[tuple[float, float]]]) -> dict:
    controls, tokens = arm
    ratios = [own / base for (own, _), (base, _) in zip(seconds[arm], seconds[controls, 0], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "size": name,
        "controls": controls,
        "record_tokens": tokens,
        "rounds": len(ratios),
        "seconds_median": statistics.median(total for total, _ in seconds[arm]),
        "recorder_seconds_median": statistics.median(own for _, own in seconds[arm]),
        "recorder_share_median": statistics.median(own / total for total, own in seconds[arm]),
        "time_ratio_median": statistics.median(ratios),
        "time_ratio_quartiles": [quartiles[0], quartiles[2]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=CPU_SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a rollout")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for name in options.sizes for row in measure(name, options.rounds, options.steps, device)]
    about = machine(device)
    if options.output:
        options.output.write_text(
            json.dumps({"machine": about, "steps": options.steps, "rows": rows}, indent=1) + "\n"
        )
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("| size | controls | record_tokens | step, s | time ratio (quartiles) | recorder, share of the step |")
    print("|---|---|---|---|---|---|")
    for entry in rows:
        low, high = entry["time_ratio_quartiles"]
        print(
            f"| {entry['size']} | {entry['controls']} | {entry['record_tokens']} | {entry['seconds_median']:.3f} | "
            f"{entry['time_ratio_median']:.3f} ({low:.3f} to {high:.3f}) | {entry['recorder_share_median']:.2%} |"
        )


if __name__ == "__main__":
    main()
