"""Covariance by hand."""

import math

import pytest
import torch

from trl_entropy.controls import covariance


def test_by_hand():
    # valid: A = 1, 1, -2, mean 0; lp = -1, -2, -6, mean -3
    advantages = torch.tensor([[1.0, 1.0, 9.0], [-2.0, 9.0, 9.0]])
    logps = torch.tensor([[-1.0, -2.0, -90.0], [-6.0, math.inf, -90.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # 1 * 2, 1 * 1, -2 * -3
    found = covariance(advantages, logps, mask)
    assert found.dtype == torch.float64
    assert found[mask].tolist() == [2.0, 1.0, 6.0]


def test_a_constant_has_no_covariance():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert not covariance(torch.full((2, 3), 0.7), torch.randn(2, 3), mask).any()
    assert not covariance(torch.randn(2, 3), torch.full((2, 3), -0.7), mask).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_stays_out_of_the_means(bad):
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = covariance(torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[-1.0, -3.0, bad]]), mask)
    # means 2 and -2
    assert found[0, :2].tolist() == [-1.0, -1.0]
    assert not found[0, 2].isfinite()


def test_nothing_valid():
    assert covariance(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)).isfinite().all()
