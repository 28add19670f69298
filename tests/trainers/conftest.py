"""Fixtures of the trainers' tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from . import async_parts


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
