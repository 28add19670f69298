"""How costs grow: step time and peak memory against plain TRL GRPO, one thing varied at a time.

`length` (completion tokens), `vocabulary` and `processes` (DDP, gloo, the same micro-batch on each CPU) time one
optimizer step: plain, with TRL's own entropy bonus, which like EPO needs the gradient of the entropy, and with ERC,
CE-GPPO, EPO and the positive NLL. `critics` times everything done with one rollout. Arms are interleaved in random
order, and ratios taken within a round. Peak memory is that above the imported libraries, in rounds of its own.

Two floors, from the speed of the same process. That of a step is 6 x (non-embedding parameters x tokens + layers x
hidden x sum of squared lengths) + 6 x hidden x vocabulary x completion tokens FLOPs, without padding, at the speed of
matrix products of these sizes; a critic adds a forward pass over the rollout and a training pass over its share. That
of the extra time is a critic's FLOPs, or for the controls eight float32 numbers per completion token at the speed of
`copy_`: four read (log-probs and entropies, new and old), two written (advantages, old log-probs), and the gradients
of the two added losses. The entropies themselves are not among them: TRL computes them in every step.

    python tests/benchmarks/scaling.py --output tests/benchmarks/results/scaling_cpu.json    # 2 cores, about 6 minutes
    python tests/benchmarks/scaling.py --what length --values 1024 2048 --rounds 9
"""

import argparse
import copy
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import critic_memory
import step_overhead
import torch
from critic_memory import Shape
from recorder_cost import clock
from step_overhead import Size, machine, peak_memory, reset_peak

from trl_entropy import AsyPPOTrainer, EntropyGRPOTrainer
from trl_entropy.critics import CriticEnsemble

POLICY = Size(192, 6, 6, 2, 768, 8192, 4, 128)
CRITICS = critic_memory.Size(Shape(192, 6, 6, 2, 768), Shape(64, 6, 4, 2, 256), 8192, completions=4, tokens=128)
VALUES = {"length": [64, 128, 256, 512], "vocabulary": [2048, 8192, 32768], "critics": [1, 2, 4], "processes": [1, 2]}
BONUS, CONTROLS, EPO_COEF = "grpo + entropy bonus", "all controls", 0.001
ARMS = ("grpo", BONUS, CONTROLS)
ALL = {**step_overhead.ERC, **step_overhead.CE_GPPO, **step_overhead.NLL, "epo_coef": EPO_COEF}
step_overhead.ARMS.update({BONUS: None, CONTROLS: ALL})
FLOOR_BYTES_PER_TOKEN = 8 * 4
MEMORY_ROUNDS = 3


def fastest(action: Callable[[], object], on_gpu: bool) -> float:
    """Seconds, the least of a few: a floor."""
    times = []
    for _ in range(15):
        start = clock(on_gpu)
        action()
        times.append(clock(on_gpu) - start)
    return min(times)


def product_seconds(flops: float, rows: int, inner: int, columns: int, like: torch.Tensor) -> float:
    """Seconds of these FLOPs at the speed of a matrix product of this size."""
    left, right, out = like.new_ones(rows, inner), like.new_ones(inner, columns), like.new_ones(rows, columns)
    with torch.no_grad():
        return flops / (2 * rows * inner * columns) * fastest(lambda: torch.mm(left, right, out=out), like.is_cuda)


def copy_seconds(num_bytes: float, like: torch.Tensor) -> float:
    """Seconds of reading and writing these bytes at the speed of a copy that no cache holds."""
    source = torch.ones(2**25, device=like.device)
    target = torch.empty_like(source)
    return num_bytes / (2 * source.nbytes) * fastest(lambda: target.copy_(source), like.is_cuda)


def blocks_seconds(model: Any, lengths: list[int], passes: float) -> float:
    """Floor of the transformer blocks; a forward pass counts as one, a training pass as three."""
    model = getattr(model, "module", model)
    parameters = [p for name, p in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name]
    hidden, tokens = model.config.hidden_size, sum(lengths)
    attention = model.config.num_hidden_layers * hidden * sum(length**2 for length in lengths)
    flops = 2 * passes * (sum(p.numel() for p in parameters) * tokens + attention)
    return product_seconds(flops, tokens, hidden, model.config.intermediate_size, parameters[0])


def step_floor(model: Any, lengths: list[int], completion_tokens: int) -> float:
    config, like = getattr(model, "module", model).config, next(model.parameters())
    hidden, vocabulary = config.hidden_size, config.vocab_size
    head = product_seconds(6 * hidden * vocabulary * completion_tokens, completion_tokens, hidden, vocabulary, like)
    return blocks_seconds(model, lengths, 3) + head


def free_at_once() -> None:
    """From here on freed memory leaves the resident size (glibc). It costs page faults: not for timed rounds."""
    m_mmap_threshold, libc = -3, ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 131072)
    libc.malloc_trim(0)


