"""Files and folders that are there whole or not at all: after a kill, an error, a full disk or a power cut.

What is new is written beside the old as `NAME.part`, flushed to the disk (`fsync`), and put in its place by a rename,
which is flushed too. Everything of value that this package writes goes through here, but for two kinds: finished
samples, which are appended and flushed batch by batch (`evaluation.samples`), and figures, which the next report draws
again. TRL's own files of a checkpoint are not flushed; their last one, `trainer_state.json`, makes it complete.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the user's quota, or the size that a file may have is used up."""
FULL_IN_WORDS = (
    *(os.strerror(code) for code in FULL),  # where a library keeps no more of it, as safetensors
    "PytorchStreamWriter failed",
    "unexpected pos",
    "iostream error",
)
"""How errors without a number say so; the last three are `torch.save`'s."""


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, beside `path`; what is written there takes the place of `path` when the block ends.

    If the block raises, `path` stays as it was.

    Args:
        path: The file; its folder is made if it is not there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        yield part
        _flush(part)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file with indentation, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to fill, beside `path`, which takes the place of `path` when the block ends.

    If the block raises, `path` stays as it was. Two renames replace a folder: a process that was killed between them
    leaves none, and `restore_folder` brings the former one back.

    Args:
        path: The folder; those above it are made if they are not there.
    """
    target = Path(path)
    part, former = target.with_name(f"{target.name}.part"), _former(target)
    restore_folder(target)
    for leftover in (part, former):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.rglob("*"):
            _flush_folder(file) if file.is_dir() else _flush(file)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if target.exists():
        os.replace(target, former)
    os.replace(part, target)
    _flush_folder(target.parent)
    remove_former(target)


def remove_former(path: str | os.PathLike[str]) -> None:
    """Delete what a process leaves of the folder that it has replaced if it is killed before it has deleted it."""
    shutil.rmtree(_former(Path(path)), ignore_errors=True)


def restore_folder(path: str | os.PathLike[str]) -> None:
    """Undo a replacement by `whole_folder` that was cut off between its two renames."""
    target = Path(path)
    if not target.exists() and _former(target).exists():
        os.replace(_former(target), target)


def is_full(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that there is no room for what was to be written."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        if any(words in str(seen) for words in FULL_IN_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _former(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system and file system can
        _flush(folder)
