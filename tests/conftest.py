"""Fixtures shared by all tests: a tiny policy, its tokenizer, and a trainer around them, on CPU and in seconds."""

import gc
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer

VOCABULARY = ["<pad>", "<eos>", *"0123456789+-=? abcdefghijklmnop"]
ASCII = ["<pad>", "<eos>", "\n", *map(chr, range(32, 127))]
NEEDS = ("vllm", "scienceworld", "real_model", "deepspeed", "gpu")
"""Markers of what is not everywhere."""
TRAINER_ARGUMENTS = (
    "model",
    "reward_funcs",
    "train_dataset",
    "eval_dataset",
    "callbacks",
    "peft_config",
    "rollout_func",
)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def pytest_collection_finish() -> None:
    """Every training collects garbage once; that need not look through all modules each time, as these stay anyway."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """A skipped test fails if all that it needs, by its markers, is in the environment variable `REQUIRED`.

    CI sets that, so that a test of what is installed there is never skipped without a word.
    """
    report = yield
    needs = {name for name in NEEDS if item.get_closest_marker(name)}
    if report.skipped and needs and needs <= set(os.environ.get("REQUIRED", "").split()):
        report.outcome = "failed"
    return report


def parity_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """1.0 where the first character of the completion has an odd code point, else 0.0."""
    return [float(ord(text[0]) % 2) if text else 0.0 for text in completions]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Character-level tokenizer over `VOCABULARY`, padding on the left."""
    return character_tokenizer(VOCABULARY)


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Character-level tokenizer over ASCII with a chat template, whose texts can be decoded to what they were."""
    tokenizer = character_tokenizer(ASCII)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def chat_model_path(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> str:
    """Folder with a random Qwen2, and `chat_tokenizer` beside it (loaded as Qwen2's own, it drops blanks)."""
    path = tmp_path / "chat_qwen2"
    make_model(len(ASCII), max_position_embeddings=512).save_pretrained(path)
    chat_tokenizer.save_pretrained(path)
    return str(path)


def character_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="?", padding_side="left"
    )


def make_model(vocab_size: int, max_position_embeddings: int) -> Qwen2ForCausalLM:
    """About 9,000 random weights, drawn wide, so that the entropies of tokens differ (else the policy is uniform)."""
    set_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.6,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    """Folder with a random float32 Qwen2 of about 9,000 parameters, and the tokenizer beside it.

    Pass the path, rather than a module, to a trainer that needs a reference model (`beta != 0`).
    """
    path = tmp_path_factory.mktemp("tiny_qwen2")
    make_model(len(VOCABULARY), max_position_embeddings=128).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def tiny_model(tiny_model_path: str) -> torch.nn.Module:
    """A fresh copy of the tiny policy in float32."""
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_dataset() -> Dataset:
    """16 prompts of one to four characters, so that their padding is ragged."""
    return Dataset.from_dict({"prompt": [f"{i}+{7 * i % 10}="[: 1 + i % 4] for i in range(16)]})


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    """For a table of changes: what was seen without the change, which rows of the same settings share."""
    return {}


@pytest.fixture(autouse=True)
def no_precision_of_another_test() -> Generator[None, None, None]:
    """Older releases of transformers tell accelerate of `bf16=True` by a variable that `bf16=False` leaves alone."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture
def make_trainer(
    tmp_path: Path, tiny_model_path: str, tiny_tokenizer: PreTrainedTokenizerFast, tiny_dataset: Dataset
) -> Callable[..., Any]:
    """Factory of trainers: `make_trainer(output_dir=None, **overrides)`.

    Overrides named like a trainer argument (`model`, `reward_funcs`, `train_dataset`, `eval_dataset`, `callbacks`,
    `peft_config`, `rollout_func`) go to the trainer, `trainer_class` and `config_class` replace the classes, and all
    others are config fields. The defaults: CPU, float32, 8 completions (2 groups of 4) per micro-batch, up to 6
    tokens each, 4 optimizer steps per rollout, no KL, `parity_reward`.
    """

    def make(
        output_dir: str | Path | None = None,
        *,
        trainer_class: type = EntropyGRPOTrainer,
        config_class: type = EntropyGRPOConfig,
        **overrides: Any,
    ) -> Any:
        trainer_kwargs = {
            "model": tiny_model_path,
            "reward_funcs": parity_reward,
            "train_dataset": tiny_dataset,
            **{name: overrides.pop(name) for name in TRAINER_ARGUMENTS if name in overrides},
        }
        config = {
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "steps_per_generation": 4,
            "seed": 0,
            **overrides,
        }
        args = config_class(output_dir=str(output_dir or tmp_path / "run"), **config)
        return trainer_class(args=args, processing_class=tiny_tokenizer, **trainer_kwargs)

    return make
