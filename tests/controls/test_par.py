"""Positive-Advantage Reweighting by hand."""

import pytest
import torch

from trl_entropy.controls import PolicyTokens, par
from trl_entropy.controls.par import entropy_weight, epoch_weight, stage_weight

MASK = torch.tensor([[1, 1, 1, 0]]).bool()


def tokens(*advantages):
    values = torch.tensor([advantages], dtype=torch.float64)
    return PolicyTokens(-torch.ones_like(values), -torch.ones_like(values), values, MASK)


@pytest.mark.parametrize(("weight", "dropped"), [(0.25, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_only_positive_advantages_are_weighted(weight, dropped):
    before = tokens(2.0, -2.0, 0.0, 4.0)
    after, metrics = par(before, weight)
    assert after.advantages.tolist() == [[2.0 * weight, -2.0, 0.0, 4.0 * weight]]
    assert after.old_logps is before.old_logps
    assert metrics["par/positive_fraction"].totals().tolist() == [1.0, 3.0]
    assert metrics["par/dropped_fraction"].totals().tolist() == [dropped, 3.0]


def test_stages():
    # nine RL steps: 0 in the first half, 0 at the middle one, 1 at the last
    weights = [stage_weight(step, 9) for step in range(9)]
    assert weights == pytest.approx([0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1])
    assert [stage_weight(step, 2) for step in range(2)] == [0.0, 1.0]
    assert stage_weight(0, 1) == 0.0


@pytest.mark.parametrize(
    ("total", "epochs", "weights"),
    [
        (6, 3, [0, 0, 0.5, 0.5, 1, 1]),
        (4, 2, [0, 0, 1, 1]),
        (5, 2.5, [0, 0, 0.5, 0.5, 1]),  # two whole epochs and a half
        (3, 6, [0, 0.4, 0.8]),  # a rollout of two epochs
        (7, 2, [0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_epochs(total, epochs, weights):
    assert [epoch_weight(step, total, epochs) for step in range(total)] == pytest.approx(weights)
    assert epoch_weight(total, total, epochs) == 1.0  # a training that goes on


@pytest.mark.parametrize(
    ("weight", "entropy", "after"),
    [
        (0.5, 0.1, 0.4),  # too low: positives count less
        (0.5, 0.3, 0.6),
        (0.5, 0.2, 0.6),  # at the target: more
        (0.05, 0.1, 0.0),
        (0.95, 0.3, 1.0),
    ],
)
def test_by_entropy(weight, entropy, after):
    assert entropy_weight(weight, entropy, target=0.2, delta=0.1) == pytest.approx(after)
