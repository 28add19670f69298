"""ERC by hand."""

import math

import pytest
import torch

from trl_entropy.controls import PolicyTokens, entropy_ratio, erc


def tokens(advantages):
    values = torch.tensor([advantages], dtype=torch.float64)
    return PolicyTokens(values * 0, values * 0, values, torch.ones_like(values, dtype=torch.bool))


def entropy(*probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


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


def test_the_floor_reaches_the_gate():
    # ratios of 0.12 / 0.11 and 1.3 / 1.1, where the paper's floor gives 2 and 1.2
    new, old = torch.tensor([[0.02, 1.2]], dtype=torch.float64), torch.tensor([[0.01, 1.0]], dtype=torch.float64)
    shaped, _ = erc(tokens([1.0, 1.0]), new, old, low=0.9, high=1.1, floor=0.1)
    assert shaped.advantages.tolist() == [[1.0, 0.0]]


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
