"""Helpers of the tests with a real vLLM engine on CPU, which `trl_entropy.vllm_on_cpu` makes fit for training."""

import functools
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

from trl_entropy.vllm_on_cpu import start_engine

VLLM_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}  # the first in GiB
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENGINE = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
"""The config fields that put an engine into the trainer's process."""


def share_engines(patch: pytest.MonkeyPatch) -> None:
    """Make the engines that TRL starts in this process trainable, its own trainers' too; equal settings share one.

    Sharing is safe, as TRL pushes all weights before a trainer's first rollout, and saves 15 seconds per trainer.
    """
    from trl.generation import vllm_generation

    for name, value in VLLM_SETTINGS.items():
        patch.setitem(os.environ, name, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    patch.setattr(vllm_generation, "LLM", functools.partial(start_engine, functools.cache(vllm_generation.LLM)))


def forget_launcher() -> None:
    """Unset torchrun's variables, which TRL sets for vLLM: the next trainer would take them for a distributed run."""
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)


def require() -> None:
    """Skip the test where vLLM is not installed, or not for CPU."""
    pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm-env makes an environment that has it")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this vLLM is not the CPU build: .ci/vllm-env makes an environment that has it")


def save_tiny_model(path: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> str:
    """Save a tiny policy with heads of 32 channels, as vLLM's CPU attention has no smaller ones, and its tokenizer."""
    set_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **changes,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
