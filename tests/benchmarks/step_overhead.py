"""What the entropy controls cost: one optimizer step of `EntropyGRPOTrainer` against plain `GRPOTrainer`.

One process, one policy, one optimizer, one rollout. The arms are interleaved in random order, round after round, and
every ratio is taken within its round, so that drift of the machine cancels. Plain GRPO is TRL's own class: the trainer
object is switched to it, so the memory below both is the same.

    python tests/benchmarks/step_overhead.py                       # CPU sizes, table and JSON
    python tests/benchmarks/step_overhead.py --sizes r1-distill-1.5b --rounds 15    # one NVIDIA GPU, bf16
"""

import argparse
import gc
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, set_seed
from trl import GRPOTrainer

from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.controls import ActiveControls


@dataclass(frozen=True)
class Size:
    """One measured setting: a Qwen2 architecture with random weights, and a micro-batch."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    completions: int
    tokens: int
    tied: bool = True


SIZES = {
    "tiny": Size(16, 2, 2, 1, 32, 64, 2, 16),  # to try the script
    "5M-8k-256": Size(192, 6, 6, 2, 768, 8192, 4, 256),
    "24M-32k-512": Size(320, 8, 5, 5, 1280, 32768, 2, 512),
    "24M-32k-1024": Size(320, 8, 5, 5, 1280, 32768, 2, 1024),
    "41M-151k-256": Size(256, 2, 4, 2, 1024, 151936, 2, 256),
    # DeepSeek-R1-Distill-Qwen-1.5B's architecture
    "r1-distill-1.5b": Size(1536, 28, 12, 2, 8960, 151936, 8, 2048, tied=False),
}
CPU_SIZES = [name for name in SIZES if name not in ("tiny", "r1-distill-1.5b")]

OFF = {"erc_low": None, "erc_high": None, "ce_gppo_alpha1": None, "ce_gppo_alpha2": None, "positive_nll_coef": 0.0}
ERC = {"erc_low": 0.95, "erc_high": 1.05}
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}
NLL = {"positive_nll_coef": 0.1}
ARMS = {
    "grpo": None,
    "no control": OFF,
    "erc": {**OFF, **ERC},
    "ce-gppo": {**OFF, **CE_GPPO},
    "positive nll": {**OFF, **NLL},
    "all": {**ERC, **CE_GPPO, **NLL},
}


def build_trainer(size: Size, folder: str, device: str) -> EntropyGRPOTrainer:
    set_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.intermediate,
        tie_word_embeddings=size.tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    on_gpu = device == "cuda"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
    if on_gpu:  # TRL's default, which takes effect in `train()` only
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    args = EntropyGRPOConfig(
        folder,
        **ARMS["all"],
        delta=10.0,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=on_gpu,
        report_to="none",
        per_device_train_batch_size=size.completions,
        num_generations=2,
        steps_per_generation=8,
        max_completion_length=size.tokens,
    )
    dataset = Dataset.from_dict({"prompt": ["<eos>"] * 16})
    return EntropyGRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), args, dataset, processing_class=tokenizer
    )


def make_rollout(trainer: EntropyGRPOTrainer, size: Size) -> dict[str, torch.Tensor]:
    """A rollout of random tokens, scored by the policy before a small random move of its weights."""
    device, shape = trainer.accelerator.device, (size.completions, size.tokens)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, size.vocabulary, (size.completions, 32), generator=generator).to(device)
    completions = torch.randint(2, size.vocabulary, shape, generator=generator).to(device)
    lengths = torch.randint(size.tokens // 2, size.tokens + 1, (size.completions, 1), generator=generator)
    lengths[0] = size.tokens
    mask = (torch.arange(size.tokens) < lengths).long().to(device)
    ids, attention = torch.cat([prompts, completions], 1), torch.cat([torch.ones_like(prompts), mask], 1)
    with torch.no_grad():
        old_logps, old_entropies, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, size.tokens, compute_entropy=True
        )
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() * 0.05)
    rewards = (torch.arange(size.completions, device=device) % 2).float()
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": rewards * 2 - 1,
        "rewards": rewards,
        "old_per_token_logps": old_logps,
        "old_entropies": old_entropies,
        "num_items_in_batch": mask.sum() * 8,
        "num_correct_tokens": (mask * rewards[:, None]).sum() * 8,
    }


def peak_memory(on_gpu: bool) -> int:
    """Peak bytes since `reset_peak`: allocated on the GPU, or resident in the process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def switch(trainer: GRPOTrainer, settings: dict[str, object], states: dict[str, object] = {}) -> None:  # noqa: B006
    """Give a trainer other settings of its controls, which go on with what they remembered."""
    for name, value in settings.items():
        setattr(trainer.args, name, value)
    trainer.active = ActiveControls.of(trainer.args)
    trainer.active.states = {name: states.setdefault(name, state) for name, state in trainer.active.states.items()}


