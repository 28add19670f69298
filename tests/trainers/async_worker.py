"""Asynchronous training on as many processes as this script is launched with; what it ended with.

torchrun --standalone --nproc_per_node 2 tests/trainers/async_worker.py MODEL OUTPUT.pt
"""

import sys
import tempfile
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.trainers import async_parts
from tests.worker import work
from trl_entropy.trainers.async_controls import SUPPORTED

SAMPLES = 8
"""Of a micro-batch, of all processes."""
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "family": {
        "erc_low": 0.9,
        "erc_high": 1.1,
        "ce_gppo_alpha1": 0.75,
        "ce_gppo_alpha2": 1.0,
        "epo_coef": 0.1,
        "positive_nll_coef": 0.1,
    },
    "stare": {"stare_target_entropy": 9.0, "stare_variant": "C2", "stare_fraction": 0.3},
    "entropic": {"entropic_target": 1.0, "entropic_kp": 0.3, "entropic_probability": 0.1},
    "steer_fipo": {"steer_min_weight": 0.7, "fipo_half_life": 2.0},
    "kl_cov": {"kl_cov_coef": 0.5, "kl_cov_fraction": 0.2},
    "dppo": {"dppo_divergence": "tv", "dppo_delta_low": 0.02, "dppo_delta_high": 0.02},
    "par_entropy_advantage": {
        "par_schedule": "entropy",
        "par_target": 9.0,
        "par_initial": 0.5,
        "entropy_advantage_alpha": 0.4,
    },
    "ce_gppo_loop": {
        "ce_gppo_alpha1": 0.75,
        "ce_gppo_alpha2": 1.0,
        "ce_gppo_loop_target": 3.0,
        "ce_gppo_loop_kp": 0.3,
        "ce_gppo_loop_ki": 0.3,
    },
    "clip_cov": {"clip_cov_fraction": 0.2, "clip_cov_low": -9.0, "clip_cov_high": 9.0},
}


def run(model: str, processes: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Three updates of two micro-batches each."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = async_parts.make_async_trainer(
            folder,
            model,
            Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
            per_device_train_batch_size=SAMPLES // processes,
            gradient_accumulation_steps=2,
            max_steps=3,
            optim="sgd",
            learning_rate=0.05,
            **fields,
        )
        trainer.model.double()
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    controls = tuple(f"{prefix}/" for prefix in SUPPORTED)
    kept = ("loss", "entropy", "ratio", "staleness", *controls)
    return {
        "processes": trainer.accelerator.num_processes,
        "weights": {name: value.detach().clone() for name, value in trainer.model.named_parameters()},
        "log": [{key: value for key, value in entry.items() if key.startswith(kept)} for entry in entries],
    }


def main(model: str, output: str) -> None:
    from accelerate import PartialState

    with pytest.MonkeyPatch.context() as patch:
        async_parts.run_on_cpu(patch)
        state = PartialState(cpu=True)
        found = {name: run(model, state.num_processes, fields) for name, fields in CASES.items()}
        if state.is_main_process:
            torch.save(found, output)


if __name__ == "__main__":
    work(main, *sys.argv[1:])
