"""The results of one part, item by item, in a file that outlives whoever writes it."""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_entropy.files import write_json

Items = dict[str, dict[str, Any]]


class Book:
    """JSON `{"machine": ..., "items": {name: {...}}}`, written after every item. One that failed says so in `failed`.

    Args:
        file: Made if it is not there; what it holds is kept.
        machine: Card and versions; results of another machine are put aside, in the folder `aside`.
    """

    def __init__(self, file: Path, machine: dict[str, str]) -> None:
        self.folder, self._file = file.parent, file
        content = read(file)
        if content and content["machine"] != machine:
            aside = file.parent / "aside"
            aside.mkdir(exist_ok=True)
            file.rename(aside / f"{file.stem}-{len(list(aside.iterdir()))}.json")
            content = {}
        self._content = content or {"machine": machine, "items": {}}

    @property
    def machine(self) -> dict[str, str]:
        return self._content["machine"]

    @property
    def items(self) -> Items:
        return self._content["items"]

    def has(self, name: str) -> bool:
        """Whether the item is there, was not skipped and has not failed."""
        return name in self.items and not {"failed", "skipped"} & self.items[name].keys()

    def expect(self, number: int) -> None:
        """Keep how many items there are to be in all."""
        self._content["expected"] = number

    def keep(self, name: str, result: dict[str, Any]) -> None:
        self.items[name] = result
        write_json(self._file, self._content)

    def make(self, name: str, job: Callable[[], dict[str, Any]]) -> None:
        """Make an item that is not finished; if that fails, how is its result, until it is made again."""
        if self.has(name):
            return
        print(name, flush=True)
        started = time.monotonic()
        try:
            result = job()
        except Exception as error:  # the next item may do better
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}"[:500]}
        self.keep(name, {**result, "took_seconds": round(time.monotonic() - started, 1)})


def read(file: Path) -> dict[str, Any]:
    """What is in the file; nothing where there is none yet."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
