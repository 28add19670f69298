"""Real training on two CPU processes, launched with the accelerate configurations of `recipes/accelerate`."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from .training_worker import POLICIES

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("training_worker.py")


class Runs(NamedTuple):
    """Where two processes trained, and what each of them ended with, by policy and run."""

    folder: Path
    ended: dict[str, list[dict[str, Any]]]


def launch(config: str, *arguments: str) -> None:
    """Run the worker on two processes, without mixed precision, which the GPUs' configurations ask for."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"recipes/accelerate/{config}.yaml")]
    launcher += ["--num_processes=2", "--mixed_precision=no", "--main_process_port=0"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *launcher, str(WORKER), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-30000:]  # of both: the one that failed first is not the last to speak


@pytest.fixture(scope="session")
def trained(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    """`trained(config)`: six steps, and the last three again from the checkpoint, in new processes.

    Returns, for each policy and run (`full-whole`, `full-resumed`, `lora-whole`, `lora-resumed`), what each of the two
    processes ended with; and the folder in which they worked.
    """

    @cache
    def train(config: str) -> Runs:
        folder = tmp_path_factory.mktemp(config)
        launch(config, tiny_model_path, str(folder))
        launch(config, tiny_model_path, str(folder), "--resume")
        names = [f"{policy}-{run}" for policy in POLICIES for run in ("whole", "resumed")]
        loaded = {
            name: [torch.load(folder / f"{name}-rank{rank}.pt", weights_only=True) for rank in (0, 1)]
            for name in names
        }
        return Runs(folder, loaded)

    return train
