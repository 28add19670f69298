"""Saves critics over a former save and kills itself at the given moment.

python tests/critics/killed_save.py MODEL FOLDER weights|state|rename
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from trl_entropy.critics import CriticEnsemble, load_critic


def killing(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, until the given call of it: that one ends the process when it is done."""
    calls = iter(range(1, 100))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def main() -> None:
    model, folder, moment = sys.argv[1:]
    group = CriticEnsemble([load_critic(model), load_critic(model)], learning_rate=1e-2, device="cpu", seed=0)
    if moment == "weights":
        # of the second critic: the first is complete
        critic: Any = group.critics[1]
        critic.save_pretrained = killing(critic.save_pretrained, 1)
    elif moment == "state":
        torch.save = killing(torch.save, 1)
    else:
        # the former folder is out of the way, the new one not yet in its place
        os.replace = killing(os.replace, 1)
    group.save(folder)


if __name__ == "__main__":
    main()
