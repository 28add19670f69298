"""Every row of the table on random batches: finite, the same in any order, padding and cut, and true to its metrics.

A row acts here as the trainers let it, on the whole of a rollout first and then on its micro-batches.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.controls.acting import CASES, ROWS, Acted, act, fields_of, row, values_of
from tests.controls.micro_batches import Batch, batches, padded, quick, rewritten
from trl_entropy.controls.covariance import covariance

quicker = settings(quick, max_examples=20)
NOT_PERMUTED = {
    "clip_cov": "tokens are drawn at random, each by its place in the rollout",
    "clip_cov, of a micro-batch": "likewise",
}
"""Which tokens are acted on depends on the order of the rows; how many does not (`NUMBERS`)."""
SCORES: dict[str, Callable[[Batch], Tensor]] = {
    "stare": lambda batch: batch.old_logps,
    "kl_cov": lambda batch: covariance(batch.advantages, batch.old_logps, batch.mask),
    "asyppo": lambda batch: values_of(batch).std(0, unbiased=False)[:, :-1],
}
"""By which a share of the tokens is selected: between equal ones, their order decides."""
NUMBERS = {
    "clip_cov": ("clip_cov/clip_fraction", 0),
    "kl_cov": ("kl_cov/covariance_selected", 1),
    "stare": ("stare/raised_fraction", 0),
    "asyppo": ("asyppo/masked_fraction", 0),
}
"""How many are selected: a metric's numerator or denominator."""
NOT_SPLIT = {
    "clip_cov, of a micro-batch": "compares the tokens of a micro-batch, as the released code does",
    "kl_cov, of a micro-batch": "likewise",
}
"""The same rows in other micro-batches are another comparison."""


