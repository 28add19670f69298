"""Reading the folders that training leaves."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

STATE_FILE = "trainer_state.json"
RESULT_FILE = "result.json"
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class LoggedRun:
    """One training run, as far as its folder tells.

    Attributes:
        name: What the report calls it; unique among the runs read together.
        log_history: The trainer's log entries: `step` and the metrics of that step.
        result: What `result.json` holds: `accuracy_before`, `accuracy_after`, `settings`, ...; empty without one.
        folder: Where the run is, and its record of tokens if it has one.
    """

    name: str
    log_history: list[dict[str, Any]]
    result: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def read_runs(folders: Sequence[str | Path]) -> list[LoggedRun]:
    """Read run folders; a folder with a `results.json` of several arms gives one run an arm.

    Args:
        folders: Each holds `trainer_state.json`, or checkpoints that do (the newest counts), or a `results.json` whose
            arms have a folder of their own.

    Raises:
        FileNotFoundError: If a folder holds none of these.
        ValueError: If a file is not what its name says.
    """
    found = [run for folder in folders for run in _read_folder(Path(folder), prefix=len(folders) > 1)]
    names = [run.name for run in found]
    return [
        run if names.count(run.name) == 1 else replace(run, name=f"{run.name} ({index})")
        for index, run in enumerate(found, start=1)
    ]


def _read_folder(folder: Path, prefix: bool) -> list[LoggedRun]:
    if not (folder / RESULTS_FILE).is_file():
        result = _read_json(folder / RESULT_FILE) if (folder / RESULT_FILE).is_file() else {}
        return [LoggedRun(folder.resolve().name, _log_history(folder), result, folder)]
    arms = _read_json(folder / RESULTS_FILE).get("arms")
    if not isinstance(arms, dict) or not all(isinstance(result, dict) for result in arms.values()):
        raise ValueError(f"{folder / RESULTS_FILE} has no 'arms' that map names to results. Run the quickstart again.")
    name = f"{folder.resolve().name}/" if prefix else ""
    return [LoggedRun(name + arm, _log_history(folder / arm), result, folder / arm) for arm, result in arms.items()]


def _log_history(folder: Path) -> list[dict[str, Any]]:
    """The log entries of the run's `trainer_state.json`, or else of its newest checkpoint's."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    newest_first = sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for file in (path / STATE_FILE for path in (folder, *newest_first)):
        if file.is_file():
            history = _read_json(file).get("log_history")
            if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
                raise ValueError(f"{file} has no 'log_history' list. Was it written by a transformers trainer?")
            return history
    raise FileNotFoundError(
        f"{folder} holds no run: neither {STATE_FILE}, nor a checkpoint with one, nor {RESULTS_FILE}. Name the "
        "output_dir of a training run."
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Delete it, or restore it from a copy.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, not a JSON object.")
    return content
