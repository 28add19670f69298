"""Trains the pretrained model on the processes that this script is launched with, on rollouts written beforehand.

So that the number of processes changes nothing but rounding, a rollout is used whole for each of its two optimizer
steps, and the optimizer of the policy is SGD. The first process writes what it ended with.

    torchrun --standalone --nproc_per_node 2 tests/real_model/two_processes_worker.py MODEL FOLDER
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, set_seed

from tests.worker import work
from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer

CONTROLS: dict[str, Any] = {
    "erc_low": 0.95,
    "erc_high": 1.05,
    "ce_gppo_alpha1": 0.75,
    "ce_gppo_alpha2": 1.0,
    "epo_coef": 0.01,
    "positive_nll_coef": 0.1,
}
CRITICS = {"critic_learning_rate": 1e-3, "entropy_filter_fraction": 0.25, "advantage_mask_fraction": 0.25}
CASES = ("full", "asyppo-lora")
"""All weights of a GRPO policy; an adapter, with critics that are adapters too."""
ROWS = 8
ANSWERS = ("Yes.", "No", "It is not odd.", "Yes, it is an odd number")
"""Of a group; the reward of those that begin with Y or I is 1."""


def parity_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(ord(text[0]) % 2) if text else 0.0 for text in completions]


def written_beforehand(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The trainer's `rollout_func`: each group has the same answers."""
    tokenizer = trainer.processing_class
    answers = [tokenizer(ANSWERS[row % len(ANSWERS)])["input_ids"] for row in range(len(prompts))]
    return {
        "prompt_ids": tokenizer(prompts)["input_ids"],
        "completion_ids": [[*ids[:7], tokenizer.eos_token_id] for ids in answers],
        "logprobs": None,
    }


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def build(model: str, folder: str, case: str) -> EntropyGRPOTrainer:
    processes, with_critics = int(os.environ.get("WORLD_SIZE", "1")), case == "asyppo-lora"
    args = (AsyPPOConfig if with_critics else EntropyGRPOConfig)(
        folder,
        **CONTROLS,
        **(CRITICS | {"critic_per_device_train_batch_size": ROWS // 2 // processes} if with_critics else {}),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.05 if case == "full" else 0.5,
        lr_scheduler_type="constant",
        max_steps=3,
        num_iterations=2,
        steps_per_generation=1,
        num_generations=len(ANSWERS),
        per_device_train_batch_size=ROWS // processes,
        max_completion_length=8,
        seed=0,
    )
    set_seed(0)  # TRL 1.12 makes LoRA's weights before it seeds
    return (AsyPPOTrainer if with_critics else EntropyGRPOTrainer)(
        model,
        parity_reward,
        args,
        Dataset.from_dict({"prompt": [f"Is {7 * i} odd?\n" for i in range(16)]}),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=None if case == "full" else lora(),
        rollout_func=written_beforehand,
        **({"critics": model, "critic_peft_config": lora()} if with_critics else {}),
    )


def run(model: str, folder: Path, case: str) -> dict[str, Any]:
    """Train; what trains, before and after, the log, and the number of processes."""
    trainer = build(model, str(folder / case), case)
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    start = {name: value.detach().clone() for name, value in trained.items()}
    trainer.train()
    return {
        "processes": trainer.accelerator.num_processes,
        "change": {name: value.detach() - start[name] for name, value in trained.items()},
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def main() -> None:
    model, folder = sys.argv[1:]
    for case in CASES:
        found = run(model, Path(folder), case)
        if PartialState().is_main_process:
            torch.save(found, Path(folder, f"{case}.pt"))
        gc.collect()  # the trainer's DDP wrapper must go before the process group


if __name__ == "__main__":
    work(main)
