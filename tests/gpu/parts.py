"""What is measured on a GPU, part by part: `python -m tests.gpu.parts NAME FOLDER [--dry-run]` makes one of them.

A part makes its items one after the other, the most telling first, and writes `FOLDER/NAME.json` after each. Items
that are there are not made again. `--dry-run` is on a CPU and at sizes that say nothing but that it runs.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.book import Book

ROOT = Path(__file__).parents[2]
BENCHMARKS, STUDY = ROOT / "tests/benchmarks", ROOT / "recipes/study"
SECONDS = {"asyppo": 250}
"""That an arm takes at first, by estimate, where that is more than 100."""


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
        make: Makes the items of a book; the second argument says whether it is a dry run.
        minutes: Longest time to spend on it in one call.
    """

    make: Callable[[Book, bool], None]
    minutes: float


class Recorder:
    """A pytest plugin that keeps each test's outcome and numbers, and leaves out those that passed before."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self._book.expect(len(items))
        items[:] = [item for item in items if not self._book.has(_name(item.nodeid))]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" or (report.when == "setup" and report.passed):
            return
        result = {"seconds": report.duration, **dict(report.user_properties)}
        if report.skipped:
            result["skipped"] = str(report.longrepr)[-200:]
        elif report.failed:
            result["failed"] = report.longreprtext[-500:]
        self._book.keep(_name(report.nodeid), result)


def _name(nodeid: str) -> str:
    return nodeid.rpartition("::")[2]


def _tests(file: str, tried: str) -> Callable[[Book, bool], None]:
    """The part that runs a file of tests; those that match `tried` in a dry run."""

    def make(book: Book, dry_run: bool) -> None:
        chosen = ["-k", tried] if dry_run else []
        os.environ["GPU_TESTS_ON"] = "cpu" if dry_run else "cuda"
        os.environ.pop("PYTEST_ADDOPTS", None)  # one GPU: never in parallel, and the book is this process's
        arguments = [str(ROOT / "tests/gpu" / file), "-q", "-p", "no:cacheprovider", "--tb=short", *chosen]
        code = pytest.main(arguments, plugins=[Recorder(book)])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise SystemExit(f"pytest: {code!r}")

    return make


def overhead(book: Book, dry_run: bool) -> None:
    """One optimizer step with each control against TRL's own, as `tests/benchmarks/step_overhead.py` measures it."""
    benchmark = _script(BENCHMARKS, "step_overhead")
    size, rounds = ("tiny", 2) if dry_run else ("r1-distill-1.5b", 15)

    def so_far(rows: list[dict[str, Any]]) -> None:
        book.keep(size, {"rows": rows, "failed": f"stopped after {rows[0]['rounds']} of {rounds} rounds"})

    book.make(size, lambda: {"rows": benchmark.measure(size, rounds, _device(dry_run), so_far)})


def critics(book: Book, dry_run: bool) -> None:
    """GRPO, symmetric PPO and AsyPPO, each in a process of its own, as `tests/benchmarks/critic_memory.py` does it."""
    benchmark = _script(BENCHMARKS, "critic_memory")
    size, rounds = ("tiny", 1) if dry_run else ("r1-distill-1.5b", 3)

    def measure(arm: str) -> dict[str, Any]:
        command = [sys.executable, str(BENCHMARKS / "critic_memory.py"), "--size", size, "--arm", arm]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    for index in range(rounds):
        for arm in benchmark.ARMS if index % 2 == 0 else reversed(benchmark.ARMS):
            book.make(f"{arm}/{index}", lambda arm=arm: measure(arm))


def rounding(book: Book, dry_run: bool) -> None:
    """The rows of `recipes/study/rounding.py`, SmolLM2's first, and those of TF32."""
    study, tf32 = _script(STUDY, "rounding"), importlib.import_module("tests.gpu.tf32")
    card = "".join(filter(str.isalnum, book.machine["device"]))
    study.SCRATCH = book.folder / f"rounding-{card}"  # not where the rows of a CPU are kept
    rows = [*study.rows(), *(tf32.TF32Row("SmolLM2", "TF32", temperature) for temperature in (1.0, 0.6))]
    if dry_run:
        from tests.gpu.smollm2 import tiny

        policy = tiny(study.SCRATCH)
        study.RATES, study.model_path = study.RATES[-1:], lambda model: policy
        study.MODELS["arithmetic"] = (*study.MODELS["arithmetic"], "--per_device_train_batch_size", "8")
        rows = [study.Row("arithmetic", "autocast", 1.0), tf32.TF32Row("arithmetic", "TF32", 1.0)]
    for row in sorted(rows, key=lambda row: row.model == "arithmetic"):
        book.make(row.name, lambda row=row: study.run(row, _device(dry_run)))


def arms(book: Book, dry_run: bool) -> None:
    """The methods on SmolLM2-135M, at 512 completions a rollout, seed by seed; none is begun that would not end."""
    from tests.gpu.smollm2 import ARMS, train_arm

    names, seeds = (["ppo-clip", "erc"], 1) if dry_run else (list(ARMS), 10)
    deadline = time.monotonic() + float(os.environ.get("PART_SECONDS", "inf"))
    for seed in range(seeds):
        for name in names:
            took = [item["took_seconds"] for key, item in book.items.items() if key.startswith(f"{name}/")]
            if not dry_run and time.monotonic() + max(took, default=SECONDS.get(name, 100)) > deadline:
                continue
            book.make(f"{name}/{seed}", lambda name=name, seed=seed: train_arm(name, seed, dry_run))


PARTS = {
    "exactness": Part(_tests("test_exactness.py", "erc and token and dapo or without"), 4),
    "heads": Part(_tests("test_heads.py", "tiny and fused"), 4),
    "overhead": Part(overhead, 5),
    "critics": Part(critics, 5),
    "rounding": Part(rounding, 5),
    "arms": Part(arms, 9),
}
"""In the order of importance."""


def _script(folder: Path, name: str) -> Any:
    """A script's module, with those beside it in reach."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def _device(dry_run: bool) -> str:
    return "cpu" if dry_run else "cuda"


def machine(dry_run: bool) -> dict[str, str]:
    """Card and versions."""
    return _script(BENCHMARKS, "step_overhead").machine(_device(dry_run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    try:
        import pycosat  # noqa: F401
    except ImportError:  # has no wheel; reasoning-gym imports it for a task that is not used here
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit(f"{options.name} needs an NVIDIA GPU (--dry-run tries it on a CPU).")
    options.folder.mkdir(parents=True, exist_ok=True)
    book = Book(options.folder / f"{options.name}.json", machine(options.dry_run))
    PARTS[options.name].make(book, options.dry_run)


if __name__ == "__main__":
    main()
