"""What critics cost: GRPO, symmetric PPO and AsyPPO, memory and time of one update on the same rollout.

Symmetric PPO has one critic of the policy's size, AsyPPO two small ones. An update is all that is done with one
rollout: the critics' values, their training, and the policy's optimizer step. Every measurement is a process of its
own, so that its peak is its own; arms are interleaved round after round, and ratios are taken within a round.

    python tests/benchmarks/critic_memory.py                              # CPU: 110M policy, critics of 17M
    python tests/benchmarks/critic_memory.py --size r1-distill-1.5b       # one NVIDIA GPU, bf16: critics of 0.5B
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from step_overhead import machine, peak_memory, reset_peak
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    set_seed,
)

from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer


@dataclass(frozen=True)
class Shape:
    """A Qwen2 architecture."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


@dataclass(frozen=True)
class Size:
    """A policy, a small critic (about 0.15 of it, as 0.6B is of 4B), and a rollout."""

    policy: Shape
    small: Shape
    vocabulary: int
    completions: int
    tokens: int


SIZES = {
    "tiny": Size(Shape(32, 2, 4, 2, 64), Shape(16, 2, 2, 1, 32), 64, 4, 16),  # to try the script
    "110M": Size(Shape(768, 12, 12, 4, 3072), Shape(320, 8, 5, 5, 1280), 16384, 4, 256),
    # DeepSeek-R1-Distill-Qwen-1.5B and Qwen2.5-0.5B
    "r1-distill-1.5b": Size(Shape(1536, 28, 12, 2, 8960), Shape(896, 24, 14, 2, 4864), 151936, 8, 1024),
}
ARMS = ("grpo", "symmetric ppo", "asyppo")
UPDATES = 3


def architecture(shape: Shape, vocabulary: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def build(arm: str, size: Size, folder: str, device: str) -> EntropyGRPOTrainer:
    set_seed(0)
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, size.vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "report_to": "none",
        "per_device_train_batch_size": size.completions,
        "num_generations": 2,
        "steps_per_generation": 2,
        "max_completion_length": size.tokens,
    }
    with torch.device(device):
        policy = AutoModelForCausalLM.from_config(architecture(size.policy, size.vocabulary), dtype=dtype)
    # TRL's default, which takes effect in `train()` only
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    others: dict[str, Any] = {
        "reward_funcs": lambda completions, **_: [0.0] * len(completions),
        "train_dataset": Dataset.from_dict({"prompt": ["t5"] * 16}),
        "processing_class": tokenizer,
    }
    if arm == "grpo":
        return EntropyGRPOTrainer(policy, args=EntropyGRPOConfig(**settings), **others)
    shapes = [size.policy] if arm == "symmetric ppo" else [size.small] * 2
    fractions = {"advantage_mask_fraction": 0.2 * (len(shapes) > 1), "entropy_filter_fraction": 0.0}
    args = AsyPPOConfig(
        **settings,
        **fractions,
        num_critics=len(shapes),
        critic_dtype="bfloat16" if on_gpu else "float32",
        critic_gradient_checkpointing=True,
    )
    configs = [architecture(shape, size.vocabulary) for shape in shapes]
    with torch.device(device):
        critics = [AutoModelForTokenClassification.from_config(config, dtype=dtype) for config in configs]
    return AsyPPOTrainer(policy, args=args, critics=critics, **others)


def update(trainer: EntropyGRPOTrainer, size: Size, optimizer: torch.optim.Optimizer) -> None:
    """All that is done with one rollout of random tokens."""
    device, shape = trainer.accelerator.device, (size.completions, size.tokens)
    generator = torch.Generator().manual_seed(1)
    completions = torch.randint(2, size.vocabulary, shape, generator=generator).to(device)
    ones = torch.ones(shape, dtype=torch.long, device=device)
    rewards = (torch.arange(size.completions, device=device) % 2).float()
    batch = {
        "prompt_ids": completions[:, :32],
        "prompt_mask": ones[:, :32],
        "completion_ids": completions,
        "completion_mask": ones,
        "advantages": rewards * 2 - 1,
        "num_items_in_batch": ones.sum() * 2,
    }
    trainer.on_rollout(batch, rewards)
    trainer.accelerator.backward(trainer.compute_loss(trainer.model, batch))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(arm: str, name: str) -> dict[str, Any]:
    """Run in a process of its own: seconds of the last updates, peak bytes above those before the models are built."""
    size, device = SIZES[name], "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    if on_gpu:
        torch.zeros(1, device=device)
    reset_peak(on_gpu)
    base = peak_memory(on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(arm, size, folder, device)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6)
    seconds = []
    for _ in range(UPDATES + 1):
        start = time.perf_counter()
        update(trainer, size, optimizer)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    critics = trainer.critics.critics if isinstance(trainer, AsyPPOTrainer) else []
    return {
        "arm": arm,
        "seconds": statistics.median(seconds[1:]),
        "peak_bytes": peak_memory(on_gpu) - base,
        "policy_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "critic_parameters": [sum(p.numel() for p in critic.parameters()) for critic in critics],
        "machine": machine(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="110M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.size)))
        return
    # on a CPU, what is freed leaves the resident size at once
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for index in range(options.rounds):
        for arm in ARMS if index % 2 == 0 else reversed(ARMS):
            command = [sys.executable, __file__, "--size", options.size, "--arm", arm]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            results[arm].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {index + 1}/{options.rounds}: {arm} {results[arm][-1]['seconds']:.2f} s", flush=True)
    if options.output:
        options.output.write_text(json.dumps({"size": options.size, "results": results}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in results["grpo"][0]["machine"].items()))
    print("| arm | critics | update, s | time / symmetric (spread) | peak, GB | memory / symmetric |")
    print("|---|---|---|---|---|---|")
    for arm in ARMS:
        print(table_row(results[arm], results["symmetric ppo"]))


def table_row(own: list[dict[str, Any]], symmetric: list[dict[str, Any]]) -> str:
    pairs = list(zip(own, symmetric, strict=True))
    times = [mine["seconds"] / base["seconds"] for mine, base in pairs]
    memory = statistics.median(mine["peak_bytes"] / base["peak_bytes"] for mine, base in pairs)
    seconds = statistics.median(mine["seconds"] for mine in own)
    peak = statistics.median(mine["peak_bytes"] for mine in own) / 1e9
    sizes = " + ".join(f"{count / 1e6:.0f}M" for count in own[0]["critic_parameters"]) or "none"
    return (
        f"| {own[0]['arm']} | {sizes} | {seconds:.2f} | {statistics.median(times):.2f} ({min(times):.2f} to "
        f"{max(times):.2f}) | {peak:.2f} | {memory:.2f} |"
    )


if __name__ == "__main__":
    main()
