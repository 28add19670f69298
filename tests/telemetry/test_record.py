"""The files of a record: what is cut when a run resumes, what is refused, what is read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.telemetry.made_record import columns_of, make_record, write_record
from trl_entropy.telemetry.record import cut_after, read_record, write_rows


def test_later_rows_are_cut_by_the_processes_that_are_left(tmp_path: Path) -> None:
    for process in (0, 1, 2):
        write_rows(tmp_path, columns_of(2, step=[1, 2]), {"a": 1}, process=process, first_step=1)
        write_rows(tmp_path, columns_of(2, step=[3, 4]), {"a": 1}, process=process, first_step=3)
    for process in (0, 1):
        cut_after(tmp_path, 3, process=process, num_processes=2)
    found = [pq.read_table(path)["step"].to_pylist() for path in sorted(tmp_path.iterdir())]
    assert found == [[1, 2], [3]] * 3
    assert pq.read_table(sorted(tmp_path.iterdir())[1]).schema.metadata[b"trl_entropy"] == b'{"a": 1}'
    cut_after(tmp_path, 0, process=0, num_processes=1)
    assert list(tmp_path.iterdir()) == []


def test_processes_are_read_together_by_step(tmp_path: Path) -> None:
    write_record(tmp_path, 2, step=[1, 3], process=1)
    record = make_record(tmp_path, 2, step=[1, 2], process=0)
    assert record.column("step").tolist() == [1, 1, 2, 3]
    assert record.column("process").tolist() == [0, 1, 0, 1]


def test_columns_are_numbers_with_nan_for_null(tmp_path: Path) -> None:
    record = make_record(tmp_path, 2, erc_clipped=[1, np.nan], token=["<script>", "ü"], whole=[0, 1])
    np.testing.assert_array_equal(record.column("erc_clipped"), [1.0, np.nan])
    assert record.column("token").tolist() == ["<script>", "ü"]
    assert (record.has("erc_clipped", "H"), record.has("erc_clipped", "value_std")) == (True, False)
    assert (record.sampled.column("position").tolist(), record.whole.column("position").tolist()) == ([0], [1])
    assert not record.whole.has("erc_clipped")
    assert record.settings == {"epsilon_low": 0.2, "epsilon_high": 0.2}


def test_broken_record_is_named(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    file = tmp_path / "tokens" / "process00000_step00000001.parquet"
    file.parent.mkdir()
    file.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=rf"{file.name} is not a Parquet file"):
        read_record(tmp_path)
    pq.write_table(pa.table({"step": [1]}), file)
    with pytest.raises(ValueError, match=rf"{file.name} does not have the columns of a record"):
        read_record(tmp_path)
    # what a killed process left half-written is no part of the record
    file.rename(file.with_suffix(".part"))
    assert read_record(tmp_path) is None
