"""Two processes (DDP) take the optimizer steps of one, on the pretrained model."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.children import run_processes

from .two_processes_worker import CASES, run

pytestmark = pytest.mark.real_model

WORKER = Path(__file__).with_name("two_processes_worker.py")


@pytest.fixture(scope="module")
def folder_of_two(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes ended with."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_processes(2, WORKER, tiny_model_path, folder, timeout=600)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(folder_of_two: Path, tiny_model_path: str, tmp_path: Path, case: str) -> None:
    two: dict[str, Any] = torch.load(folder_of_two / f"{case}.pt", weights_only=True)
    one = run(tiny_model_path, tmp_path, case)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["change"].keys() == two["change"].keys()
    norm = norm_of(one["change"].values())
    assert norm > 0
    # rounding leaves 3e-5
    assert norm_of(two["change"][name] - change for name, change in one["change"].items()) < 3e-4 * norm
    logs = [without_times(result["log"]) for result in (one, two)]
    assert [entry["step"] for entry in logs[0]] == [1, 2, 3]
    for first, second in zip(*logs, strict=True):
        assert second == pytest.approx(first, rel=1e-3, abs=1e-5)
    for key in ("erc/clip_fraction", "epo/outside_fraction", "positive_nll/token_fraction"):
        assert max(entry.get(key, 0.0) for entry in logs[0]) > 0, key


def norm_of(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def without_times(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if key not in ("step_time", "epoch")} for entry in log]
