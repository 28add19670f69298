"""The record of tokens in a run folder: Parquet files that every process writes for itself, and their reader."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..controls import CONTROLS
from ..files import whole_file

FOLDER = "tokens"
FILE_NAME = re.compile(r"process(\d+)_step(\d+)\.parquet")
SETTINGS_KEY = b"trl_entropy"

COUNTS = ("completion", "position", "turn", "token_id")
FLOATS = ("lp_old", "lp", "H_old", "H", "A", "gradient", "ratio", "entropy_ratio", "value_mean", "value_std")
FLAGS = (
    "written",
    "ppo_low",
    "ppo_high",
    *(mark.column for control in CONTROLS for mark in control.marks),
)
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("rollout", pa.int32()),
        ("process", pa.int32()),
        ("whole", pa.bool_()),
        ("token", pa.string()),
        *((name, pa.int32()) for name in COUNTS),
        *((name, pa.float32()) for name in FLOATS),
        *((name, pa.bool_()) for name in FLAGS),
    ]
)
"""One row a token of one optimizer step. A value that the run does not have, such as one of a control that is off, is
null.

- `step`: optimizer step whose update the token was in, from 1; `rollout`: its rollout, from 0; `process`.
- `whole`: False for the random sample of the step's tokens, True for the completions that are recorded whole.
- `token`, `token_id`, `completion` (index in the rollout), `position` (in the completion, from 0; the prompt's tokens,
  in whole completions only, have negative ones), `turn` (from 0; -1 for a token that the model did not write).
- `lp_old`, `lp` (log-probs), `H_old`, `H` (nats), `A` (advantage of the rollout, unshaped), `gradient` (what the
  policy loss multiplies the gradient of `lp` with, after every control and PPO-clip, but for the mean over the
  tokens), `ratio` (importance ratio, that of the sequence at `importance_sampling_level="sequence"`),
  `entropy_ratio`, the critics' `value_mean`, `value_std`.
- `written`: the model wrote the token and it counts in the loss.
- `ppo_low`, `ppo_high`: PPO-clip alone would drop its gradient.
- The others are the controls': each has the meaning of its mark in the control's row.
"""


BASE = {"step", "rollout", "process", "whole", "token", "token_id", "position"}
"""Columns that every record has had."""


@dataclass(frozen=True)
class TokenRecord:
    """The rows of a run.

    Attributes:
        table: Rows of `SCHEMA`.
        settings: The fields of the configuration that the figures need, by name.
    """

    table: pa.Table
    settings: dict[str, Any]

    def column(self, name: str) -> NDArray[Any]:
        """A column: text as objects, all else as float64 with NaN for null; flags are 0 and 1."""
        column = self.table[name].combine_chunks()
        if pa.types.is_string(column.type):
            return column.to_numpy(zero_copy_only=False)
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)

    def where(self, mask: Any) -> "TokenRecord":
        """The rows where `mask`, a bool array or expression, is True."""
        return TokenRecord(self.table.filter(mask), self.settings)

    @cached_property
    def sampled(self) -> "TokenRecord":
        """The uniform sample: what shares and histograms are taken of."""
        return self.where(pc.invert(self.table["whole"]))

    @cached_property
    def whole(self) -> "TokenRecord":
        """The completions that are recorded whole."""
        return self.where(self.table["whole"])

    def has(self, *names: str) -> bool:
        """Whether each of these columns has a value."""
        return all(self.table[name].null_count < len(self.table) for name in names)


def write_rows(
    folder: Path, columns: Mapping[str, Any], settings: Mapping[str, Any], *, process: int, first_step: int
) -> Path:
    """Write one file; it is there whole or not at all.

    Args:
        folder: The record's folder, made if it is not there.
        columns: One array or list a name of `SCHEMA`; a float NaN in a count or a flag is null.
        settings: JSON values, kept in the file's metadata.
        process: Index of the process; only it writes files with its number.
        first_step: Optimizer step of the first row.
    """
    arrays = [_array(columns[field.name], field.type) for field in SCHEMA]
    schema = SCHEMA.with_metadata({SETTINGS_KEY: json.dumps(dict(settings))})
    return _write(folder / f"process{process:05d}_step{first_step:08d}.parquet", pa.table(arrays, schema=schema))


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        return pa.array(values, kind)
    return pa.array(np.asarray(values, dtype=np.float64), from_pandas=True).cast(kind)


def _write(file: Path, table: pa.Table) -> Path:
    with whole_file(file) as part:
        pq.write_table(table, part, compression="zstd")
    return file


def cut_after(folder: Path, step: int, *, process: int, num_processes: int) -> None:
    """Remove the rows of later optimizer steps, which training is about to make anew.

    Args:
        folder: The record's folder.
        step: The last step to keep; 0 removes everything.
        process: This process; it takes care of the files of every process that equals it modulo `num_processes`, so
            that those of an earlier run on more processes are cut too.
        num_processes: Number of processes.
    """
    for file, of_process, first_step in _files(folder):
        if of_process % num_processes != process:
            continue
        if first_step > step:
            file.unlink()
            continue
        table = pq.read_table(file)
        kept = table.filter(pc.less_equal(table["step"], step))
        if len(kept) < len(table):
            _write(file, kept)


def read_record(run_folder: Path) -> TokenRecord | None:
    """The record in a run folder, all processes' rows by step; `None` if there is none.

    Raises:
        ValueError: If a file is not a record.
    """
    tables = []
    for file, _, _ in _files(run_folder / FOLDER):
        try:
            tables.append(pq.read_table(file))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} is not a Parquet file ({error}). Delete it, or restore it from a copy."
            ) from error
        tables[-1] = _with_all_columns(tables[-1], file)
    if not tables:
        return None
    settings = json.loads((tables[-1].schema.metadata or {}).get(SETTINGS_KEY, b"{}"))
    whole = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    return TokenRecord(whole.sort_by([("step", "ascending"), ("process", "ascending")]), settings)


def _with_all_columns(table: pa.Table, file: Path) -> pa.Table:
    """The columns of `SCHEMA`: one that was added after the record was written is null, an unknown one is left out."""
    known = [field for field in SCHEMA if field.name in table.column_names]
    if not BASE.issubset(table.column_names) or any(table.schema.field(one.name).type != one.type for one in known):
        raise ValueError(f"{file} does not have the columns of a record. Delete it, or record the run again.")
    columns = [table[one.name] if one in known else pa.nulls(len(table), one.type) for one in SCHEMA]
    return pa.table(columns, schema=SCHEMA.with_metadata(table.schema.metadata))


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    """The files with their process and first step, in that order."""
    found = ((path, FILE_NAME.fullmatch(path.name)) for path in sorted(folder.glob("*.parquet")))
    return [(path, int(match[1]), int(match[2])) for path, match in found if match]
