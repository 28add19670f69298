"""Entropy ratios by hand."""

import pytest
import torch

from trl_entropy.controls import entropy_ratio


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


def test_floor_by_hand():
    # (0.02 + 0.1) / (0.01 + 0.1) = 1.0909 where the paper's floor gives 2; (1.2 + 0.1) / (1 + 0.1) = 1.1818
    new, old = torch.tensor([[0.02, 1.2]], dtype=torch.float64), torch.tensor([[0.01, 1.0]], dtype=torch.float64)
    assert entropy_ratio(new, old, 0.1).tolist() == [[pytest.approx(0.12 / 0.11), pytest.approx(1.3 / 1.1)]]
    assert entropy_ratio(new, old).tolist() == [[pytest.approx(2.0), pytest.approx(1.2)]]


def test_a_floor_of_zero_takes_two_entropies_of_zero_for_unchanged():
    zero = torch.zeros(1, 2, dtype=torch.float64)
    assert entropy_ratio(zero, zero, 0.0).tolist() == [[1.0, 1.0]]
    assert entropy_ratio(zero + 0.5, zero, 0.0).isinf().all()


def test_sixteen_bit_entropies_are_compared_in_float32():
    # in float16 the floor itself would be 0, and 0 / 0 no number
    for dtype in (torch.float16, torch.bfloat16):
        new, old = (torch.tensor([values], dtype=dtype) for values in ([0.0, 0.0, 1.0], [0.0, 0.5, 1.0]))
        assert entropy_ratio(new, old).tolist() == [[1.0, pytest.approx(0.0, abs=1e-6), 1.0]]