def idle_memory(on_gpu: bool) -> int:
    torch.zeros(1, device="cuda" if on_gpu else "cpu")
    reset_peak(on_gpu)
    return peak_memory(on_gpu)


def step(trainer: EntropyGRPOTrainer, arm: str, batch: dict, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    trainer._entropy_bonus_enabled, trainer.entropy_coef = arm == BONUS, EPO_COEF
    return step_overhead.step(trainer, arm, batch, optimizer)


def prepare(size: Size, device: str) -> tuple[EntropyGRPOTrainer, dict, torch.optim.Optimizer]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = step_overhead.build_trainer(size, folder, device)
    batch = step_overhead.make_rollout(trainer, size)
    trainer.model = trainer.accelerator.prepare(trainer.model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    step_overhead.switch(trainer, {"epo_coef": EPO_COEF})
    # a learning rate of 0: every arm steps from the same weights, at the cost of a full optimizer step
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0, weight_decay=0.0)
    trainer.on_rollout(batch, batch["rewards"])
    step(trainer, CONTROLS, batch, optimizer)
    trainer.on_rollout(batch, batch["rewards"])  # EPO smooths from the second rollout on
    return trainer, batch, optimizer


def measure_steps(size: Size, rounds: int, device: str) -> None:
    """In a process of its own, or in each of several, of which the first prints the result."""
    base = idle_memory(device == "cuda")
    trainer, batch, optimizer = prepare(size, device)
    found: dict[str, list[tuple[float, int]]] = {arm: [] for arm in ARMS}
    order = random.Random(0)
    for index in range(1 + rounds + MEMORY_ROUNDS):
        if index == 1 + rounds and device == "cpu":
            free_at_once()
        for arm in order.sample(ARMS, len(ARMS)):
            found[arm].append(step(trainer, arm, batch, optimizer))
    prompt, completions = batch["prompt_ids"].shape[1], batch["completion_mask"].sum(1).tolist()
    floor = step_floor(trainer.model, [prompt + tokens for tokens in completions], sum(completions))
    extra = copy_seconds(FLOOR_BYTES_PER_TOKEN * sum(completions), batch["old_entropies"])
    if trainer.accelerator.is_main_process:
        peaks = {arm: statistics.median(peak for _, peak in own[-MEMORY_ROUNDS:]) - base for arm, own in found.items()}
        answer = {
            # the first round warms up
            "results": {arm: [(s, peaks[arm]) for s, _ in own[1 : 1 + rounds]] for arm, own in found.items()},
            "floors": dict.fromkeys(ARMS, (floor, extra)),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        }
        print(json.dumps(answer), flush=True)


def with_critics(count: int, device: str) -> EntropyGRPOTrainer:
    with tempfile.TemporaryDirectory() as folder:
        trainer = critic_memory.build("asyppo" if count else "grpo", CRITICS, folder, device)
    if isinstance(trainer, AsyPPOTrainer):
        trainer.num_generations = CRITICS.completions
        trainer.critics = CriticEnsemble(
            [copy.deepcopy(trainer.critics.critics[0]) for _ in range(count)],
            learning_rate=trainer.args.critic_learning_rate,
            device=device,
            seed=0,
            autocast_dtype=torch.bfloat16 if device == "cuda" else None,
        )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def measure_updates(count: int, device: str) -> None:
    """In a process of its own, which waits while others run: one update for every line that it is sent."""
    on_gpu = device == "cuda"
    base = idle_memory(on_gpu)
    trainer = with_critics(count, device)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6)
    lengths = [32 + CRITICS.tokens] * CRITICS.completions
    extra = sum(blocks_seconds(critic, lengths, 1 + 3 / count) for critic in trainer.critics.critics) if count else 0.0
    floor = step_floor(trainer.model, lengths, CRITICS.tokens * CRITICS.completions) + extra
    print(json.dumps({"parameters": trainer.model.num_parameters(), "floors": (floor, extra)}), flush=True)
    for line in sys.stdin:
        if line.strip() == "memory" and not on_gpu:
            free_at_once()
        reset_peak(on_gpu)
        start = clock(on_gpu)
        critic_memory.update(trainer, CRITICS, optimizer)
        print(json.dumps([clock(on_gpu) - start, peak_memory(on_gpu) - base]), flush=True)


