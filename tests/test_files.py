"""Files and folders that are there whole or not at all."""

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from tests.killing import killed_at_random
from trl_entropy.files import is_full, restore_folder, whole_file, whole_folder, write_json, write_text


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file with the content `old`, alone in its folder."""
    file = tmp_path / "folder" / "file.txt"
    write_text(file, "old")
    return file


def stop(part: Path, error: BaseException) -> None:
    """Write a part of what was to be written, and fail."""
    part.write_text("ne", encoding="utf-8")
    raise error


def only(path: Path) -> bool:
    """Whether nothing else is in its folder."""
    return list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_and_nothing_is_left(old: Path) -> None:
    write_text(old, "né\n")
    assert old.read_bytes() == "né\n".encode()
    write_json(old, {"a": [1]})
    assert json.loads(old.read_text(encoding="utf-8")) == {"a": [1]}
    assert only(old)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("wrong"), KeyboardInterrupt()])
def test_a_block_that_raises_leaves_what_was_there(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), whole_file(old) as part:
        stop(part, error)
    assert old.read_text(encoding="utf-8") == "old"
    assert only(old)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_last_moment_leaves_what_was_there(
    old: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="full") as raised:
        write_text(old, "new")
    assert is_full(raised.value)
    assert old.read_text(encoding="utf-8") == "old"
    assert only(old)


def test_contents_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the contents leaves an empty file after a power cut."""
    calls: list[str] = []

    def spy(name: str) -> None:
        function = getattr(os, name)

        def call(first: Any, *rest: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else first
            calls.append(f"{name} {Path(place).name}")
            return function(first, *rest)

        monkeypatch.setattr(os, name, call)

    spy("fsync")
    spy("replace")
    write_text(tmp_path / "f", "new")
    assert calls == ["fsync f.part", "replace f.part", f"fsync {tmp_path.name}"]
    calls.clear()
    with whole_folder(tmp_path / "d") as part:
        (part / "inside").mkdir()
        (part / "inside" / "x").touch()
    assert sorted(calls[:2]) == ["fsync inside", "fsync x"]
    assert calls[2:] == ["replace d.part", f"fsync {tmp_path.name}"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "folder"
    for name in ("first", "second"):
        with whole_folder(folder) as part:
            (part / name).touch()
        assert [path.name for path in folder.iterdir()] == [name]
    with pytest.raises(ValueError, match="wrong"), whole_folder(folder) as part:
        stop(part / "third", ValueError("wrong"))
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert only(folder)


def test_a_replacement_that_was_cut_off_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace = tmp_path / "folder", os.replace
    (folder / "old").mkdir(parents=True)

    def stop_at_the_second(here: Path, there: Path) -> None:
        if here != folder:
            raise KeyboardInterrupt
        replace(here, there)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt), whole_folder(folder) as part:
            (part / "new").touch()
    assert not folder.exists()
    with pytest.raises(ValueError, match="wrong"), whole_folder(folder) as part:
        stop(part / "new", ValueError("wrong"))
    assert [path.name for path in folder.iterdir()] == ["old"]
    os.replace(folder, tmp_path / "folder.old")
    restore_folder(folder)
    assert [path.name for path in folder.iterdir()] == ["old"]
    with whole_folder(folder) as part:
        (part / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert only(folder)


@contextmanager
def small_disk() -> Iterator[None]:
    """No file can grow beyond 16 KiB, as where the disk is full. The system allows that to be taken back.

    No fixture: what pytest itself writes would be cut off.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_to_open_file(part: Path) -> None:
    with part.open("wb") as file:
        torch.save(torch.rand(10_000), file)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda part: part.write_text("x" * 100_000),
    "torch": lambda part: torch.save(torch.rand(10_000), part),
    "torch, open file": save_to_open_file,
    "safetensors": lambda part: save_file({"x": torch.rand(10_000)}, part),
    "parquet": lambda part: pq.write_table(pa.table({"x": torch.rand(100_000).numpy()}), part),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_way_to_write_says_that_there_is_no_room(old: Path, name: str) -> None:
    with pytest.raises(Exception) as raised, small_disk(), whole_file(old) as part:  # noqa: PT011 - a type each
        WRITERS[name](part)
    assert is_full(raised.value), repr(raised.value)
    assert old.read_text(encoding="utf-8") == "old"
    assert only(old)


def test_other_errors_are_no_full_disk(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    torch.save(torch.rand(1000), broken)
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(RuntimeError) as unreadable:
        torch.load(broken)
    others = [unreadable.value, FileNotFoundError(errno.ENOENT, "none"), OSError("no"), RuntimeError("out of memory")]
    assert not any(map(is_full, others))
    saving = RuntimeError("while saving")
    saving.__cause__ = OSError(errno.EDQUOT, "quota")
    assert is_full(saving)


def test_killed_at_any_moment_a_file_is_one_of_the_two(old: Path) -> None:
    contents = [letter * 200_000 for letter in "ab"]
    write_text(old, contents[0])
    for _ in killed_at_random(lambda: [write_text(old, content) for content in contents], kills=20, longest=0.02):
        assert old.read_text(encoding="utf-8") in contents
