"""Records made by hand, written as the recorder writes them."""

from pathlib import Path
from typing import Any

import numpy as np

from trl_entropy.telemetry.record import FOLDER, SCHEMA, TokenRecord, read_record, write_rows

SETTINGS = {"epsilon_low": 0.2, "epsilon_high": 0.2}
BASE = {
    "step": 1,
    "rollout": 0,
    "process": 0,
    "whole": 0,
    "token": "a",
    "completion": 0,
    "turn": 0,
    "token_id": 5,
    "lp_old": -1.0,
    "lp": -1.0,
    "H_old": 1.0,
    "H": 1.0,
    "A": 1.0,
    "gradient": 1.0,
    "ratio": 1.0,
    "entropy_ratio": 1.0,
    "written": 1,
    "ppo_low": 0,
    "ppo_high": 0,
}
"""A token that nothing happened to, in a run without controls."""


def columns_of(count: int, **columns: Any) -> dict[str, Any]:
    """The columns of `count` rows: those given (a value or one a row), then `BASE`, then null."""
    given: dict[str, Any] = {"position": list(range(count)), **BASE, **columns}
    spread = {name: value if isinstance(value, list) else [value] * count for name, value in given.items()}
    return {name: spread.get(name, [np.nan] * count) for name in SCHEMA.names}


def write_record(run_folder: Path, count: int, *, settings: Any = None, process: int = 0, **columns: Any) -> None:
    """Write one file of a run's record."""
    written = columns_of(count, **{"process": process, **columns})
    first_step = min(written["step"])
    write_rows(run_folder / FOLDER, written, {**SETTINGS, **(settings or {})}, process=process, first_step=first_step)


def make_record(run_folder: Path, count: int, **columns: Any) -> TokenRecord:
    """Write and read it."""
    write_record(run_folder, count, **columns)
    record = read_record(run_folder)
    assert record is not None
    return record
