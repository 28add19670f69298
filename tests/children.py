"""Processes that tests start: bounded in time, gone with the test, and heard when they fail."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEARD = 30_000
"""Characters that are shown of what failed: of several processes the first to fail is not the last to speak."""


def environment(**more: str) -> dict[str, str]:
    """For a process that imports the package and the tests from here."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **more}


@contextmanager
def started(arguments: Sequence[str], **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """Python with these arguments, killed at the end of the block; settings are those of `subprocess.Popen`."""
    with subprocess.Popen([sys.executable, *arguments], text=True, **{"env": environment()} | settings) as process:
        try:
            yield process
        finally:
            process.kill()


def run_python(arguments: Sequence[str], timeout: float = 300.0, **more: str) -> str:
    """What Python with these arguments prints, which must end well within `timeout` seconds; `more` is environment."""
    pipe = subprocess.PIPE
    with started(arguments, env=environment(**more), stdout=pipe, stderr=pipe) as process:
        try:
            shown, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher ends the processes that it started, each of them in a session of its own
            _, errors = process.communicate(timeout=60)
            raise AssertionError(f"Not over after {timeout} s:\n{errors[-HEARD:]}") from None
    assert process.returncode == 0, errors[-HEARD:]
    return shown


def run_processes(count: int, worker: Path, *arguments: object, timeout: float = 300.0) -> None:
    """Run a script on so many processes of the CPU, which talk over gloo."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    run_python([*launcher, str(worker), *map(str, arguments)], timeout, CUDA_VISIBLE_DEVICES="")


def kill_when(reached: Callable[[], object], arguments: Sequence[str], **more: str) -> None:
    """Run Python with these arguments until something is reached, and kill it at once; `more` is environment."""
    nowhere = subprocess.DEVNULL
    with started(arguments, env=environment(**more), stdout=nowhere, stderr=nowhere) as process:
        deadline = time.monotonic() + 300
        while not reached():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
