"""Forks of the test's process that are killed with SIGKILL at random moments."""

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from tqdm import tqdm

# tqdm's own is shared by all forks: of one that is killed while it holds the lock, no other process ever gets it back
tqdm.set_lock(threading.RLock())


def killed_at_random(work: Callable[[], object], kills: int, longest: float, seed: int = 0) -> Iterator[None]:
    """Yield after each of so many forks, in which `work` was done again and again until it was killed.

    Args:
        work: What a fork does; nothing that starts threads.
        kills: How many forks.
        longest: The latest moment of a kill, seconds.
        seed: Seeds the moments.
    """
    moments, parent = random.Random(seed), os.getpid()
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                while os.getppid() == parent:
                    work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the fork failed before it could be killed"
        yield
