"""Train PPO with every control and critics on the processes of a launcher, and keep what each of them ended with.

    torchrun --nproc_per_node=2 two_processes_worker.py POLICY FOLDER

POLICY is the folder of a tiny policy and its tokenizer.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForSequenceClassification, set_seed

from tests.worker import work
from trl_entropy.ppo import EntropyPPOConfig, EntropyPPOTrainer

CONTROLS = {"erc_low": 0.95, "erc_high": 1.05, "ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0, "epo_coef": 0.1}


def main(policy: str, folder: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(policy, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    set_seed(1)
    model.config.num_labels = 1
    reward_model = Qwen2ForSequenceClassification(model.config)
    set_seed(3)
    trainer = EntropyPPOTrainer(
        args=EntropyPPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="steps",
            save_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            total_episodes=16,
            response_length=6,
            num_sample_generations=0,
            critic_learning_rate=1e-2,
            **CONTROLS,
        ),
        processing_class=tokenizer,
        model=model,
        ref_model=None,
        reward_model=reward_model,
        train_dataset=Dataset.from_dict({"input_ids": [tokenizer(f"{i}+{i}=")["input_ids"] for i in range(32)]}),
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
        critics=policy,
    )
    trainer.train()
    trainer.save_model(str(Path(folder) / "final"))
    adapters = {name: value.detach() for name, value in trainer.policy_model.named_parameters() if "lora" in name}
    torch.save(
        {"adapters": adapters, "history": trainer.active.states["epo"].steps, "logs": trainer.state.log_history},
        Path(folder) / f"rank{trainer.accelerator.process_index}.pt",
    )


if __name__ == "__main__":
    work(main, *sys.argv[1:])
