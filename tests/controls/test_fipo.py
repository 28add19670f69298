"""FIPO by hand."""

import math

import pytest
import torch

from trl_entropy.controls import PolicyTokens, fipo
from trl_entropy.controls.fipo import discounted_future_sum

SETTINGS = {"half_life": 1.0, "clip_range": 0.2, "raise_only": False, "max_ratio": 10.0, "safe_ratio": 4.0}


def weights(log_ratios, advantages, mask=None, **changed):
    """What the advantages are multiplied with; the metrics."""
    log_weight = torch.tensor([log_ratios], dtype=torch.float64)
    mask = torch.ones_like(log_weight).bool() if mask is None else torch.tensor([mask]).bool()
    values = torch.tensor([advantages], dtype=torch.float64)
    before = PolicyTokens(log_weight - 1.0, -torch.ones_like(log_weight), values, mask)
    after, metrics = fipo(before, log_weight, **SETTINGS | changed)
    assert after.old_logps is before.old_logps
    return (after.advantages / values)[0].tolist(), metrics


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_the_sum_is_discounted_by_distance(length):
    values = torch.randn(3, length, dtype=torch.float64)
    for row, found in zip(values.tolist(), discounted_future_sum(values, 0.7).tolist(), strict=True):
        expected = [sum(0.7 ** (k - t) * row[k] for k in range(t, length)) for t in range(length)]
        assert found == pytest.approx(expected)


def test_weights_by_hand():
    # gamma 1/2: F = 0.1 - 0.1 / 2 + 0.08 / 4, -0.1 + 0.08 / 2, 0.08
    found, metrics = weights([0.1, -0.1, 0.08], [1.0, -1.0, 1.0])
    assert found == pytest.approx([math.exp(0.07), math.exp(-0.06), math.exp(0.08)])
    assert metrics["fipo/future"].totals()[0].item() == pytest.approx(0.07 - 0.06 + 0.08)
    assert metrics["fipo/raised_fraction"].totals().tolist() == [2.0, 3.0]
    assert metrics["fipo/lowered_fraction"].totals().tolist() == [1.0, 3.0]
    assert weights([0.1, -0.1, 0.08], [1.0, -1.0, 1.0], raise_only=True)[0][1] == 1.0


def test_weights_are_clipped():
    assert weights([0.5, -2.0, 500.0], [1.0, 1.0, 1.0], max_ratio=math.inf)[0] == pytest.approx([1.2, 1.2, 1.2])
    assert weights([-5.0], [1.0])[0] == pytest.approx([0.8])


def test_other_tokens_do_not_count():
    # the second is not the model's, the third is above the largest ratio
    found, metrics = weights([0.1, 0.5, 2.5, 0.0], [1.0] * 4, mask=[1, 0, 1, 1])
    assert found == pytest.approx([math.exp(0.1), 1.0, 1.0, 1.0])
    assert metrics["fipo/ignored_fraction"].totals().tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "weight"),
    [(1.5, -1.0, 1.0), (1.3, -1.0, 1.2), (1.5, 1.0, 1.2), (1.5, 0.5, 1.2)],
)
def test_an_unsafe_token_is_not_raised(log_ratio, advantage, weight):
    found, metrics = weights([log_ratio], [advantage])
    assert found == pytest.approx([weight])
    assert metrics["fipo/unsafe_fraction"].totals()[0].item() == (weight == 1.0)


def test_on_policy_all_weights_are_one():
    assert weights([0.0] * 3, [1.0, -1.0, 2.0])[0] == [1.0] * 3
