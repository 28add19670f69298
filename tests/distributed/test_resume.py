"""A checkpoint resumed by other processes than those that saved it, and one that lost a process's part."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.children import run_processes

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("resume_worker.py")


@pytest.fixture(scope="module")
def launch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`launch(processes, checkpoint=None)`: the folder of a run, and what each process ended with."""

    def run(processes: int, checkpoint: Path | None = None) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(f"{processes}_processes")
        run_processes(processes, WORKER, tiny_model_path, folder, *([checkpoint] if checkpoint else []))
        return folder, [torch.load(folder / f"ended-rank{rank}.pt", weights_only=True) for rank in range(processes)]

    return run


def assert_made_anew(ended: list[dict[str, Any]], reasons: list[str]) -> None:
    """All processes end alike, and each has said why the rollout in use was not used."""
    for found, reason in zip(ended, reasons, strict=True):
        assert [text for text in found["warnings"] if reason in text and "generated anew" in text], found["warnings"]
        assert found["steps"] == 6
        assert found["running"]
        assert found["history"] == ended[0]["history"]
        for name, value in found["weights"].items():
            assert torch.equal(value, ended[0]["weights"][name]), name


def test_more_processes_make_the_rollout_anew(launch: Callable[..., Any]) -> None:
    """EPO's sums of the running step are those of one process, and the second has none."""
    folder, _ = launch(1)
    _, ended = launch(2, folder / "run" / "checkpoint-3")
    assert_made_anew(ended, ["num_processes=1 (now 2)"] * 2)


def test_a_lost_part_makes_every_process_make_the_rollout_anew(launch: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = launch(2)
    checkpoint = shutil.copytree(folder / "run" / "checkpoint-3", tmp_path / "checkpoint-3")
    (checkpoint / "rollout_rank1.pt").write_bytes(b"cut off")
    _, ended = launch(2, checkpoint)
    assert_made_anew(ended, ["another process cannot read its part", "rollout_rank1.pt cannot be read"])
