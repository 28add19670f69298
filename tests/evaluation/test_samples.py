"""Finished samples survive a kill, a torn line and a second run, and only those made with the same settings count."""

import json
import os
from pathlib import Path

import pytest

from trl_entropy.evaluation.samples import Sample, SampleFile

SETTINGS = {"temperature": 0.6, "seed": 0, "model": "m"}


def sample(problem: int, number: int = 0, **changes: object) -> Sample:
    return Sample(**{**{"problem": problem, "sample": number, "reward": 1.0, "num_tokens": 3, "truncated": False,
                        "completion": "\\boxed{4} \u2713"}, **changes})  # fmt: skip


def test_samples_are_read_back_without_their_text(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "s.jsonl"
    file = SampleFile(path, SETTINGS)
    file.append([sample(0), sample(1, reward=None, truncated=True)])
    file.append([sample(0, 1)])
    again = SampleFile(path, SETTINGS)
    assert list(again.samples) == [(0, 0), (1, 0), (0, 1)]
    assert again.samples[1, 0] == sample(1, reward=None, truncated=True, completion="")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == SETTINGS
    assert json.loads(lines[1])["completion"] == "\\boxed{4} \u2713"


@pytest.mark.parametrize("torn", [b'{"problem": 7, "sam', b"{", '{"completion": "\u2713'.encode()[:-1]])
def test_a_torn_last_line_is_cut_off(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    SampleFile(path, SETTINGS).append([sample(0), sample(1)])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    file = SampleFile(path, SETTINGS)
    assert path.read_bytes() == whole
    file.append([sample(2)])
    assert list(SampleFile(path, SETTINGS).samples) == [(0, 0), (1, 0), (2, 0)]


def test_torn_settings_start_anew(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"temperature": 0.')
    SampleFile(path, SETTINGS).append([sample(0)])
    assert list(SampleFile(path, SETTINGS).samples) == [(0, 0)]


def test_a_bad_line_in_the_middle_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    SampleFile(path, SETTINGS).append([sample(0)])
    with path.open("ab") as file:
        file.write(b"not json\n")
    with pytest.raises(ValueError, match=r"s\.jsonl, line 3 is not JSON"):
        SampleFile(path, SETTINGS)


def test_changed_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    SampleFile(path, SETTINGS).append([sample(0)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"made with temperature=0\.6, not 1\.0; top_p=None, not 0\.9\. Restore"):
        SampleFile(path, {**SETTINGS, "temperature": 1.0, "top_p": 0.9})
    assert path.read_bytes() == before


def test_a_batch_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "s.jsonl", []
    file = SampleFile(path, SETTINGS)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.stat().st_size))
    file.append([sample(0), sample(1)])
    # one fsync for the batch, and all its bytes had been written by then
    assert synced == [path.stat().st_size]


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    SampleFile(path, SETTINGS).append([sample(0, completion="a\ud800b")])
    assert list(SampleFile(path, SETTINGS).samples) == [(0, 0)]
