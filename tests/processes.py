"""Several processes of a training, as threads whose collectives wait for each other."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_entropy.controls import selection


def on_processes(monkeypatch: pytest.MonkeyPatch, count: int, run: Callable[..., Any]) -> list[Any]:
    """What `run(rank, gather=..., sum_over_processes=...)` returns on each of `count` processes."""
    barrier, sent, own = threading.Barrier(count), [torch.empty(0)] * count, threading.local()
    monkeypatch.setattr(selection, "_own_rank", lambda: own.rank)

    def process(rank: int) -> Any:
        own.rank = rank

        def exchange(value: Tensor) -> list[Tensor]:
            sent[rank] = value
            barrier.wait(10)
            everything = list(sent)
            barrier.wait(10)
            return everything

        return run(
            rank,
            gather=lambda flat: torch.cat(exchange(flat)),
            sum_over_processes=lambda totals: torch.stack(exchange(totals)).sum(0),
        )

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(process, range(count)))