def measure(job: dict[str, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job["what"] == "critics":
        return measure_updates(job["count"], device)
    measure_steps(Size(**job["size"]), job["rounds"], device)


def launch(job: dict[str, Any], threads: int, processes: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--job", json.dumps(job)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    if job["what"] == "processes":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=environment)


def answer_of(child: subprocess.Popen[str], request: str | None = None) -> Any:
    """The next line of JSON that a child prints, once the request has been sent to it."""
    assert child.stdin is not None
    assert child.stdout is not None
    if request is not None:
        child.stdin.write(request + "\n")
    for line in child.stdout:
        if line.startswith(("{", "[")):
            return json.loads(line)
    raise RuntimeError(f"A measuring process ended with exit code {child.wait()} and no result: see its error above.")


def sweep_steps(what: str, values: list[int], rounds: int, threads: int) -> list[dict]:
    rows = []
    for value in values:
        changed: dict[str, Any] = {"length": {"tokens": value}, "vocabulary": {"vocabulary": value}}.get(what, {})
        size = replace(POLICY, **changed)
        job = {"what": what, "size": asdict(size), "rounds": rounds}
        with launch(job, threads, value if what == "processes" else 1) as child:
            rows += rows_of(value, size, answer_of(child))
        print(f"{what} {value}: {rows[-len(ARMS)]['seconds_median']:.3f} s a plain step", flush=True)
    return rows


def sweep_critics(values: list[int], rounds: int, threads: int) -> list[dict]:
    """All processes live at once and one of them works: rounds are interleaved, and each has its own peak."""
    counts = {"grpo": 0} | {f"asyppo, {count}": count for count in values}
    children = {arm: launch({"what": "critics", "count": count}, threads) for arm, count in counts.items()}
    about = {arm: answer_of(child) for arm, child in children.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in counts}
    order = random.Random(0)
    for index in range(rounds + 1):
        for arm in order.sample(list(counts), len(counts)):
            seconds[arm].append(answer_of(children[arm], "time")[0])
        print(f"critics: round {index}/{rounds}", flush=True)
    peaks = {
        arm: statistics.median(answer_of(child, "memory")[1] for _ in range(MEMORY_ROUNDS))
        for arm, child in children.items()
    }
    for child in children.values():
        child.communicate()
    results = {arm: [(own, peaks[arm]) for own in seconds[arm][1:]] for arm in counts}
    floors = {arm: found["floors"] for arm, found in about.items()}
    rows = rows_of(0, CRITICS, about["grpo"] | {"results": results, "floors": floors})
    return [entry | {"value": counts[entry["arm"]]} for entry in rows]


def rows_of(value: int, size: Any, measured: dict[str, Any]) -> list[dict]:
    results, rows = measured["results"], []
    for arm, own in results.items():
        entry = step_overhead.row("scaling", size, measured["parameters"], arm, results)
        extra = [mine[0] - base[0] for mine, base in zip(own, results["grpo"], strict=True)]
        low, middle, _ = statistics.quantiles(extra, n=4)
        floor, extra_floor = measured["floors"][arm]
        entry |= {"value": value, "floor_seconds": floor, "extra_floor_seconds": extra_floor}
        entry |= {"time_over_floor": entry["seconds_median"] / floor, "extra_seconds_median": middle}
        # None is within noise: the lower quartile shows no extra time
        entry |= {"extra_over_floor": middle / extra_floor if low > 0 else None}
        rows.append(entry)
    return rows


def cells(entry: dict) -> list[str]:
    if entry["arm"] == "grpo":
        times, extra = "1", "-"
    else:
        low, high = entry["time_ratio_quartiles"]
        times, extra = f"{entry['time_ratio_median']:.3f} ({low:.3f} to {high:.3f})", "within noise"
    if entry["extra_over_floor"] is not None:
        extra = f"{entry['extra_over_floor']:.3g} ({entry['extra_seconds_median'] * 1e3:.1f} ms)"
    numbers = [f"{entry['memory_ratio_median']:.3f}", f"{entry['time_over_floor']:.2f}"]
    return [str(entry["value"]), entry["arm"], f"{entry['seconds_median']:.3f}", times, *numbers, extra]


def print_table(what: str, rows: list[dict]) -> None:
    print(f"\n| {what} | arm | s | time ratio (quartiles) | peak memory ratio | time / floor | extra / its floor |")
    print("|---|---|---|---|---|---|---|")
    for entry in rows:
        print(f"| {' | '.join(cells(entry))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--values", nargs="+", type=int, help="of the one thing that --what names")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return measure(options.job)
    if options.rounds < 2 or (options.values and len(options.what) != 1):
        parser.error("--rounds must be at least 2, and --values goes with a --what of one thing.")
    sweeps = {}
    for what in options.what:
        values, how = options.values or VALUES[what], (options.rounds, options.threads)
        sweeps[what] = sweep_critics(values, *how) if what == "critics" else sweep_steps(what, values, *how)
    torch.set_num_threads(options.threads)
    about = machine("cuda" if torch.cuda.is_available() else "cpu")
    if options.output:
        options.output.write_text(json.dumps({"machine": about, "sweeps": sweeps}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for what, rows in sweeps.items():
        print_table(what, rows)


if __name__ == "__main__":
    main()
