"""The positive-NLL term by hand."""

import pytest
import torch

from trl_entropy.controls import positive_nll


def test_by_hand():
    # row 0 is correct with two valid tokens: (0.5 + 1.5) / 4; row 1 is wrong, row 2 correct but masked
    logps = torch.tensor([[-0.5, -1.5, -9.0], [-3.0, -3.0, -3.0], [-7.0, -7.0, -7.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    loss, metrics = positive_nll(logps, mask, torch.tensor([True, False, True]), 4.0)
    assert loss.item() == pytest.approx(0.5)
    loss.backward()
    assert logps.grad.tolist() == [[-0.25, -0.25, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert metrics["positive_nll/loss"].totals().tolist() == [2.0, 2.0]
    assert metrics["positive_nll/token_fraction"].totals().tolist() == [2.0, 5.0]


def test_infinite_log_prob_of_a_wrong_completion_does_not_matter():
    logps = torch.tensor([[-1.0], [-torch.inf]], requires_grad=True)
    loss, _ = positive_nll(logps, torch.ones(2, 1, dtype=torch.bool), torch.tensor([True, False]), 1.0)
    loss.backward()
    assert loss.item() == 1.0
    assert logps.grad.tolist() == [[-1.0], [0.0]]


def test_sum_of_many_log_probs_in_bfloat16():
    # 1,001 times 0.5 is 500.5; the nearest bfloat16 is 500
    logps = torch.full((1, 1001), -0.5, dtype=torch.bfloat16)
    loss, _ = positive_nll(logps, torch.ones(1, 1001, dtype=torch.bool), torch.tensor([True]), 1.0)
    assert loss.item() == 500.5
