"""A pretrained language model, SmolLM2-135M-Instruct, where the other tests have a tiny one made on the spot.

Where its package is not installed, the tests of this folder are skipped.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.ppo.conftest import make_ppo, make_scorer, prompts  # noqa: F401, fixtures for this folder too
from tests.vllm.conftest import engine, make_vllm_trainer  # noqa: F401
from trl_entropy.pretrained import SMOLLM2, resolve_model
from trl_entropy.recipes import recipes_dir

sys.path.append(str(recipes_dir() / "study"))
from products import Float32Products, has_bfloat16_products

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"bf16": False},
    "bfloat16": {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
}
LORA = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-4},  # in bfloat16, less is mostly lost to rounding
    "lora": {"learning_rate": 2e-3, "peft_config": LORA},
}
KINDS = (("full", "float32"), ("lora", "bfloat16"))
"""Policy and precision, where every pair of them would take too long."""
SCHEDULE: dict[str, Any] = {
    "max_steps": 3,
    "steps_per_generation": 2,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 6,
    "lr_scheduler_type": "constant",
}
"""Rollouts of two groups of four completions for two optimizer steps each: a whole one and half of the next."""


@pytest.fixture
def quick_bfloat16() -> Iterator[None]:
    """Where the processor has no instructions for it, bfloat16 by way of float32, in a fraction of the time.

    For tests that compare nothing with another process or thread, which does without.
    """
    with nullcontext() if has_bfloat16_products() else Float32Products():
        yield


@pytest.fixture(scope="session")
def tiny_model_path() -> str:
    """The folder of the pretrained model, in float32."""
    try:
        return resolve_model(SMOLLM2)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_path: str) -> PreTrainedTokenizerBase:
    """Its tokenizer, padding on the left."""
    return AutoTokenizer.from_pretrained(tiny_model_path, padding_side="left")


@pytest.fixture(scope="session")
def tiny_dataset() -> Dataset:
    """16 questions of 15 or 16 tokens in the model's chat format, without a system message; some answers end early."""
    question = "Is {} odd? Yes or no?<|im_end|>\n<|im_start|>assistant\n"
    return Dataset.from_dict({"prompt": [question.format(7 * i) for i in range(16)]})


def check_entries(entries: list[dict[str, Any]]) -> None:
    """Every number of these entries of a log is one, and every share is between 0 and 1."""
    for entry in entries:
        assert all(math.isfinite(value) for value in entry.values()), entry
        assert all(0 <= value <= 1 for key, value in entry.items() if key.endswith("_fraction")), entry


@pytest.fixture
def make_real_trainer(make_trainer: Callable[..., Any]) -> Callable[..., Any]:
    """`make_trainer` of the pretrained model: `make_real_trainer(policy, precision, output_dir=None, **overrides)`."""

    def make(policy: str, precision: str, output_dir: str | Path | None = None, **overrides: Any) -> Any:
        return make_trainer(output_dir, **{**SCHEDULE, **POLICIES[policy], **PRECISIONS[precision], **overrides})

    return make
