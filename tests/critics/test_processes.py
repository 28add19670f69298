"""The critics' shards: which modules are units of their own."""

import warnings

import pytest
import torch

from trl_entropy.critics import processes


def test_a_critic_without_known_blocks_is_sharded_as_one() -> None:
    """It works all the same, with the memory of an unsharded critic, which a warning says."""
    critic = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"Sequential does not say .*_no_split_modules=None\): it is sharded as one"):
        assert list(processes._blocks(critic)) == []
    critic._no_split_modules = ["Linear"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processes._blocks(critic) == [critic[0]]
    critic._no_split_modules = ["Renamed"]
    with pytest.warns(UserWarning, match=r"_no_split_modules=\['Renamed'\]"):
        assert list(processes._blocks(critic)) == []
