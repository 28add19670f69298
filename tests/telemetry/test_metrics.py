"""Token means over micro-batches, processes and steps."""

import pytest
import torch

from trl_entropy.controls import TokenMean
from trl_entropy.telemetry.metrics import TokenMeans


def mean_of(values, mask):
    return TokenMean(torch.tensor([values]), torch.tensor([mask]))


def test_mean_is_weighted_by_tokens():
    means = TokenMeans()
    means.add({"m": mean_of([1.0, 5.0], [True, False])})
    means.add({"m": mean_of([2.0, 3.0], [True, True])})
    means.close_window(lambda totals: totals)
    means.add({"m": mean_of([6.0, 0.0], [True, False])})
    means.close_window(lambda totals: totals)
    # (1 + 2 + 3 + 6) / 4
    assert means.pop() == {"m": 3.0}
    assert means.pop() == {}


def test_an_open_window_waits_and_an_empty_metric_is_left_out():
    means = TokenMeans()
    means.add({"none": mean_of([1.0], [False]), "some": mean_of([1.0], [True])})
    assert means.pop() == {}
    means.close_window(lambda totals: totals)
    assert means.pop() == {"some": 1.0}


def test_one_collective_per_window_sums_over_processes():
    means, calls = TokenMeans(), []

    def two_processes(totals):
        calls.append(totals.shape)
        return totals + torch.tensor([[3.0, 1.0], [0.0, 1.0]])

    means.add({"b": mean_of([1.0], [True]), "a": mean_of([1.0], [True])})
    means.close_window(two_processes)
    # names are reduced in sorted order: a = (1 + 3) / 2, b = (1 + 0) / 2
    assert means.pop() == {"a": pytest.approx(2.0), "b": pytest.approx(0.5)}
    assert calls == [(2, 2)]


def test_nan_outside_the_mask_does_not_spread():
    assert mean_of([torch.nan, 2.0], [False, True]).totals().tolist() == [2.0, 1.0]
