"""QAE by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.processes import on_processes
from trl_entropy.controls import Context, Rollout, qae
from trl_entropy.controls.qae import check, on_rollout

NAN = math.nan


def of(values, quantile, group_size=None):
    return qae(torch.tensor(values, dtype=torch.float64), group_size or len(values), quantile).tolist()


def test_by_hand():
    # ceil(0.4 * 5) = 2: the second smallest, -1
    assert of([2.0, -2.0, 0.0, -1.0, 1.0], 0.4) == [3.0, -1.0, 1.0, 0.0, 2.0]
    # ceil(0.5 * 5) = 3: the median
    assert of([2.0, -2.0, 0.0, -1.0, 1.0], 0.5) == [2.0, -2.0, 0.0, -1.0, 1.0]


def test_decimal_quantiles():
    # 0.07 * 100 is 7.000000000000001 in binary
    assert of(list(range(100)), 0.07)[6] == 0.0


@pytest.mark.parametrize("quantile", [0.1, 0.29, 0.4, 0.5, 0.6, 0.7, 0.99])
@pytest.mark.parametrize("size", [1, 4, 5, 8, 10])
def test_the_rule_of_the_abstract(size, quantile):
    """Of rewards 0 and 1: baseline 0 iff the success rate is at most 1 - K, else 1."""
    for successes in range(size + 1):
        rewards = [1.0] * successes + [0.0] * (size - successes)
        # in hundredths, so that no rounding decides
        hard = 100 * successes <= (100 - round(100 * quantile)) * size
        baseline = 0.0 if hard else 1.0
        assert of(rewards, quantile) == [reward - baseline for reward in rewards]


def test_groups_are_apart_and_equal_rewards_teach_nothing():
    assert of([1.0, 0.0, 0.3, 0.3, -1.0, 5.0], 0.5, group_size=2) == [1.0, 0.0, 0.0, 0.0, 0.0, 6.0]


def test_a_completion_without_a_reward_counts_in_no_quantile():
    # of the three others, ceil(0.4 * 3) = 2: 1
    assert of([3.0, NAN, 1.0, 0.0, NAN, NAN, NAN, NAN], 0.4, group_size=4) == [2.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0]


def test_it_commutes_with_the_normalisation():
    rewards = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    direct = qae(rewards.flatten(), 8, 0.4).view(6, 8) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(qae(scaled.flatten(), 8, 0.4).view(6, 8), direct, rtol=1e-12, atol=1e-15)


def context(**changes):
    return Context(SimpleNamespace(qae_quantile=0.4), group_size=4, **changes)


def rollout(rows=12):
    draw = torch.Generator().manual_seed(1)
    rewards = torch.randn(rows, generator=draw)
    advantages = rewards.clone()
    rewards[5], advantages[5] = NAN, 0.0  # as TRL has it
    return Rollout(torch.ones(rows, 2, dtype=torch.bool), rewards, advantages)


def test_metrics_are_shares_of_the_scored_completions():
    columns, metrics = on_rollout(rollout(), context(), None)
    assert columns["advantages"][5] == 0.0
    # groups of 4, 3 and 4 with the second smallest as baseline
    totals = {name: metric.totals().tolist() for name, metric in metrics.items()}
    assert totals == {
        "qae/positive_fraction": [2.0 + 1.0 + 2.0, 11.0],
        "qae/zero_fraction": [3.0, 11.0],
        "qae/negative_fraction": [3.0, 11.0],
    }


@pytest.mark.parametrize("processes", [2, 3, 4])  # groups of 4 in parts of 6 rows, 4 and 3
def test_processes_have_the_advantages_of_one(monkeypatch, processes):
    whole = rollout()
    expected = on_rollout(whole, context(), None)[0]["advantages"]

    def run(rank, **collectives):
        rows = slice(rank * 12 // processes, (rank + 1) * 12 // processes)
        part = Rollout(whole.mask[rows], whole.rewards[rows], whole.advantages[rows])
        return on_rollout(part, context(**collectives), None)[0]["advantages"]

    assert torch.equal(torch.cat(on_processes(monkeypatch, processes, run)), expected)


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.1, NAN, math.inf, "0.4", True])
def test_nonsense_is_refused(quantile):
    with pytest.raises(ValueError, match=rf"qae_quantile={quantile} must be in \(0, 1\)"):
        check(SimpleNamespace(qae_quantile=quantile))


def test_only_one_total_reward_has_a_quantile():
    config = SimpleNamespace(qae_quantile=0.4, multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(ValueError, match=r"multi_objective_aggregation='normalize_then_sum'.*sum_then_normalize"):
        check(config)
    config.qae_quantile = None
    check(config)
    check(SimpleNamespace(qae_quantile=0.4))
