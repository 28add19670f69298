"""A rollout for critics, and critics that differ from each other."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForTokenClassification

from trl_entropy.critics import load_critic


def make_rollout(vocabulary: int, rows: int = 8, prompt: int = 3, tokens: int = 6, seed: int = 0) -> SimpleNamespace:
    """Random completions of ragged lengths with left-padded prompts, an observation in each, and random returns."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=draw)
    prompts = torch.randint(1, prompt + 1, (rows, 1), generator=draw)
    completion = torch.arange(tokens) < lengths
    mask = completion.clone()
    mask[:, 1] = False
    return SimpleNamespace(
        input_ids=torch.randint(2, vocabulary, (rows, prompt + tokens), generator=draw),
        attention_mask=torch.cat([torch.arange(prompt) >= prompt - prompts, completion], 1).long(),
        mask=mask,
        targets=torch.randn(rows, tokens, generator=draw),
    )


@pytest.fixture
def rollout(tiny_tokenizer) -> SimpleNamespace:
    """8 completions of up to 6 tokens."""
    return make_rollout(len(tiny_tokenizer))


@pytest.fixture
def make_critic(tiny_model_path: str) -> Callable[..., Any]:
    """Factory of critics from the tiny policy with a random head, so that their values differ from the start."""

    def make(seed: int = 0, scale: float = 0.3, **overrides: Any) -> Any:
        critic = load_critic(tiny_model_path, **overrides)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in critic.named_parameters():
                if "score" in name and value.requires_grad:
                    value.copy_(scale * torch.randn(value.shape, generator=draw))
        return critic

    return make


@pytest.fixture
def small_critic(tiny_tokenizer) -> Any:
    """A random module of another size than the tiny policy."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer) + 8,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_labels=1,
    )
    return load_critic(Qwen2ForTokenClassification(config))
