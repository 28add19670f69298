"""How a worker of several processes ends."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist


def work(main: Callable[..., object], *arguments: str) -> NoReturn:
    """Run a worker and end its process, once all have come here, without Python's shutdown.

    With gloo a thread may still run then, and the process abort ("terminate called without an active exception") after
    all that a test reads is written, or before an error of its own is heard.
    """
    status = 0
    try:
        main(*arguments)
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