def counted(acted: Acted, mask: Tensor, rows: Any = slice(None)) -> dict[str, Tensor]:
    """What a row did to the tokens that count, with the rollout's rows in this order."""

    def select(value: Tensor) -> Tensor:
        value = value[rows] if value.dim() else value
        return value[mask] if value.dim() == 2 else value

    made = {name: select(value) for name, value in {**acted.columns, **fields_of(acted.tokens)}.items()}
    return {**made, "gradients": acted.gradients[:, rows][:, mask], "loss": acted.loss}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close = torch.isclose(found[name], value, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert close.all(), (name, found[name], value)


def by_place(case: str, batch: Batch) -> bool:
    """Whether the order of the tokens, or rounding, decides which of them a row selects."""
    if case in NOT_PERMUTED or row(case).prefix not in SCORES:
        return case in NOT_PERMUTED
    ordered = SCORES[row(case).prefix](batch)[batch.mask].sort().values
    return bool((ordered.diff() <= 1e-9 * (1.0 + ordered.abs().sum())).any())


def levels_of(case: str) -> st.SearchStrategy[str]:
    return st.sampled_from(row(case).levels)


def test_every_row_is_a_case() -> None:
    assert {row(case).prefix for case in CASES} == ROWS.keys()
    assert NOT_PERMUTED.keys() | NOT_SPLIT.keys() <= CASES.keys()
    assert {row(case).prefix for case in NOT_PERMUTED} | SCORES.keys() == NUMBERS.keys()


@pytest.mark.parametrize("case", CASES)
@quicker
@given(data=st.data())
def test_it_is_finite_and_a_nan_stays_where_it_was(case: str, data: st.DataObject) -> None:
    """In float32, as it is in training."""
    batch, level = data.draw(batches()).to(torch.float32), data.draw(levels_of(case))
    acted = act(case, batch, level, data.draw(st.sampled_from(row(case).loss_types or ("dapo",))))
    tokens = acted.tokens
    assert tokens.old_logps.isfinite().all()
    assert (tokens.advantages.isfinite() | batch.advantages.isnan())[batch.mask].all()
    assert acted.loss.isfinite()
    assert acted.gradients.isfinite().all()
    assert (acted.gradients[:, ~batch.mask] == 0.0).all()
    assert all(value.isfinite().all() for value in acted.columns.values() if value is not batch.rewards)
    assert all(value.isfinite().all() for value in acted.metrics.values()), acted.metrics


@pytest.mark.parametrize("case", CASES)
@quicker
@given(data=st.data())
def test_neither_order_nor_padding_nor_micro_batches_matter(case: str, data: st.DataObject) -> None:
    batch, level = data.draw(batches(advantages=(-3.0, -0.5, 0.0, 0.5, 3.0))), data.draw(levels_of(case))
    whole, mask = act(case, batch, level), batch.mask
    expected = counted(whole, mask)

    columns = data.draw(st.integers(1, 3))
    # a completion's advantage is no token's, whether that counts or not
    filled = padded(batch if row(case).sets_advantages else rewritten(batch), columns)
    wide = act(case, filled, level)
    assert_same(counted(wide, filled.mask), expected)
    assert_same(wide.metrics, whole.metrics, 1e-5)

    if case not in NOT_SPLIT:
        cut = data.draw(st.integers(0, len(mask)))
        parts = act(case, batch, level, parts=(slice(0, cut), slice(cut, None)))
        assert_same(counted(parts, mask), expected)
        assert_same(parts.metrics, whole.metrics, 1e-5)

    order = data.draw(st.permutations(range(len(mask))))
    permuted = act(case, batch[order], level)
    if by_place(case, batch):
        name, index = NUMBERS[row(case).prefix]
        assert permuted.metrics[name][index] == whole.metrics[name][index]
    else:
        assert_same(counted(permuted, mask[order]), counted(whole, mask[order], order))
        assert_same(permuted.metrics, whole.metrics, 1e-5)


Did = dict[str, Tensor]
MODERATE = (-3.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 3.0)
"""Log-ratios at which no weight vanishes in rounding."""
NOT_DONE = {
    "fipo/ignored_fraction": "tokens that do not count for those before them",
    "clip_cov/candidate_fraction": "tokens of which a part is drawn",
    "erc/rounding_fraction": "of a second pass with the same weights",
}
"""Shares of tokens that say something else than what was done to them."""


def dropped(batch: Batch, acted: Acted) -> Tensor:
    return acted.tokens.advantages == 0.0


def share(batch: Batch, acted: Acted) -> Tensor:
    """What an advantage is multiplied with."""
    return acted.tokens.advantages / batch.advantages


def mean_of(acted: Acted, name: str) -> float:
    total, count = acted.metrics[name].tolist()
    return total / max(count, 1.0)


def did_qae(batch: Batch, acted: Acted) -> Did:
    scored, rank = ~batch.rewards.isnan(), 0.4
    ordered = sorted(batch.advantages[scored, 0].tolist())
    baseline = ordered[max(math.ceil(rank * len(ordered) - 1e-9), 1) - 1] if ordered else 0.0
    expected = torch.where(scored, batch.advantages[:, 0] - baseline, 0.0)
    assert_same({"advantages": acted.columns["advantages"]}, {"advantages": expected})
    signs = {"positive": expected > 0, "zero": expected == 0, "negative": expected < 0}
    return {f"qae/{name}_fraction": sign & scored for name, sign in signs.items()}


def did_entropy_advantage(batch: Batch, acted: Acted) -> Did:
    added = acted.tokens.advantages - batch.advantages
    wanted = 0.4 * batch.entropies.clamp(min=0.0)
    torch.testing.assert_close(added, torch.minimum(wanted, batch.advantages.abs() / 2.0))
    found = acted.metrics["entropy_advantage/added"][0]
    torch.testing.assert_close(found, added[batch.mask].sum().float(), rtol=1e-5, atol=1e-6)
    return {"entropy_advantage/capped_fraction": added < wanted - 1e-9}


def did_dppo(batch: Batch, acted: Acted) -> Did:
    gone, negative = dropped(batch, acted), batch.advantages < 0
    assert torch.equal(acted.tokens.old_logps, batch.logps)
    ratio = (batch.logps - batch.old_logps).exp()
    torch.testing.assert_close(share(batch, acted)[~gone], ratio.clamp(max=10.0)[~gone])
    did = {"dropped": gone, "low": gone & negative, "high": gone & ~negative, "truncated": (ratio > 10.0) & ~gone}
    return {f"dppo/{name}_fraction": tokens for name, tokens in did.items()}


def did_ce_gppo(batch: Batch, acted: Acted, alphas: Sequence[float] = (0.75, 0.5)) -> Did:
    changed, negative = acted.tokens.old_logps != batch.old_logps, batch.advantages < 0
    weights = torch.where(negative, alphas[0] * 0.8, alphas[1] * 1.28)
    among = changed & batch.mask
    torch.testing.assert_close(share(batch, acted)[among], weights[among].double())
    assert torch.equal(acted.tokens.advantages[~changed], batch.advantages[~changed])
    return {"ce_gppo/low_fraction": changed & negative, "ce_gppo/high_fraction": changed & ~negative}


def did_ce_gppo_loop(batch: Batch, acted: Acted) -> Did:
    return did_ce_gppo(batch, acted, [mean_of(acted, f"ce_gppo_loop/alpha{i}") for i in (1, 2)])


def did_par(batch: Batch, acted: Acted) -> Did:
    positive, weight = batch.advantages > 0, mean_of(acted, "par/actuator")
    expected = torch.where(positive, weight, 1.0).double()
    torch.testing.assert_close(share(batch, acted)[batch.mask], expected[batch.mask])
    return {"par/positive_fraction": positive, "par/dropped_fraction": dropped(batch, acted)}


def did_entropic(batch: Batch, acted: Acted) -> Did:
    return {"entropic/weighted_fraction": share(batch, acted) != 1.0}


def did_stare(batch: Batch, acted: Acted) -> Did:
    weights = share(batch, acted)
    return {"stare/raised_fraction": weights > 1.0 + 1e-9, "stare/weakened_fraction": weights < 1.0 - 1e-9}


def did_steer(batch: Batch, acted: Acted) -> Did:
    weights = share(batch, acted)
    found = acted.metrics["steer/weight"][0]
    torch.testing.assert_close(found, weights[batch.mask].sum().float(), rtol=1e-5, atol=1e-6)
    return {"steer/lowest_fraction": weights < 0.5 + 1e-9}


def did_fipo(batch: Batch, acted: Acted) -> Did:
    weights, ratio = share(batch, acted), (batch.logps - batch.old_logps).exp()
    unsafe = (batch.advantages < 0) & (ratio > 4.0)
    assert (weights[unsafe] <= 1.0).all()
    return {
        "fipo/raised_fraction": weights > 1.0 + 1e-9,
        "fipo/lowered_fraction": weights < 1.0 - 1e-9,
        "fipo/unsafe_fraction": unsafe,
    }


def did_erc(batch: Batch, acted: Acted) -> Did:
    gone, rises = dropped(batch, acted), batch.entropies > batch.old_entropies
    assert (share(batch, acted)[~gone] == 1.0).all()
    return {"erc/clip_fraction": gone, "erc/low_fraction": gone & ~rises, "erc/high_fraction": gone & rises}


def did_clip_cov(batch: Batch, acted: Acted) -> Did:
    gone = dropped(batch, acted)
    assert (share(batch, acted)[~gone] == 1.0).all()
    assert (gone & batch.mask).sum() <= max(1, 3 * batch.mask.sum() // 10)
    assert not (gone & ~batch.mask).any()
    return {"clip_cov/clip_fraction": gone}


def did_kl_cov(batch: Batch, acted: Acted) -> Did:
    at_one = acted.tokens.old_logps == batch.logps
    log_ratio = batch.logps - batch.old_logps
    policy = torch.where(at_one, log_ratio.exp(), 1.0) * batch.advantages
    penalty = policy - acted.tokens.advantages
    penalised = penalty.abs() > 0.5
    torch.testing.assert_close(penalty, torch.where(penalised, log_ratio.sign(), 0.0))
    left = batch.logps - acted.tokens.old_logps
    outside = ((batch.advantages < 0) & (left < -0.3)) | ((batch.advantages > 0) & (left > 0.3))
    return {"kl_cov/penalised_fraction": penalised, "kl_cov/ppo_clip_fraction": outside}


def did_asyppo(batch: Batch, acted: Acted) -> Did:
    assert acted.tokens.without_bonus is not None
    return {"asyppo/masked_fraction": dropped(batch, acted), "asyppo/filtered_fraction": acted.tokens.without_bonus}


def did_epo(batch: Batch, acted: Acted) -> Did:
    """By the gradients of entropies, which the penalty makes larger below the corridor and smaller above it."""
    plain = act("epo", batch, epo_penalty=0.0)
    pull = acted.gradients[1] - plain.gradients[1]
    below, above = pull < -1e-12, pull > 1e-12
    did = {"below": below, "above": above, "outside": below | above, "inside": ~(below | above)}
    return {f"epo/{name}_fraction": tokens for name, tokens in did.items()}


def did_positive_nll(batch: Batch, acted: Acted) -> Did:
    return {"positive_nll/token_fraction": acted.gradients[0] < 0.0}


def did_nothing(batch: Batch, acted: Acted) -> Did:
    assert torch.equal(acted.tokens.advantages, batch.advantages)
    assert not acted.columns
    return {}


DID: dict[str, Callable[[Batch, Acted], Did]] = {
    "qae": did_qae,
    "entropy_advantage": did_entropy_advantage,
    "dppo": did_dppo,
    "ce_gppo": did_ce_gppo,
    "ce_gppo_loop": did_ce_gppo_loop,
    "par": did_par,
    "entropic": did_entropic,
    "stare": did_stare,
    "steer": did_steer,
    "fipo": did_fipo,
    "erc": did_erc,
    "clip_cov": did_clip_cov,
    "kl_cov": did_kl_cov,
    "asyppo": did_asyppo,
    "epo": did_epo,
    "positive_nll": did_positive_nll,
    "coefficient": did_nothing,
}
"""What a row did to each token, told from advantages, log-probs and gradients before and after alone."""


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("dppo, kl", "epo, per turn")])
@quicker
@given(batch=batches(advantages=(-3.0, -0.5, 0.5, 3.0), log_ratios=MODERATE))
def test_it_says_what_it_did(case: str, batch: Batch) -> None:
    acted, control = act(case, batch), row(case)
    did = DID[control.prefix](batch, acted)
    for name, tokens in did.items():
        among = batch.mask if tokens.dim() == 2 else ~batch.rewards.isnan()
        expected = [(tokens & among).sum(), among.sum()]
        assert acted.metrics.get(name, torch.zeros(2)).tolist() == expected, name
    shares = {f"{control.prefix}/{one.name}" for one in control.metrics if one.name.endswith("_fraction")}
    said = {*control.counts, *(mark.metric for mark in control.marks if mark.metric), *shares}
    assert said <= did.keys() | NOT_DONE.keys()
