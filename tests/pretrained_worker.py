"""A process that resolves the model with a stand-in for the conversion: `pretrained_worker.py SOURCE LOG [hang]`.

It adds a line to LOG for each conversion. With `hang` it stops in the middle of one, after saying so.
"""

import sys
import time
from pathlib import Path

from trl_entropy import pretrained


def write_model(source: Path, folder: Path) -> None:
    """Stands in for `pretrained._convert`."""
    (folder / "model.safetensors").write_bytes(source.read_bytes() * 3)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def slow(source: Path, folder: Path) -> None:
    with Path(sys.argv[2]).open("a", encoding="utf-8") as log:
        log.write("converted\n")
    write_model(source, folder)
    if "hang" in sys.argv:
        print("in the middle", flush=True)
        time.sleep(600)
    time.sleep(1)


if __name__ == "__main__":
    pretrained._packaged_file = lambda: Path(sys.argv[1])
    pretrained._convert = slow
    print(pretrained.resolve_model(pretrained.SMOLLM2))
