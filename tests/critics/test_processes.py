"""The critics' shards: which modules are units of their own."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trl_entropy.critics import processes

Units = Callable[[nn.Module], list[nn.Module]]


@pytest.fixture
def units_of(monkeypatch: pytest.MonkeyPatch) -> Units:
    """The modules that FSDP2 is told to shard where there are two processes, in that order."""
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    monkeypatch.setattr(processes, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: None)

    def units(critic: nn.Module) -> list[nn.Module]:
        told: list[nn.Module] = []
        monkeypatch.setattr(processes, "fully_shard", lambda module, **_: told.append(module))
        assert processes.shard(critic, torch.device("cpu")) is critic
        return told

    return units


def test_a_critic_without_known_blocks_is_sharded_as_one(units_of: Units) -> None:
    """It works all the same, with the memory of an unsharded critic, which a warning says."""
    critic = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"Sequential does not say .*_no_split_modules=None\): it is sharded as one"):
        assert units_of(critic) == [critic]
    critic._no_split_modules = ["Linear"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert units_of(critic) == [critic[0], critic]
    critic._no_split_modules = ["Renamed"]
    with pytest.warns(UserWarning, match=r"_no_split_modules=\['Renamed'\]"):
        assert units_of(critic) == [critic]
