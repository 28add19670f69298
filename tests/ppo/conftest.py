"""TRL's PPO on tiny models: a policy, a reward model, a value model and tokenized prompts, on CPU and in seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForSequenceClassification, set_seed

TRAINER_ARGUMENTS = (
    "value_model",
    "critics",
    "critic_peft_config",
    "peft_config",
    "callbacks",
    "eval_dataset",
    "processing_class",
)


@pytest.fixture
def make_scorer(tiny_tokenizer: Any) -> Callable[[int], torch.nn.Module]:
    """`make_scorer(seed)`: a random model with one number per sequence, for rewards or values."""

    def make(seed: int) -> torch.nn.Module:
        set_seed(seed)
        config = Qwen2Config(
            vocab_size=len(tiny_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            num_labels=1,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
        return Qwen2ForSequenceClassification(config)

    return make


@pytest.fixture(scope="session")
def prompts(tiny_tokenizer: Any) -> Dataset:
    """16 tokenized prompts of one to four tokens."""
    texts = [f"{i}+{7 * i % 10}="[: 1 + i % 4] for i in range(16)]
    return Dataset.from_dict({"input_ids": [tiny_tokenizer(text)["input_ids"] for text in texts]})


@pytest.fixture
def make_ppo(
    tmp_path: Path, tiny_model_path: str, tiny_tokenizer: Any, prompts: Dataset, make_scorer: Callable[..., Any]
) -> Callable[..., Any]:
    """Factory of trainers: `make_ppo(trainer_class, config_class, **overrides)`.

    Overrides named like a trainer argument go to the trainer, `dtype` is that of the policy and of the reference, and
    all others are config fields. The defaults: CPU, float32, 8 responses of up to 6 tokens per rollout in 4
    micro-batches, 2 PPO epochs, 3 rollouts.
    """

    def make(trainer_class: Any = None, config_class: Any = None, **overrides: Any) -> Any:
        from trl_entropy.ppo import EntropyPPOConfig, EntropyPPOTrainer

        given = {name: overrides.pop(name) for name in TRAINER_ARGUMENTS if name in overrides}
        dtype = overrides.pop("dtype", torch.float32)
        if "critics" not in given:
            given.setdefault("value_model", make_scorer(2))
        tokenizer = given.pop("processing_class", tiny_tokenizer)
        config = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "num_mini_batches": 1,
            "num_ppo_epochs": 2,
            "total_episodes": 24,
            "response_length": 6,
            "temperature": 0.9,
            "stop_token": "eos",
            "missing_eos_penalty": 1.0,
            "local_rollout_forward_batch_size": 3,
            "num_sample_generations": 0,
            "seed": 0,
            **overrides,
        }
        reward_model = make_scorer(1)
        policy = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=dtype)
        reference = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=dtype)
        set_seed(3)
        return (trainer_class or EntropyPPOTrainer)(
            args=(config_class or EntropyPPOConfig)(**config),
            processing_class=tokenizer,
            model=policy,
            ref_model=None if "peft_config" in given else reference,
            reward_model=reward_model,
            train_dataset=prompts,
            **given,
        )

    return make
