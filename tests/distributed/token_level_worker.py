"""Rewards and advantages of single tokens, on as many processes as this script is launched with.

Completions are made up by their place in the batch of all processes, so that every launch trains on the same ones. A
prompt's eight completions are one group, which two processes share.

    torchrun --standalone --nproc_per_node 2 tests/distributed/token_level_worker.py MODEL FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from tests.worker import work
from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer

GROUP, EOS = 8, 1
LENGTHS = (5, 2, 6, 3, 1, 4, 2, 3)
"""Of the completions: the longest of each process differ."""
CASES: dict[str, dict[str, Any]] = {
    "token_rewards": {},
    "token_advantages": {},
    "masked": {"mask_truncated_completions": True},
    "erc": {"erc_low": 0.95, "erc_high": 1.05},
}


def completion(index: int) -> list[int]:
    """Every third one does not end."""
    return [*(2 + (index + 3 * place) % 9 for place in range(LENGTHS[index] - 1)), 5 if index % 3 == 2 else EOS]


def values(index: int) -> list[float]:
    return [(one % 5 - 2) / 8 + index / 16 for one in completion(index)]


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 2) for text in completions]


class Kept(EntropyGRPOTrainer):
    """Keeps its rollouts' advantages, one list per completion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kept: list[list[float]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        first = self.accelerator.process_index * len(inputs)
        for index, row in enumerate(output["advantages"].tolist(), first):
            self.kept.append(row[: LENGTHS[index]])
        return output


def build(model: str, folder: str, case: str, processes: int) -> Kept:
    name = case if case.startswith("token_") else "token_rewards"

    def rolls(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        first = trainer.accelerator.process_index * len(prompts)
        indices = range(first, first + len(prompts))
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [completion(index) for index in indices],
            "logprobs": [[0.0] * LENGTHS[index] for index in indices],
            name: [values(index) for index in indices],
        }

    args = EntropyGRPOConfig(
        folder,
        **CASES[case],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=3,
        num_generations=GROUP,
        num_iterations=3,
        steps_per_generation=1,
        per_device_train_batch_size=GROUP // processes,
        optim="sgd",
        learning_rate=0.1,
        seed=0,
    )
    prompts = Dataset.from_dict({"prompt": ["1+1=", "2+2=", "3+4="]})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    return Kept(model, rewards, args, prompts, processing_class=tokenizer, rollout_func=rolls)


def main() -> None:
    model, folder = sys.argv[1:]
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found = {}
    for case in CASES:
        trainer = build(model, folder, case, processes)
        trainer.train()
        found[case] = {
            "processes": trainer.accelerator.num_processes,
            "advantages": trainer.kept,
            "logged": [entry["token_rewards"] for entry in trainer.state.log_history if "token_rewards" in entry],
            "weights": {name: value.detach().clone() for name, value in trainer.model.named_parameters()},
        }
    torch.save(found, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    work(main)
