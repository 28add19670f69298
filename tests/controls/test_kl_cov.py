"""KL-Cov by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.processes import on_processes
from trl_entropy.controls import Context, PolicyTokens, Rollout, kl_cov, micro_batch
from trl_entropy.controls.kl_cov import KL_COV, check, on_rollout

CLIP = {"eps_low": 0.2, "eps_high": 0.28}
RATIOS = [2.0, 2.0, 0.5, 0.5, 1.0]
ADVANTAGES = [3.0, 3.0, -4.0, -4.0, 5.0]
SELECTED = [True, False, True, False, True]
SETTINGS = {
    "kl_cov_enabled": True,
    "kl_cov_coef": 0.5,
    "kl_cov_fraction": 0.2,
    "kl_cov_selection": "rollout",
    "kl_cov_ppo_clip": False,
}


def tokens(ratios=RATIOS, advantages=ADVANTAGES):
    logps = torch.tensor([ratios], dtype=torch.float64).log()
    mask = torch.ones_like(logps, dtype=torch.bool)
    return PolicyTokens(logps, torch.zeros_like(logps), torch.tensor([advantages], dtype=torch.float64), mask)


def shape(ppo_clip, before=None, selected=SELECTED, **settings):
    before = before or tokens()
    return kl_cov(before, before.logps, torch.tensor([selected]), coef=0.5, ppo_clip=ppo_clip, **CLIP, **settings)


def test_published_form_by_hand():
    shaped, metrics = shape(ppo_clip=False)
    # r A = 6, 6, -2, -2, 5; selected ones less 0.5 sign(log r) = 0.5, -0.5, 0
    assert shaped.advantages.tolist() == [[pytest.approx(value) for value in (5.5, 6.0, -1.5, -2.0, 5.0)]]
    assert torch.equal(shaped.old_logps, shaped.logps)
    assert metrics["kl_cov/penalised_fraction"].totals().tolist() == [2.0, 5.0]
    # log 2, log 2 and 0
    assert metrics["kl_cov/penalty"].totals().tolist() == [pytest.approx(2 * math.log(2)), 3.0]
    assert metrics["kl_cov/ppo_clip_fraction"].totals().tolist() == [0.0, 5.0]


def test_with_ppo_clip_the_others_are_left_alone():
    shaped, metrics = shape(ppo_clip=True)
    assert shaped.advantages.tolist() == [[pytest.approx(value) for value in (5.5, 3.0, -1.5, -4.0, 5.0)]]
    assert torch.equal(shaped.old_logps[0] == shaped.logps[0], torch.tensor(SELECTED))
    # the two others are outside [0.8, 1.28]
    assert metrics["kl_cov/ppo_clip_fraction"].totals().tolist() == [2.0, 5.0]


def test_the_dual_clip_is_counted_where_it_acts():
    before = tokens([20.0, 20.0, 20.0], [-1.0, -1.0, 0.0])  # the last has no gradient to lose
    _, metrics = shape(True, before, [True, False, False], delta=10.0)
    assert metrics["kl_cov/ppo_clip_fraction"].totals().tolist() == [1.0, 3.0]
    _, metrics = shape(True, before, [True, False, False])
    assert metrics["kl_cov/ppo_clip_fraction"].totals().tolist() == [0.0, 3.0]


def test_a_dropped_token_keeps_its_penalty():
    before = replace(tokens(), advantages=torch.zeros(1, 5, dtype=torch.float64))
    shaped, _ = shape(False, before)
    assert shaped.advantages.tolist() == [[-0.5, 0.0, 0.5, 0.0, 0.0]]


def test_masked_tokens_are_not_selected():
    before = replace(tokens(), mask=torch.tensor([[False, True, True, True, True]]))
    _, metrics = shape(False, before)
    assert metrics["kl_cov/penalised_fraction"].totals().tolist() == [1.0, 4.0]
    assert metrics["kl_cov/penalty"].totals().tolist() == [pytest.approx(math.log(2)), 2.0]


def rollout(seed=0, rows=6):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, 7, generator=draw) < 0.8
    return Rollout(mask, torch.zeros(rows), torch.randn(rows, generator=draw), -torch.rand(rows, 7, generator=draw))


def context(**changes):
    settings = SimpleNamespace(**{**SETTINGS, **changes.pop("settings", {})})
    return Context(settings, **changes)


def loop_selection(advantages, logps, mask, fraction):
    """Flat indices of the largest covariances, by the formula; at least one."""
    valid = [(i, t) for i, row in enumerate(mask.tolist()) for t, counts in enumerate(row) if counts]
    a = [(advantages[i] if advantages.dim() == 1 else advantages[i, t]).item() for i, t in valid]
    lp = [logps[i, t].item() for i, t in valid]
    mean_a, mean_lp = sum(a) / len(a), sum(lp) / len(lp)
    scored = sorted(zip(a, lp, valid, strict=True), key=lambda one: -(one[0] - mean_a) * (one[1] - mean_lp))
    return {place for _, _, place in scored[: max(1, int(fraction * len(valid) + 1e-9))]}


@pytest.mark.parametrize("fraction", [1e-4, 0.1, 0.5])
def test_a_rollout_selects_the_largest_covariances(fraction):
    of = rollout()
    columns, metrics = on_rollout(of, context(settings={"kl_cov_fraction": fraction}), None)
    found = {tuple(place) for place in columns["kl_cov_selected"].nonzero().tolist()}
    assert found == loop_selection(of.advantages, of.old_logps, of.mask, fraction)
    assert metrics["kl_cov/covariance_selected"].totals()[1] == len(found)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_select_what_one_does(monkeypatch, processes):
    whole = rollout()
    expected, _ = on_rollout(whole, context(), None)

    def run(rank, **collectives):
        rows = slice(rank * 6 // processes, (rank + 1) * 6 // processes)
        part = Rollout(*(value[rows] for value in (whole.mask, whole.rewards, whole.advantages, whole.old_logps)))
        return on_rollout(part, context(**collectives), None)[0]["kl_cov_selected"]

    found = on_processes(monkeypatch, processes, run)
    assert torch.equal(torch.cat(found), expected["kl_cov_selected"])


def test_nothing_valid():
    of = replace(rollout(), mask=torch.zeros(6, 7, dtype=torch.bool))
    columns, _ = on_rollout(of, context(), None)
    assert not columns["kl_cov_selected"].any()


def test_a_micro_batch_selects_its_own_from_current_log_probs():
    of = rollout()
    logps = of.old_logps.flip(1).contiguous()
    before = PolicyTokens(logps, of.old_logps, of.advantages.unsqueeze(1).expand_as(logps), of.mask)
    ctx = context(settings={"kl_cov_selection": "micro_batch"})
    assert on_rollout(of, ctx, None) == ({}, {})
    batch = micro_batch(before, logps, None, "token")
    _, metrics = KL_COV.shape(batch, batch.tokens, ctx, None)
    found = metrics["kl_cov/covariance_selected"].mask
    assert {tuple(place) for place in found.nonzero().tolist()} == loop_selection(of.advantages, logps, of.mask, 0.2)


def test_a_micro_batch_without_the_column_is_refused():
    before = tokens()
    batch = micro_batch(before, before.logps, None, "token")
    with pytest.raises(ValueError, match="kl_cov_selected"):
        KL_COV.shape(batch, batch.tokens, context(), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_cov_coef": -1.0}, "kl_cov_coef=-1.0 must be finite and at least 0"),
        ({"kl_cov_coef": math.nan}, "kl_cov_coef=nan must be finite"),
        ({"kl_cov_coef": "1"}, "kl_cov_coef='1' must be finite"),
        ({"kl_cov_fraction": 0.0}, r"kl_cov_fraction=0.0 must be in \(0, 1\]"),
        ({"kl_cov_fraction": 1.1}, "kl_cov_fraction=1.1"),
        ({"kl_cov_fraction": math.nan}, "kl_cov_fraction=nan"),
        ({"kl_cov_fraction": True}, "kl_cov_fraction=True"),
        ({"kl_cov_selection": "batch"}, "kl_cov_selection='batch' is unknown. Choose one of rollout"),
        ({"kl_cov_ppo_clip": 1}, "kl_cov_ppo_clip=1 must be True or False"),
        ({"delta": 10.0}, "delta=10.0 would do nothing with kl_cov_ppo_clip=False"),
        ({"delta": 1.0, "kl_cov_ppo_clip": True}, "delta=1.0 must be above 1"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5 goes by the sign"),
        ({"beta": 0.1, "use_bias_correction_kl": True}, "Set use_bias_correction_kl=False, or beta=0"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check(SimpleNamespace(**{**SETTINGS, **fields}))


def test_off_it_has_no_say_in_the_loss():
    check(SimpleNamespace(**{**SETTINGS, "kl_cov_enabled": False, "delta": 10.0, "off_policy_mask_threshold": 0.5}))
    check(SimpleNamespace(**SETTINGS, beta=0.1, use_bias_correction_kl=False))
