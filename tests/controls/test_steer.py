"""STEER by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.processes import on_processes
from trl_entropy.controls import Context, PolicyTokens, Rollout, micro_batch, steer
from trl_entropy.controls.steer import STEER, check, entropy_change, on_rollout


def column(*values):
    return torch.tensor([values], dtype=torch.float64)


def test_entropy_change_by_hand():
    # |r A (1 - p) (log p + H)| with p = 1/2, 1/4 and 1: 2 * 3 * 1/2 * (1 - log 2), 1 * 2 * 3/4 * (2 log 2), 0
    p, entropy = column(0.5, 0.25, 1.0), column(1.0, 0.0, 0.5)
    found = entropy_change(column(-3.0, 2.0, 9.0), column(2.0, 1.0, 1.0), p.log(), entropy)
    assert found[0, :2].tolist() == pytest.approx([3 * (1 - math.log(2)), 3 * math.log(2)])
    assert found[0, 2] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_changes_most(bad):
    found = entropy_change(column(1.0), column(1.0), column(-1.0), column(bad))
    assert found.item() == math.inf
    assert entropy_change(column(1.0), column(math.inf), column(-1.0), column(2.0)).item() == math.inf


def weights(change, scale, min_weight=0.8):
    logps = torch.zeros_like(change)
    tokens = PolicyTokens(logps, logps, torch.full_like(change, -2.0), torch.ones_like(change, dtype=torch.bool))
    shaped, metrics = steer(tokens, change, torch.tensor(scale), min_weight=min_weight)
    assert shaped.old_logps is tokens.old_logps
    return (shaped.advantages / -2.0).tolist()[0], metrics


def test_weights_by_hand():
    # exp(log(0.8) |O| / 0.5): none, half of, all of and beyond the scale
    found, metrics = weights(column(0.0, 0.25, 0.5, 7.0, math.inf), 0.5)
    assert found == pytest.approx([1.0, math.sqrt(0.8), 0.8, 0.8, 0.8])
    assert metrics["steer/weight"].totals().tolist() == pytest.approx([sum(found), 5.0])
    assert metrics["steer/lowest_fraction"].totals().tolist() == [3.0, 5.0]
    assert metrics["steer/scale"].totals().tolist() == [2.5, 5.0]


def test_a_small_scale_is_not_blown_up():
    # 0.01 of at least 0.02
    assert weights(column(0.01, 0.0), 0.01)[0] == pytest.approx([math.sqrt(0.8), 1.0])
    assert weights(column(0.0), 0.0)[0] == [1.0]


def test_weight_1_leaves_all_as_it_is():
    assert weights(column(0.1, math.inf), 0.1, min_weight=1.0)[0] == [1.0, 1.0]


def context(**changes):
    return Context(SimpleNamespace(steer_min_weight=0.8), **changes)


def rollout(rows=6):
    draw = torch.Generator().manual_seed(2)
    mask = torch.rand(rows, 5, generator=draw) < 0.7
    logps, entropies = -3 * torch.rand(rows, 5, generator=draw), torch.rand(rows, 5, generator=draw)
    entropies[0, 0] = math.nan
    return Rollout(mask, torch.zeros(rows), torch.randn(rows, generator=draw), logps, entropies)


def test_the_scale_is_the_largest_valid_change_of_the_rollout():
    of = rollout()
    found = on_rollout(of, context(), None)[0]["steer_scale"]
    changes = [
        abs(of.advantages[i].item() * (1 - math.exp(lp)) * (lp + of.old_entropies[i, t].item()))
        for i, row in enumerate(of.old_logps.tolist())
        for t, lp in enumerate(row)
        if of.mask[i, t] and not of.old_entropies[i, t].isnan()
    ]
    assert found.dim() == 0
    assert found.item() == pytest.approx(max(changes), rel=1e-6)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_have_one_scale(monkeypatch, processes):
    whole = rollout()
    expected = on_rollout(whole, context(), None)[0]["steer_scale"]

    def run(rank, **collectives):
        rows = slice(rank * 6 // processes, (rank + 1) * 6 // processes)
        part = Rollout(*(value[rows] for value in vars(whole).values()))
        return on_rollout(part, context(**collectives), None)[0]["steer_scale"]

    assert on_processes(monkeypatch, processes, run) == [expected] * processes


def test_nothing_valid():
    of = rollout()
    empty = Rollout(torch.zeros_like(of.mask), of.rewards, of.advantages, of.old_logps, of.old_entropies)
    assert on_rollout(empty, context(), None)[0]["steer_scale"] == 0.0


def test_a_micro_batch_without_the_scale_is_refused():
    of = rollout()
    before = PolicyTokens(of.old_logps, of.old_logps, of.old_logps, of.mask)
    batch = micro_batch(before, of.old_entropies, of.old_entropies, "token")
    with pytest.raises(ValueError, match="steer_scale"):
        STEER.shape(batch, batch.tokens, context(), None)


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.1, math.nan, "0.8", True])
def test_nonsense_is_refused(weight):
    with pytest.raises(ValueError, match=rf"steer_min_weight={weight} must be in \(0, 1\]"):
        check(SimpleNamespace(steer_min_weight=weight))


def test_sense_is_accepted():
    check(SimpleNamespace(steer_min_weight=None))
    check(SimpleNamespace(steer_min_weight=1.0))
