"""A run with vLLM and all controls, in a process of its own: the second half of `test_resume.py`.

    python -m tests.vllm.resume_worker MODEL FOLDER CHECKPOINT OUTPUT.pt

continues the run in FOLDER from CHECKPOINT, with a new engine, and writes its weights and rewards to OUTPUT.pt.
"""

import sys
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, set_seed

from tests.conftest import parity_reward
from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer

from . import cpu_engine
from .observe import ALL_CONTROLS

SETTINGS: dict[str, Any] = {
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 6,
    "steps_per_generation": 4,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "learning_rate": 0.01,
    "logging_steps": 1,
    **ALL_CONTROLS,
    **cpu_engine.ENGINE,
}
"""Three rollouts of four steps; the checkpoint falls in the middle of the second."""


def make_run(model: str, folder: str) -> Any:
    args = EntropyGRPOConfig(
        folder, **SETTINGS, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True
    )
    prompts = Dataset.from_dict({"prompt": [f"{i}+{7 * i % 10}="[: 1 + i % 4] for i in range(16)]})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model, padding_side="left")
    trainer = EntropyGRPOTrainer(model, parity_reward, args, prompts, processing_class=tokenizer)
    cpu_engine.forget_launcher()
    set_seed(args.seed)
    return trainer


def outcome(trainer: Any) -> dict[str, Any]:
    """What two runs must have in common: the final weights, and the mean reward of every rollout."""
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {"weights": trainer.model.state_dict(), "rewards": rewards}


def main() -> None:
    model, folder, checkpoint, output = sys.argv[1:]
    with pytest.MonkeyPatch.context() as patch:
        cpu_engine.share_engines(patch)
        trainer = make_run(model, folder)
        torch.rand(1000)  # a generator that the checkpoint has to set back
        trainer.train(resume_from_checkpoint=checkpoint)
        torch.save(outcome(trainer), output)


if __name__ == "__main__":
    main()
