"""Trains critics on one global rollout, on as many processes as this script is launched with.

Rank 0 writes what the critics compute, how many forward passes each process made, and what the selection picks. The
rows are spread unevenly over two processes, which also pad their completions to different widths.

    torchrun --standalone --nproc_per_node 2 tests/critics/ensemble_worker.py MODEL FOLDER
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForTokenClassification

from tests.critics.conftest import make_rollout
from tests.worker import work
from trl_entropy.critics import CriticEnsemble, highest_fraction, load_critic, lowest_fraction

# transformers then gives the weights to the first process of a node alone
if __name__ == "__main__":  # not where a test imports it
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}

ROWS, TOKENS, VOCABULARY = 12, 6, 30
OWN_ROWS = {1: [list(range(ROWS))], 2: [[0, 1, 2, 3, 8, 9, 10], [4, 5, 6, 7, 11]]}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16, "gradient_checkpointing": True},
    # AdamW would turn the vanishing first gradients of a fresh adapter, which are rounding errors, into whole steps
    "lora": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)},
}


def critics(model: str, rank: int, settings: dict[str, Any]) -> list[Any]:
    """Two critics of different sizes, which differ between processes until the ensemble takes rank 0's."""
    torch.manual_seed(rank)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_labels=1,
    )
    pair = [load_critic(model, **settings), load_critic(Qwen2ForTokenClassification(config), **settings)]
    with torch.no_grad():
        for name, value in pair[0].named_parameters():
            if "score" in name:
                value.normal_(std=0.3)
    return pair


def local_rollout(rank: int, processes: int) -> tuple[SimpleNamespace, torch.Tensor]:
    whole, rows = make_rollout(VOCABULARY, rows=ROWS, tokens=TOKENS), torch.tensor(OWN_ROWS[processes][rank])
    whole.mask[5] = False
    part = {name: value[rows] for name, value in vars(whole).items()}
    if rank == 1:
        part = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in part.items()}
    return SimpleNamespace(**part), rows


def count_forwards(group: CriticEnsemble) -> list[int]:
    counts = [0] * len(group)

    def hook(index: int) -> Any:
        def count(*_: Any) -> None:
            counts[index] += 1

        return count

    for index, critic in enumerate(group.critics):
        critic.register_forward_pre_hook(hook(index))
    return counts


def gathered_rows(value: torch.Tensor, rows: torch.Tensor, columns: int) -> torch.Tensor:
    """The rows of all processes in global order, and as many columns as all have, `(..., N, columns)`."""
    parts: list[Any] = [(rows, value[..., :columns].contiguous())]
    if dist.is_initialized():
        own, parts = parts[0], [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    order = torch.cat([part[0] for part in parts]).argsort()
    return torch.cat([part[1] for part in parts], -2)[..., order, :]


def train(group: CriticEnsemble, rollout: SimpleNamespace, rows: torch.Tensor, processes: int, times: int) -> Any:
    metrics = {}
    for _ in range(times):
        shards = group.assign([4, 4, 4])
        batch = {"epochs": 1, "batch_size": 4 // processes}
        metrics = group.train_on(**vars(rollout), critic_of_row=shards, rows=rows, **batch)
    return metrics


def run_case(model: str, folder: Path, rank: int, processes: int, settings: dict[str, Any]) -> dict[str, Any]:
    rollout, rows = local_rollout(rank, processes)

    def ensemble(seed: int) -> CriticEnsemble:
        return CriticEnsemble(critics(model, rank, settings), learning_rate=1e-2, device="cpu", seed=seed)

    def values_of(group: CriticEnsemble) -> torch.Tensor:
        found = group.state_values(rollout.input_ids, rollout.attention_mask, rollout.mask.shape[1], batch_size=2)
        return gathered_rows(found, rows, TOKENS + 1)

    group, resumed = ensemble(0), ensemble(1)
    result: dict[str, Any] = {"before": values_of(group), "forwards": count_forwards(group)}
    result["metrics"] = train(group, rollout, rows, processes, times=2)
    result["saved"] = values_of(group)
    group.save(folder / "critics")
    resumed.load(folder / "critics")
    for continued in (group, resumed):
        train(continued, rollout, rows, processes, times=1)
    return result | {"after": values_of(group), "resumed": values_of(resumed)}


def selections(rank: int, processes: int) -> dict[str, torch.Tensor]:
    # the order of the global batch is that of the ranks
    contiguous = slice(0, ROWS) if processes == 1 else slice(0, 7) if rank == 0 else slice(7, ROWS)
    whole = make_rollout(VOCABULARY, rows=ROWS, tokens=TOKENS)
    scores, mask = (whole.targets[contiguous] * 2).round(), whole.mask[contiguous]

    def gather(flat: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(flat) for _ in range(processes)]
        if processes == 1:
            return flat
        dist.all_gather(parts, flat)
        return torch.cat(parts)

    own = torch.arange(ROWS)[contiguous]
    return {
        function.__name__: gathered_rows(function(scores, mask, 0.3, gather), own, TOKENS)
        for function in (lowest_fraction, highest_fraction)
    }


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if processes > 1:
        dist.init_process_group("gloo")
    results: dict[str, Any] = {
        name: run_case(model, folder / name, rank, processes, settings) for name, settings in SETTINGS.items()
    }
    counts: list[Any] = [[results[name]["forwards"] for name in SETTINGS]]
    if processes > 1:
        own, counts = counts[0], [None] * processes
        dist.all_gather_object(counts, own)
    results |= {"selection": selections(rank, processes), "forwards": counts, "processes": processes}
    if rank == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    work(main)
