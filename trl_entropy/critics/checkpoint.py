"""The critics' folder: weights that `from_pretrained` loads, and what an exact resume needs."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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
    part = target.with_name(f"{target.name}.part")
    if process_rank() == 0:
        _restore(target)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    for index, (critic, optimizer) in enumerate(zip(critics, optimizers, strict=True)):
        weights = gathered(critic.state_dict())
        if process_rank() == 0:
            critic.save_pretrained(part / f"critic_{index}", state_dict=weights)
        del weights
        state = optimizer.state_dict() | {"generator": generator.get_state()}
        if process_rank() == 0:
            torch.save(state, part / f"state_{index}.pt")
    if process_rank() == 0:
        _replace(part, target)
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
        _restore(target)
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


def _former(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


def _replace(part: Path, target: Path) -> None:
    """Put a complete folder in the place of the former one."""
    former = _former(target)
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        os.replace(target, former)
    os.replace(part, target)
    shutil.rmtree(former, ignore_errors=True)


def _restore(target: Path) -> None:
    """Undo a replacement that was cut off between its two renames."""
    if not target.exists() and _former(target).exists():
        os.replace(_former(target), target)
