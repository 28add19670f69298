"""A file of finished samples that survives the process that writes it.

JSON lines: the first holds the settings that the samples depend on, each further one a finished sample. Lines are only
ever appended, in one write that is flushed to the disk before the next batch starts, so that a process killed at any
moment loses at most the batch it was working on. A line that the kill tore is cut off when the file is opened again.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One graded completion.

    Attributes:
        problem: The problem's row, from 0.
        sample: Which of the problem's samples, from 0.
        reward: What the task's rewards add up to; `None` where none of them scores it.
        num_tokens: Tokens generated, the end of sequence included.
        truncated: Whether it reached the limit on new tokens without ending.
        completion: Its text; not kept in memory when the file is read back.
    """

    problem: int
    sample: int
    reward: float | None
    num_tokens: int
    truncated: bool
    completion: str = ""


class SampleFile:
    """Finished samples, by problem and sample.

    Args:
        path: The file; made, with its folder, if it is not there.
        settings: What the samples depend on. JSON values only.

    Raises:
        ValueError: If the file's samples were made with other settings (the message names them), or if a line other
            than the last is not a sample.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.samples: dict[tuple[int, int], Sample] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        number = 0
        for number, line in enumerate(_whole_lines(path), start=1):
            record = _parse(path, number, line)
            if number == 1:
                _check_settings(path, record, settings)
                continue
            sample = Sample(**{**record, "completion": ""})
            self.samples[sample.problem, sample.sample] = sample
        if number == 0:
            self._write([settings])

    def append(self, samples: Iterable[Sample]) -> None:
        """Write finished samples, and return once they are on the disk."""
        samples = list(samples)
        self._write(asdict(sample) for sample in samples)
        self.samples.update({(sample.problem, sample.sample): sample for sample in samples})

    def _write(self, records: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with self.path.open("ab") as file:
            # a completion may hold a lone surrogate, which UTF-8 does not encode
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of the file. What follows the last line break was torn by a kill, and is cut off."""
    if not path.exists():
        return
    size = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                size += len(line)
                yield line
    os.truncate(path, size)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number} is not JSON: the file was changed. Remove that line, or the file to start anew."
        ) from error


def _check_settings(path: Path, written: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = [
        f"{name}={written.get(name)!r}, not {wanted.get(name)!r}"
        for name in {**written, **wanted}
        if written.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(
            f"The samples in {path} were made with {'; '.join(differences)}. Restore the settings, name another "
            "output_dir, or remove the file to start anew."
        )
