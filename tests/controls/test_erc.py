"""ERC by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from trl_entropy.controls import PolicyTokens, TokenMean, entropy_ratio, erc
from trl_entropy.controls.erc_target import MAX_LOG_POWER, TARGET_GAIN, BoundPower, bounds_now


def tokens(advantages):
    values = torch.tensor([advantages], dtype=torch.float64)
    return PolicyTokens(values * 0, values * 0, values, torch.ones_like(values, dtype=torch.bool))


def entropy(*probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def test_ratio_by_hand():
    # 0.6 / 0.5 = 1.2; 0 / 0.5: (0 + 1e-8) / (0.5 + 1e-8) = 2e-8; both at the floor: unchanged
    new = torch.tensor([[0.6, 0.0, 0.0, 5e-9]], dtype=torch.float64)
    old = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    ratio = entropy_ratio(new, old)
    assert ratio[0, 0].item() == pytest.approx(1.2, rel=1e-7)
    assert ratio[0, 1].item() == pytest.approx(2e-8, rel=1e-6)
    assert ratio[0, 2:].tolist() == [1.0, 1.0]


def test_rounding_below_zero_is_zero_entropy():
    ratio = entropy_ratio(torch.tensor([[-1e-7, 0.5]]), torch.tensor([[-2e-7, -1e-7]]))
    assert ratio[0, 0] == 1.0
    assert ratio[0, 1] == pytest.approx(0.5 / 1e-8, rel=1e-5)


def test_bounds_are_strict():
    # ratios 0.95, 0.951, 1.049, 1.05 up to the floor: with H_old = 1 the floor moves them by less than 1e-9
    new = torch.tensor([[0.9499, 0.951, 1.049, 1.0501]], dtype=torch.float64)
    shaped, metrics = erc(tokens([1.0, -2.0, 3.0, -4.0]), new, torch.ones_like(new), low=0.95, high=1.05)
    assert shaped.advantages.tolist() == [[0.0, -2.0, 3.0, 0.0]]
    exact = torch.tensor([[1.0]], dtype=torch.float64)
    assert erc(tokens([1.0]), exact, exact, low=0.0, high=1.0 + 1e-12)[0].advantages.item() == 1.0
    assert erc(tokens([1.0]), exact, exact, low=1.0, high=2.0)[0].advantages.item() == 0.0
    assert erc(tokens([1.0]), exact, exact, low=0.0, high=1.0)[0].advantages.item() == 0.0
    # clipped 2 of 4: one below, one above; mean entropy of the clipped (0.9499 + 1.0501) / 2 = 1
    means = {name: (m.totals()[0] / m.totals()[1]).item() for name, m in metrics.items()}
    assert means["erc/clip_fraction"] == 0.5
    assert means["erc/low_fraction"] == means["erc/high_fraction"] == 0.25
    assert means["erc/entropy_clipped"] == pytest.approx(1.0)
    assert means["erc/entropy_kept"] == pytest.approx(1.0)


def test_the_papers_example():
    # (0.85, 0, 0.15, 0) -> (0.82, 0.064, 0.07, 0.046): the sampled first action has r = 0.82 / 0.85 = 0.965, inside
    # [0.8, 1.2]; H_old = 0.423, H = 0.666 nats, so rho = 1.577 > 1.05
    old, new = entropy(0.85, 0.15), entropy(0.82, 0.064, 0.07, 0.046)
    assert 0.8 < 0.82 / 0.85 < 1.2
    rho = entropy_ratio(torch.tensor([[new]]), torch.tensor([[old]])).item()
    assert rho == pytest.approx(1.5766, abs=1e-4)
    shaped, _ = erc(tokens([1.0]), torch.tensor([[new]]), torch.tensor([[old]]), low=0.95, high=1.05)
    assert shaped.advantages.item() == 0.0


def test_nan_entropy_is_clipped():
    shaped, metrics = erc(tokens([1.0]), torch.tensor([[math.nan]]), torch.tensor([[1.0]]), low=0.95, high=1.05)
    assert shaped.advantages.item() == 0.0
    assert metrics["erc/clip_fraction"].totals().tolist() == [1.0, 1.0]


def test_metrics_count_valid_tokens_only():
    values = torch.tensor([[1.0, 1.0, 1.0]])
    masked = PolicyTokens(values, values, values, torch.tensor([[True, True, False]]))
    _, metrics = erc(masked, torch.tensor([[2.0, 1.0, 9.0]]), values, low=0.95, high=1.05)
    assert metrics["erc/clip_fraction"].totals().tolist() == [1.0, 2.0]
    assert metrics["erc/entropy_clipped"].totals().tolist() == [2.0, 1.0]
    assert metrics["erc/entropy_kept"].totals().tolist() == [1.0, 1.0]


def test_a_shared_ratio_freezes_the_clipped_tokens():
    before = tokens([1.0, -2.0, 3.0])
    new = torch.tensor([[2.0, 1.0, math.nan]], dtype=torch.float64)
    shaped, metrics = erc(before, new, torch.ones_like(new), low=0.95, high=1.05, sequence_ratio=True)
    assert torch.equal(shaped.advantages, before.advantages)
    assert shaped.frozen.tolist() == [[True, False, True]]
    assert metrics["erc/clip_fraction"].totals().tolist() == [2.0, 3.0]


def test_floor_by_hand():
    # (0.02 + 0.1) / (0.01 + 0.1) = 1.0909 where the paper's floor gives 2; (1.2 + 0.1) / (1 + 0.1) = 1.1818
    new, old = torch.tensor([[0.02, 1.2]], dtype=torch.float64), torch.tensor([[0.01, 1.0]], dtype=torch.float64)
    assert entropy_ratio(new, old, 0.1).tolist() == [[pytest.approx(0.12 / 0.11), pytest.approx(1.3 / 1.1)]]
    assert entropy_ratio(new, old).tolist() == [[pytest.approx(2.0), pytest.approx(1.2)]]
    shaped, _ = erc(tokens([1.0, 1.0]), new, old, low=0.9, high=1.1, floor=0.1)
    assert shaped.advantages.tolist() == [[1.0, 0.0]]


def test_a_floor_of_zero_takes_two_entropies_of_zero_for_unchanged():
    zero = torch.zeros(1, 2, dtype=torch.float64)
    assert entropy_ratio(zero, zero, 0.0).tolist() == [[1.0, 1.0]]
    assert entropy_ratio(zero + 0.5, zero, 0.0).isinf().all()


def test_sixteen_bit_entropies_are_compared_in_float32():
    # in float16 the floor itself would be 0, and 0 / 0 no number
    for dtype in (torch.float16, torch.bfloat16):
        new, old = (torch.tensor([values], dtype=dtype) for values in ([0.0, 0.0, 1.0], [0.0, 0.5, 1.0]))
        assert entropy_ratio(new, old).tolist() == [[1.0, pytest.approx(0.0, abs=1e-6), 1.0]]


def test_outward_keeps_what_brings_the_entropy_back():
    # H = 1.2 after 1.0 (above) or 0.8 (below); lp = -0.5 is above average (lp > -H), lp = -3 below it
    new = torch.tensor([[1.2, 1.2, 1.2, 1.2, 0.8, 0.8, 0.8, 0.8, 1.0, math.nan, 1.2]], dtype=torch.float64)
    logps = torch.tensor([[-0.5, -0.5, -3.0, -3.0] * 2 + [-0.5, -0.5, -0.5]], dtype=torch.float64)
    advantages = [1.0, -1.0, 1.0, -1.0] * 2 + [1.0, 1.0, 0.0]
    before = PolicyTokens(logps, logps, torch.tensor([advantages], dtype=torch.float64), logps < 0)
    shaped, metrics = erc(before, new, torch.ones_like(new), low=0.95, high=1.05, side="outward")
    # raising a sure token, or lowering an unsure one, sharpens: that brings the entropy back where it rose
    kept = [1.0, 0.0, 0.0, -1.0, 0.0, -1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert shaped.advantages.tolist() == [kept]
    clipped = [1.0 if weight == 0.0 else 0.0 for weight in kept[:-1]] + [0.0]  # without an advantage nothing moves
    assert metrics["erc/clip_fraction"].value.float().tolist() == [clipped]


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
        assert one.log_power == pytest.approx(TARGET_GAIN * (0.6 - 0.2))
    low, high = bounds_now(settings, power)
    factor = math.exp(TARGET_GAIN * 0.4)
    assert (math.log(low), math.log(high)) == pytest.approx((factor * math.log(0.95), factor * math.log(1.05)))
    for _ in range(200):
        power.add(TokenMean(torch.zeros(1, 5), clipped | True))
        power.finish_rollout(0.2, lambda totals: totals)
    assert power.log_power == -MAX_LOG_POWER
