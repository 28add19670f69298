"""Fixtures of the trainers' tests."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.stubbed import stub_forward, stubbed_trainer
from trl_entropy import AsyPPOConfig, AsyPPOTrainer

from . import async_parts

BONUS = {"entropy_coef": 0.01}


@pytest.fixture
def make_async(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_path: str, tiny_dataset: Dataset
) -> Callable[..., Any]:
    """Factory of asynchronous trainers with made-up rollouts: `make_async(output_dir=None, **overrides)`."""
    async_parts.run_on_cpu(monkeypatch)

    def make(output_dir: str | Path | None = None, **fields: Any) -> Any:
        folder = str(output_dir or tmp_path / "run")
        return async_parts.make_async_trainer(folder, tiny_model_path, tiny_dataset, **fields)

    return make


@pytest.fixture
def build(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`build(settings, **config)`: a real trainer on top of the stubbed forward pass."""
    stub_forward(monkeypatch)
    return partial(stubbed_trainer, make_trainer)


@pytest.fixture
def make_asyppo(make_trainer, tiny_model_path):
    """`make_trainer` for AsyPPO: two copies of the tiny policy as critics, with value heads that differ."""

    def make(output_dir=None, *, critics=tiny_model_path, critic_peft_config=None, **overrides):
        trainer_class = lambda **kwargs: AsyPPOTrainer(  # noqa: E731
            **kwargs, critics=critics, critic_peft_config=critic_peft_config
        )
        settings = {"critic_learning_rate": 1e-2, **BONUS, **overrides}
        trainer = make_trainer(output_dir, trainer_class=trainer_class, config_class=AsyPPOConfig, **settings)
        generator = torch.Generator().manual_seed(7)
        for critic in trainer.critics.critics:
            for name, parameter in critic.named_parameters():
                if name.endswith("score.weight"):
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        return trainer

    return make
