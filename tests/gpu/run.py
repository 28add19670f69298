"""All that is to be seen on an NVIDIA GPU, in one call: `python -m tests.gpu.run` (see README.md beside this file).

Each part is a process of its own with a time limit, in the order of importance; one that fails or is stopped loses
nothing but what it was at. A second call goes on where the first one stopped. The JSON files are in `--folder`, and in
`$OUT` too where that is set; the last thing printed is a short table.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.parts import PARTS, ROOT
from tests.gpu.table import table

DEFAULT_FOLDER = Path("runs/gpu")
TABLE, LOG = "table.md", "log.txt"
GRACE = 5.0
"""Seconds that a part has to leave on its own."""
TOLD = 2000
"""Last bytes of the log that are printed of a part that fails."""
ARITHMETIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What CUDA needs to add in a fixed order."""
OTHER_ARITHMETIC = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")
"""Variables of a machine that would decide whether float32 is float32."""


def command(name: str, folder: Path, dry_run: bool) -> list[str]:
    """That makes a part."""
    return [sys.executable, "-m", "tests.gpu.parts", name, str(folder), *(["--dry-run"] if dry_run else [])]


def run_part(name: str, folder: Path, seconds: float, dry_run: bool) -> str:
    """Make a part for at most that long; what became of it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment |= {"PART_SECONDS": str(seconds), **ARITHMETIC}
    for variable in OTHER_ARITHMETIC:
        environment.pop(variable, None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    with open(folder / LOG, "ab") as log:
        log.write(f"=== {name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command(name, folder, dry_run),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            _end(process)
    if code == 0:
        return "finished"
    print((folder / LOG).read_bytes()[-TOLD:].decode(errors="replace"), flush=True)
    return f"exit status {code}"


def _end(process: subprocess.Popen) -> None:
    """Stop the process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def hand_over(folder: Path) -> None:
    """Copy the files, but no folders, to `$OUT`."""
    if not (out := os.environ.get("OUT")):
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy(file, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it, but for the table (default: 9)")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="results (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU and at tiny sizes, to try it")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    ended = {}
    try:
        for name in options.parts:
            left = deadline - time.monotonic()
            if not options.dry_run:  # whose machine may be slow
                left = min(left, 60 * PARTS[name].minutes)
            ended[name] = run_part(name, options.folder, left, options.dry_run) if left > 0 else "not begun"
            print(f"{name}: {ended[name]}", flush=True)
            hand_over(options.folder)
    finally:
        shown = table(options.folder, ended)
        (options.folder / TABLE).write_text(shown, encoding="utf-8")
        hand_over(options.folder)
        print(shown)
    if any(how.startswith("exit status") for how in ended.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
