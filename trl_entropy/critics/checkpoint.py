"""The critics' folder: weights that `from_pretrained` loads, and what an exact resume needs."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..files import restore_folder, whole_folder
from .optimizer import CriticOptimizer
from .processes import gathered, process_rank, wait_for_all


def write_critics(
    folder: str | os.PathLike[str],
    critics: Sequence[Any],
    optimizers: Sequence[CriticOptimizer],
    generator: torch.Generator,
) -> None:
    """Write all critics beside `folder` and rename the result to it; every process must call it.

    `state_<m>.pt` holds the float32 weights too, which `critic_<m>/` has in the critic's dtype: a resume reads the
    former and nothing else.
    """
    target = Path(folder)
    with whole_folder(target) if process_rank() == 0 else nullcontext() as part:
        for index, (critic, optimizer) in enumerate(zip(critics, optimizers, strict=True)):
            weights = gathered(critic.state_dict())
            if part is not None:
                critic.save_pretrained(part / f"critic_{index}", state_dict=weights)
            del weights
            state = optimizer.state_dict() | {"generator": generator.get_state()}
            if part is not None:
                torch.save(state, part / f"state_{index}.pt")
    wait_for_all()


def read_critics(
    folder: str | os.PathLike[str], optimizers: Sequence[CriticOptimizer], generator: torch.Generator
) -> None:
    """Continue from what `write_critics` wrote; every process must call it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds other critics.
    """
    target = Path(folder)
    if process_rank() == 0:
        restore_folder(target)
    wait_for_all()
    if not target.is_dir():
        raise FileNotFoundError(f"{target} does not exist: the critics were not saved there.")
    saved = len(list(target.glob("state_*.pt")))
    if saved != len(optimizers):
        raise ValueError(f"{target} holds {saved} critics and num_critics={len(optimizers)}. Set num_critics={saved}.")
    for index, optimizer in enumerate(optimizers):
        # mapped: a process reads the slices that it keeps
        state = torch.load(target / f"state_{index}.pt", map_location="cpu", weights_only=True, mmap=True)
        optimizer.load_state_dict(state)
        generator.set_state(state["generator"])
