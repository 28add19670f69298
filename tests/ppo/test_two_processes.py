"""On two processes an adapter and critics train with every control, and are saved, which TRL's PPOTrainer cannot."""

import math
import os
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from tests.children import run_processes

pytest.importorskip("trl.experimental.ppo", reason="trl.experimental.ppo is in TRL 1.12 alone")

WORKER = Path(__file__).with_name("two_processes_worker.py")


def test_processes_agree_and_save(tiny_model_path, tmp_path) -> None:
    run_processes(2, WORKER, tiny_model_path, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["history"] == second["history"]
    assert len(first["history"]) == 1  # the second rollout is not over until a third begins
    for name, value in first["adapters"].items():
        assert torch.equal(value, second["adapters"][name]), name
    assert any(value.abs().sum() > 0 for name, value in first["adapters"].items() if "lora_B" in name)
    for log in first["logs"]:
        assert all(math.isfinite(value) for value in log.values())
        assert log["asyppo/masked_fraction"] == pytest.approx(0.2, abs=0.03)  # of the tokens of both
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        AutoPeftModelForCausalLM.from_pretrained(folder)
        assert len(os.listdir(folder / "critics")) == 4
