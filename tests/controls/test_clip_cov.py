"""Clip-Cov by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.processes import on_processes
from trl_entropy.controls import Context, PolicyTokens, Rollout, clip_cov, covariance, micro_batch
from trl_entropy.controls.clip_cov import CLIP_COV, check, on_rollout

SETTINGS = {
    "clip_cov_enabled": True,
    "clip_cov_fraction": 0.2,
    "clip_cov_low": -0.1,
    "clip_cov_high": 0.6,
    "clip_cov_selection": "rollout",
    "loss_type": "dapo",
    "seed": 5,
}
WHERE = {"gather": lambda flat: flat, "rank": 0}


def drop(covariances, lots, mask=None, fraction=0.4):
    covariances, lots = torch.tensor([covariances]), torch.tensor([lots])
    mask = torch.ones_like(lots, dtype=torch.bool) if mask is None else torch.tensor([mask])
    return clip_cov(covariances, lots, mask, fraction=fraction, low=1.0, high=5.0, **WHERE)


def test_by_hand():
    # 0.4 of 5 tokens are 2; between 1 and 5: the second, third and fourth, of which the two smallest lots are drawn
    dropped, metrics = drop([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.3, 0.2, 0.1, 0.0])
    assert dropped.tolist() == [[False, False, True, True, False]]
    assert metrics["clip_cov/candidate_fraction"].totals().tolist() == [3.0, 5.0]
    assert metrics["clip_cov/covariance"].totals().tolist() == [15.0, 5.0]
    assert metrics["clip_cov/covariance_dropped"].totals().tolist() == [7.0, 2.0]


def test_fewer_candidates_than_are_to_be_drawn():
    assert drop([9.0, 2.0, 0.0, -2.0], [0.1] * 4, fraction=1.0)[0].tolist() == [[False, True, False, False]]
    assert not drop([9.0, 0.0], [0.1] * 2, fraction=1.0)[0].any()


def test_at_least_one():
    assert drop([2.0, 3.0], [0.2, 0.1], fraction=1e-4)[0].tolist() == [[False, True]]


def test_what_cannot_be_drawn():
    # masked, NaN and a lot of 1
    dropped, metrics = drop([2.0, math.nan, 2.0, 2.0], [0.1, 0.1, 1.0, 0.9], [False, True, True, True], fraction=1.0)
    assert dropped.tolist() == [[False, False, False, True]]
    assert metrics["clip_cov/candidate_fraction"].totals().tolist() == [1.0, 3.0]


def rollout(seed=0, rows=6):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, 9, generator=draw) < 0.8
    return Rollout(mask, torch.zeros(rows), torch.randn(rows, generator=draw), -torch.rand(rows, 9, generator=draw))


def context(settings=None, **changes):
    return Context(SimpleNamespace(**{**SETTINGS, **(settings or {})}), **changes)


def of_rollout(rollout, context, name="clip_cov_dropped"):
    return on_rollout(rollout, context, None)[0][name]


def test_a_rollout_draws_among_its_candidates():
    of = rollout()
    scores = covariance(of.advantages.unsqueeze(1).expand_as(of.mask), of.old_logps, of.mask)
    candidates = of.mask & (scores > -0.1) & (scores < 0.6)
    count = int(0.2 * of.mask.sum())
    assert candidates.sum() > count > 3
    drawn = [of_rollout(of, context(step=step)) for step in range(200)]
    assert all(one.sum() == count and not (one & ~candidates).any() for one in drawn)
    # each candidate is drawn with the same probability: 5 standard deviations of a binomial
    share = torch.stack(drawn).double().mean(0)[candidates]
    expected = count / candidates.sum().item()
    assert (share - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / 200)


@pytest.mark.parametrize("name", ["clip_cov_dropped", "clip_cov_lots"])
def test_the_draw_goes_by_seed_and_rollout_alone(name):
    settings = {"clip_cov_selection": "rollout" if name == "clip_cov_dropped" else "micro_batch"}
    first = of_rollout(rollout(), context(settings, step=3), name)
    torch.manual_seed(99)
    assert torch.equal(of_rollout(rollout(), context(settings, step=3), name), first)
    assert not torch.equal(of_rollout(rollout(), context(settings, step=4), name), first)
    assert not torch.equal(of_rollout(rollout(), context({**settings, "seed": 6}, step=3), name), first)


def test_the_draw_leaves_other_generators_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    on_rollout(rollout(), context(), None)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("selection", ["rollout", "micro_batch"])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_draw_what_one_does(monkeypatch, processes, selection):
    whole, settings = rollout(), {"clip_cov_selection": selection}
    ((name, expected),) = on_rollout(whole, context(settings), None)[0].items()

    def run(rank, **collectives):
        rows = slice(rank * 6 // processes, (rank + 1) * 6 // processes)
        part = Rollout(*(value[rows] for value in (whole.mask, whole.rewards, whole.advantages, whole.old_logps)))
        return of_rollout(part, context(settings, **collectives), name)

    assert torch.equal(torch.cat(on_processes(monkeypatch, processes, run)), expected)


@pytest.mark.parametrize("selection", ["rollout", "micro_batch"])
def test_nothing_valid(selection):
    of = replace(rollout(), mask=torch.zeros(6, 9, dtype=torch.bool))
    ((_, column),) = on_rollout(of, context({"clip_cov_selection": selection}), None)[0].items()
    assert (column == (1.0 if selection == "micro_batch" else 0.0)).all()


@pytest.mark.parametrize("selection", ["rollout", "micro_batch"])
def test_a_micro_batch_without_the_column_is_refused(selection):
    of = rollout()
    before = PolicyTokens(of.old_logps, of.old_logps, of.old_logps, of.mask)
    batch = micro_batch(before, of.old_logps, None, "token")
    with pytest.raises(ValueError, match=rf"clip_cov_selection='{selection}' needs the rollout's `clip_cov_"):
        CLIP_COV.shape(batch, batch.tokens, context({"clip_cov_selection": selection}), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_cov_fraction": -0.1}, r"clip_cov_fraction=-0.1 must be in \[0, 1\]"),
        ({"clip_cov_fraction": 1.5}, "clip_cov_fraction=1.5"),
        ({"clip_cov_fraction": math.nan}, "clip_cov_fraction=nan"),
        ({"clip_cov_fraction": "0.1"}, "clip_cov_fraction='0.1' must be in"),
        ({"clip_cov_low": 0.6}, "clip_cov_low=0.6 and clip_cov_high=0.6 must be numbers with"),
        ({"clip_cov_low": math.nan}, "clip_cov_low=nan"),
        ({"clip_cov_high": None}, "clip_cov_high=None"),
        ({"clip_cov_selection": "token"}, "clip_cov_selection='token' is unknown. Choose one of rollout"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check(SimpleNamespace(**{**SETTINGS, **fields}))


def test_sense_is_accepted():
    check(SimpleNamespace(**{**SETTINGS, "clip_cov_high": math.inf, "clip_cov_low": -math.inf}))
