"""Trains a tiny policy with the recorder on, on the processes that this script is launched with.

torchrun --standalone --nproc_per_node 2 tests/telemetry/recorder_worker.py MODEL FOLDER [CHECKPOINT]
"""

import sys

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from tests.worker import work
from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer


def parity_reward(completions: list[str], **_: object) -> list[float]:
    return [float(ord(text[0]) % 2) if text else 0.0 for text in completions]


def main() -> None:
    model, folder, checkpoint = [*sys.argv[1:], None][:3]
    args = EntropyGRPOConfig(
        folder,
        erc_low=0.95,
        erc_high=1.05,
        record_tokens=5,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        learning_rate=0.01,
        max_steps=6,
        per_device_train_batch_size=4,
        num_generations=4,
        steps_per_generation=2,
        max_completion_length=6,
        save_strategy="steps",
        save_steps=3,
        seed=0,
    )
    prompts = Dataset.from_dict({"prompt": [f"{i}+{7 * i % 10}=" for i in range(16)]})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    trainer = EntropyGRPOTrainer(model, parity_reward, args, prompts, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()


if __name__ == "__main__":
    work(main)
