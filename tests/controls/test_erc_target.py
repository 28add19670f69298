"""The bounds that move, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from trl_entropy.controls import TokenMean
from trl_entropy.controls.erc_target import BoundPower, bounds_now


def test_bounds_move_towards_the_target_share():
    power, clipped = BoundPower(), torch.tensor([[True, True, True, False, False]])
    settings = SimpleNamespace(erc_low=0.95, erc_high=1.05)
    assert bounds_now(settings, power) == bounds_now(settings, None) == (0.95, 1.05)
    power.finish_rollout(0.2, lambda totals: totals)  # nothing was counted
    assert power.log_power == 0.0
    power.add(TokenMean(clipped, torch.ones_like(clipped)))
    restored = BoundPower()
    restored.load_state_dict(power.state_dict())
    other = BoundPower()
    other.load_state_dict(power.state_dict(), own=False)
    other.finish_rollout(0.2, lambda totals: totals)
    assert other.log_power == 0.0  # another process's counts are not counted again
    for one in (power, restored):
        one.finish_rollout(0.2, lambda totals: 2 * totals)  # two processes with the same counts
        assert one.log_power == pytest.approx(2 * (0.6 - 0.2))
    low, high = bounds_now(settings, power)
    factor = math.exp(0.8)
    assert (math.log(low), math.log(high)) == pytest.approx((factor * math.log(0.95), factor * math.log(1.05)))
    for _ in range(200):
        power.add(TokenMean(torch.zeros(1, 5), clipped | True))
        power.finish_rollout(0.2, lambda totals: totals)
    low, high = bounds_now(settings, power)
    # 1,100 times as narrow, and no narrower
    narrower = math.log(0.95) / math.log(low), math.log(1.05) / math.log(high)
    assert narrower == pytest.approx((math.exp(7), math.exp(7)))
