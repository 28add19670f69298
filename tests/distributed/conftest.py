"""Real training on two CPU processes, launched with the accelerate configurations of `recipes/accelerate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.children import ROOT, run_python

from .training_worker import POLICIES

WORKER = Path(__file__).with_name("training_worker.py")


class Runs(NamedTuple):
    """Where two processes trained, and what each of them ended with, by policy and run."""

    folder: Path
    ended: dict[str, list[dict[str, Any]]]


def launch(config: str, *arguments: str) -> None:
    """Run the worker on two processes, without mixed precision, which the GPUs' configurations ask for."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"recipes/accelerate/{config}.yaml")]
    launcher += ["--num_processes=2", "--mixed_precision=no", "--main_process_port=0"]
    run_python([*launcher, str(WORKER), *arguments], timeout=600, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


@pytest.fixture(scope="session")
def trained(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    """`trained(config)`: six steps, and the last three again from the checkpoint, in new processes.

    Returns, for each policy and run (`full-whole`, `full-resumed`, `lora-whole`, `lora-resumed`), what each of the two
    processes ended with; and the folder in which they worked.
    """

    found: dict[str, Runs | BaseException] = {}

    def once(config: str) -> Runs:
        if config not in found:
            try:
                found[config] = train(config)
            except BaseException as error:  # is that of all who ask for it: none of them tries again
                found[config] = error
        if isinstance(runs := found[config], BaseException):
            raise runs
        return runs

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

    return once
