"""Entropy-based advantage shaping, token by token."""

import math

import pytest
import torch

from trl_entropy.controls import PolicyTokens, entropy_advantage


def shaped(
    advantages: list[float], entropies: list[float], alpha: float = 0.4, kappa: float = 2.0, mask: object = None
):
    values = torch.tensor([advantages], dtype=torch.float64)
    tokens = PolicyTokens(
        logps=torch.full_like(values, -1.0),
        old_logps=torch.full_like(values, -2.0),
        advantages=values,
        mask=torch.ones_like(values, dtype=torch.bool) if mask is None else torch.tensor([mask]),
    )
    given = torch.tensor([entropies], dtype=torch.float64, requires_grad=True)
    after, metrics = entropy_advantage(tokens, given, alpha=alpha, kappa=kappa)
    assert torch.equal(after.old_logps, tokens.old_logps)
    assert not after.advantages.requires_grad
    return after.advantages[0].tolist(), metrics


def test_by_hand() -> None:
    """0.4 nats each: 0.4 of 1 is below the bound 0.5; 0.8 of 1 is cut to 0.5; likewise where A < 0; 0 stays 0."""
    after, metrics = shaped([1.0, 1.0, -1.0, -1.0, 0.0], [1.0, 2.0, 1.0, 2.0, 2.0])
    assert after == pytest.approx([1.4, 1.5, -0.6, -0.5, 0.0])
    assert metrics["entropy_advantage/capped_fraction"].value.tolist() == [[False, True, False, True, False]]
    added = metrics["entropy_advantage/added"].totals().tolist()
    assert added == pytest.approx([1.8, 5.0])
    relative = metrics["entropy_advantage/relative"].totals().tolist()
    assert relative == pytest.approx([1.8, 4.0])  # of the four that have an advantage


@pytest.mark.parametrize("kappa", [1.0001, 2.0, 100.0])
def test_no_sign_changes(kappa: float) -> None:
    advantages = torch.linspace(-3.0, 3.0, 61).tolist()
    after, _ = shaped(advantages, [50.0] * 61, alpha=10.0, kappa=kappa)
    assert [math.copysign(1.0, a) if a else 0.0 for a in after] == [
        math.copysign(1.0, a) if a else 0.0 for a in advantages
    ]


def test_a_certain_or_unmeasured_token_keeps_its_advantage() -> None:
    after, metrics = shaped([1.0, -1.0, 1.0], [0.0, -1e-7, math.nan])
    assert after == [1.0, -1.0, 1.0]
    assert metrics["entropy_advantage/relative"].totals().tolist() == [0.0, 3.0]


def test_nothing_valid() -> None:
    _, metrics = shaped([1.0], [1.0], mask=[False])
    assert all(metric.totals().tolist() == [0.0, 0.0] for metric in metrics.values())
