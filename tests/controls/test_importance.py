"""Importance ratios and PPO-clip's decision by hand."""

import math

import pytest
import torch

from trl_entropy.controls import bounded_old_logps, clipped_by_ppo, log_importance_weight
from trl_entropy.controls.importance import ratio_of


def test_sequence_weight_is_the_masked_mean():
    # (1 + 3) / 2 = 2; the padding's 100 does not count; a row without a valid token has weight 0
    logps = torch.tensor([[1.0, 3.0, 100.0], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert log_importance_weight(logps, torch.zeros(2, 3), mask, "sequence").tolist() == [[2.0], [0.0]]


def test_weights_carry_no_graph():
    logps = torch.zeros(1, 2, requires_grad=True)
    assert not log_importance_weight(
        logps, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), "token"
    ).requires_grad


def test_clip_decision_needs_sign_and_side():
    # the bounds themselves are inside
    ratio = torch.tensor([[0.7, 0.7, 1.3, 1.3, 0.75, 1.25]])
    advantages = torch.tensor([[-1.0, 1.0, 1.0, -1.0, -1.0, 1.0]])
    low, high = clipped_by_ppo(ratio, advantages, 0.25, 0.25)
    assert low.tolist() == [[True, False, False, False, False, False]]
    assert high.tolist() == [[False, False, True, False, False, False]]


def test_bound_leaves_ordinary_ratios_alone():
    logps, old = torch.tensor([[-0.1, 90.0, 41.5]]), torch.tensor([[-0.3, -10.0, 1.5]])
    weight = log_importance_weight(logps, old, torch.ones(1, 3, dtype=torch.bool), "token")
    bounded = bounded_old_logps(old, weight)
    assert bounded[0, 0] == old[0, 0]
    assert (logps - bounded)[0, 1].item() == pytest.approx(40.0)
    assert bounded[0, 2] == old[0, 2]
    assert ratio_of(torch.tensor([100.0])).item() == pytest.approx(math.exp(40.0), rel=1e-5)


def test_bound_at_sequence_level_shifts_every_token_alike():
    logps, old = torch.tensor([[60.0, 80.0]]), torch.zeros(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    weight = log_importance_weight(logps, old, mask, "sequence")
    bounded = bounded_old_logps(old, weight)
    # the mean is 70: both old log-probs move up by 30
    assert bounded.tolist() == [[30.0, 30.0]]
    assert log_importance_weight(logps, bounded, mask, "sequence").item() == 40.0


def test_sequence_weight_of_many_tokens_in_bfloat16():
    # the mean of 1,001 times -0.5 and 1,000 times 0.5: 1/4002 below 0, and in bfloat16 the count would be 2,000
    log_ratio = torch.tensor([[-0.5, 0.5] * 1000 + [-0.5]], dtype=torch.bfloat16)
    mask = torch.ones(1, 2001, dtype=torch.bool)
    found = log_importance_weight(log_ratio, torch.zeros_like(log_ratio), mask, "sequence")
    assert found.dtype == torch.bfloat16
    assert found.item() == pytest.approx(-0.5 / 2001, rel=4e-3)
    heavy = torch.full_like(log_ratio, 0.1)
    assert log_importance_weight(heavy, torch.zeros_like(heavy), mask, "sequence").item() == heavy[0, 0].item()