def step(trainer: GRPOTrainer, arm: str, batch: dict, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """One optimizer step of an arm: seconds and peak bytes."""
    settings, on_gpu = ARMS[arm], trainer.accelerator.device.type == "cuda"
    trainer.__class__ = GRPOTrainer if settings is None else EntropyGRPOTrainer
    switch(trainer, settings or OFF)
    reset_peak(on_gpu)
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, peak_memory(on_gpu)


def measure(name: str, rounds: int, device: str, so_far: Callable[[list[dict]], None] | None = None) -> list[dict]:
    """The rows of a size; `so_far` is called with those of every round from the second on."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(size, folder, device)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = make_rollout(trainer, size)
    # a learning rate of 0: every arm steps from the same weights, at the cost of a full optimizer step
    # on a GPU fused, as in transformers: the temporary tensors of the other would be the peak, and hide a control's
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0, weight_decay=0.0, fused=device == "cuda")
    results: dict[str, list[tuple[float, int]]] = {arm: [] for arm in ARMS}
    parameters, order = sum(parameter.numel() for parameter in trainer.model.parameters()), random.Random(0)
    for index in range(rounds + 2):
        for arm in order.sample(list(ARMS), len(ARMS)):
            result = step(trainer, arm, batch, optimizer)
            if index >= 2:
                results[arm].append(result)
        print(f"\r{name}: round {max(index - 1, 0)}/{rounds}", end="", flush=True)
        if so_far and index >= 3:
            so_far([row(name, size, parameters, arm, results) for arm in ARMS])
    print()
    return [row(name, size, parameters, arm, results) for arm in ARMS]


def row(name: str, size: Size, parameters: int, arm: str, results: dict[str, list[tuple[float, int]]]) -> dict:
    plain, own = results["grpo"], results[arm]
    ratios = sorted(mine[0] / base[0] for mine, base in zip(own, plain, strict=True))
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "size": name,
        "parameters": parameters,
        "vocabulary": size.vocabulary,
        "completions": size.completions,
        "completion_tokens": size.tokens,
        "arm": arm,
        "rounds": len(own),
        "seconds_median": statistics.median(seconds for seconds, _ in own),
        "time_ratio_median": statistics.median(ratios),
        "time_ratio_quartiles": [quartiles[0], quartiles[2]],
        "peak_bytes_median": statistics.median(peak for _, peak in own),
        "memory_ratio_median": statistics.median(mine[1] / base[1] for mine, base in zip(own, plain, strict=True)),
    }


def machine(device: str) -> dict[str, str]:
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    return {"device": name, "python": platform.python_version(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=CPU_SIZES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for name in options.sizes for row in measure(name, options.rounds, device)]
    about = machine(device)
    if options.output:
        options.output.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("| size | arm | step, s | time ratio (quartiles) | peak memory ratio |\n|---|---|---|---|---|")
    for entry in rows:
        low, high = entry["time_ratio_quartiles"]
        print(
            f"| {entry['size']} | {entry['arm']} | {entry['seconds_median']:.3f} | {entry['time_ratio_median']:.3f} "
            f"({low:.3f} to {high:.3f}) | {entry['memory_ratio_median']:.3f} |"
        )


if __name__ == "__main__":
    main()
