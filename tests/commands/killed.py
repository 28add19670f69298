"""Runs a command again and again, each time killed at a random moment, and then to its end.

python tests/commands/killed.py COMMAND OUTPUT SEED KILLS ARGUMENT...    # `{}` in an argument stands for the output

It is run to its end as `whole` first, which says how long it takes. Every run is a fork of this process, which has
imported everything: the moments are those of the command's own work.
"""

import os
import random
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

import tests.killing  # noqa: F401 - for its lock of progress bars
from tests.commands.small_quickstart import make_small
from trl_entropy.commands.cli import COMMANDS


def main() -> None:
    command, output, seed, kills, *argv = sys.argv[1:]
    module = import_module(COMMANDS[command][0])
    if command == "quickstart":
        make_small(pytest.MonkeyPatch(), Path("quickstart.yaml"))

    def start(name: str) -> int:
        child = os.fork()
        if child == 0:
            try:
                module.main([argument.replace("{}", name) for argument in argv])
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        return child

    began = time.monotonic()
    assert os.waitpid(start("whole"), 0)[1] == 0, "the uninterrupted run failed"
    duration = time.monotonic() - began
    moments = random.Random(int(seed))
    for _ in range(int(kills)):
        child = start(output)
        time.sleep(moments.uniform(0.0, duration))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), "the run failed before it could be killed"
    assert os.waitpid(start(output), 0)[1] == 0, "the last run failed"


if __name__ == "__main__":
    main()
