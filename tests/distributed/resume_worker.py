"""Trains a tiny policy with every control for six steps, or for the last three of them from a checkpoint.

torchrun --nproc_per_node 2 tests/distributed/resume_worker.py MODEL FOLDER [CHECKPOINT]
"""

import sys
import warnings
from pathlib import Path

import torch

from tests.distributed.training_worker import build
from tests.worker import work


def main() -> None:
    model, folder, *checkpoint = sys.argv[1:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = build(model, f"{folder}/run", "full")
        trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
    found = {
        "steps": trainer.state.global_step,
        "history": trainer.active.states["epo"].steps,
        "running": trainer.active.states["epo"]._running is not None,
        "weights": trainer.model.state_dict(),
        "warnings": [str(warning.message) for warning in caught],
    }
    torch.save(found, Path(folder) / f"ended-rank{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    work(main)
