"""A run with vLLM continues from a checkpoint in another process, with another engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .resume_worker import SETTINGS, make_run, outcome

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]


def test_resume_in_the_middle_of_a_rollout(engine: None, tiny_model_path: str, tmp_path: Path) -> None:
    """Weight for weight and rollout for rollout the uninterrupted run."""
    folder, output = tmp_path / "run", tmp_path / "resumed.pt"
    whole = make_run(tiny_model_path, str(folder))
    whole.train()
    checkpoint = folder / f"checkpoint-{SETTINGS['save_steps']}"
    state = torch.load(checkpoint / "rollout_rank0.pt", weights_only=True)
    assert all("old_entropies" in micro_batch for micro_batch in state["buffered_inputs"])

    command = ["tests.vllm.resume_worker", tiny_model_path, str(folder), str(checkpoint), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    resumed, expected = torch.load(output, weights_only=True), outcome(whole)
    assert resumed["rewards"] == expected["rewards"]
    assert len(expected["rewards"]) == 3
    assert resumed["weights"].keys() == expected["weights"].keys()
    assert all(torch.equal(resumed["weights"][name], value) for name, value in expected["weights"].items())
