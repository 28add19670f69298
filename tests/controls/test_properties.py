"""Properties of ERC, CE-GPPO, EPO and the likelihood term as functions; `test_table` has those of every row."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.controls.micro_batches import Batch, batches, padded, quick
from trl_entropy.controls import (
    EntropyHistory,
    PolicyTokens,
    TokenMean,
    bounded_old_logps,
    ce_gppo,
    clip_controls,
    epo,
    erc,
    log_importance_weight,
    positive_nll,
)

OFF = {"ce_gppo_alphas": None, "erc_bounds": None, "delta": None}
ON = {"ce_gppo_alphas": (0.75, 1.0), "erc_bounds": (0.95, 1.05), "delta": 10.0}
LEVELS = st.sampled_from(["token", "sequence"])
CONTROLS = st.fixed_dictionaries({name: st.sampled_from([OFF[name], ON[name]]) for name in ON})


def shape(batch: Batch, level: str, controls: dict[str, Any]) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    return clip_controls(
        batch.tokens, batch.entropies, batch.old_entropies, level=level, eps_low=0.2, eps_high=0.28, **controls
    )


def smooth(batch: Batch, history: Tensor | None, form: str = "hinge") -> tuple[Tensor, dict[str, TokenMean]]:
    corridor = {"kappa_low": 0.8, "kappa_high": 1.2, "penalty": 0.5, "form": form}
    return epo(batch.entropies, batch.mask, history, beta=1.5, num_trajectories=3.0, **corridor)


def imitate(batch: Batch) -> tuple[Tensor, dict[str, TokenMean]]:
    return positive_nll(batch.logps, batch.mask, batch.correct, 4.0)


HISTORIES = st.sampled_from([None, torch.tensor(0.5), torch.tensor([0.5, float("nan"), 0.2])])


def assert_same(found: PolicyTokens, expected: PolicyTokens) -> None:
    for name, value in vars(expected).items():
        if value is not None:
            torch.testing.assert_close(getattr(found, name), value, rtol=1e-12, atol=0.0, equal_nan=True)


def totals(metrics: dict[str, TokenMean]) -> dict[str, Tensor]:
    return {name: mean.totals().double() for name, mean in metrics.items()}


@quick
@given(batches(), LEVELS, CONTROLS)
def test_shaped_numbers_are_finite_and_a_nan_stays_where_it_was(batch: Batch, level: str, controls: Any) -> None:
    shaped, metrics = shape(batch, level, controls)
    assert shaped.old_logps.isfinite().all()
    assert (shaped.advantages.isfinite() | batch.advantages.isnan()).all()
    assert all(value.isfinite().all() for value in totals(metrics).values())
    # so is the gradient of PPO's loss, of every token that counts and had an advantage
    logps = shaped.logps.float().requires_grad_()
    log_weight = logps - shaped.old_logps.float()
    if level == "sequence":
        counts = shaped.mask.sum(1, keepdim=True).clamp(min=1)
        log_weight = (torch.where(shaped.mask, log_weight, 0.0).sum(1, keepdim=True) / counts).expand_as(logps)
    counted = shaped.mask & ~shaped.advantages.isnan()
    loss = -torch.where(counted, log_weight.exp() * shaped.advantages.nan_to_num().float(), 0.0).sum()
    loss.backward()
    assert loss.isfinite()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


@quick
@given(batches(), LEVELS, CONTROLS, st.randoms(use_true_random=False))
def test_rows_do_not_depend_on_their_order_or_their_company(
    batch: Batch, level: str, controls: Any, random: Any
) -> None:
    """Permuted, and cut into micro-batches: the same tokens, and metrics that add up."""
    whole, metrics = shape(batch, level, controls)
    order = list(range(len(batch.mask)))
    random.shuffle(order)
    assert_same(shape(batch[order], level, controls)[0], replace(whole, **{n: v[order] for n, v in fields_of(whole)}))
    cut = random.randint(0, len(order))
    parts = [shape(batch[rows], level, controls) for rows in (slice(0, cut), slice(cut, None))]
    joined = {name: torch.cat([getattr(part, name) for part, _ in parts]) for name, _ in fields_of(whole)}
    assert_same(replace(whole, **joined), whole)
    added = {name: sum(totals(of_part)[name] for _, of_part in parts) for name in metrics}
    torch.testing.assert_close(added, totals(metrics), rtol=1e-5, atol=1e-6)


def fields_of(tokens: PolicyTokens) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(tokens).items() if value is not None]


@quick
@given(batches(), LEVELS, CONTROLS, st.integers(1, 3))
def test_padding_changes_nothing(batch: Batch, level: str, controls: Any, columns: int) -> None:
    (whole, metrics), (wide, wide_metrics) = (shape(each, level, controls) for each in (batch, padded(batch, columns)))
    cut = {name: value[:, :-columns] for name, value in fields_of(wide)}
    assert_same(replace(wide, **cut), whole)
    torch.testing.assert_close(totals(wide_metrics), totals(metrics), rtol=1e-5, atol=1e-6)


@quick
@given(batches(advantages=(-3.0, -0.5, 0.5, 3.0)))
def test_erc_says_what_it_did(batch: Batch) -> None:
    shaped, metrics = erc(batch.tokens, batch.entropies, batch.old_entropies, low=0.95, high=1.05)
    found = totals(metrics)
    clipped = batch.mask & (shaped.advantages == 0.0)
    assert torch.equal(torch.where(shaped.advantages == 0.0, 0.0, batch.advantages), shaped.advantages)
    assert found["erc/clip_fraction"].tolist() == [clipped.sum(), batch.mask.sum()]
    assert found["erc/low_fraction"][0] + found["erc/high_fraction"][0] == clipped.sum()
    entropies = found["erc/entropy_clipped"] + found["erc/entropy_kept"]
    torch.testing.assert_close(entropies, TokenMean(batch.entropies, batch.mask).totals().double())
    frozen, _ = erc(batch.tokens, batch.entropies, batch.old_entropies, low=0.95, high=1.05, sequence_ratio=True)
    assert frozen.frozen is not None
    assert torch.equal(frozen.frozen, clipped)
    assert torch.equal(frozen.advantages, batch.advantages)


@quick
@given(batches(advantages=(-3.0, -0.5, 0.0, 0.5, 3.0)))
def test_ce_gppo_says_what_it_did(batch: Batch) -> None:
    """At token level: what it counts has its ratio set to 1 and its weight of the paper, all else is untouched."""
    log_weight = log_importance_weight(batch.logps, batch.old_logps, batch.mask, "token")
    tokens = replace(batch.tokens, old_logps=bounded_old_logps(batch.old_logps, log_weight))
    shaped, metrics = ce_gppo(tokens, log_weight, alpha1=0.75, alpha2=0.5, eps_low=0.2, eps_high=0.28)
    low = (batch.advantages < 0) & (log_weight < -0.3)  # of LOG_RATIOS, those outside (0.8, 1.28)
    high = (batch.advantages > 0) & (log_weight > 0.3)
    found = totals(metrics)
    assert found["ce_gppo/low_fraction"].tolist() == [(low & batch.mask).sum(), batch.mask.sum()]
    assert found["ce_gppo/high_fraction"].tolist() == [(high & batch.mask).sum(), batch.mask.sum()]
    weight = torch.where(low, 0.75 * 0.8, torch.where(high, 0.5 * 1.28, torch.ones_like(log_weight)))
    torch.testing.assert_close(shaped.advantages, weight * batch.advantages, rtol=1e-12, atol=0.0)
    assert torch.equal(shaped.old_logps, torch.where(low | high, batch.logps, tokens.old_logps))


@quick
@given(batches(), HISTORIES, st.sampled_from(["hinge", "indicator"]))
def test_epo_is_finite_and_says_what_it_did(batch: Batch, history: Tensor | None, form: str) -> None:
    outside = torch.where(batch.mask, batch.entropies, float("nan"))  # of an observation, whatever it is
    entropies = outside.requires_grad_()
    loss, metrics = smooth(replace(batch, entropies=entropies), history, form)
    loss.backward()
    assert loss.isfinite()
    assert entropies.grad is not None
    assert entropies.grad[batch.mask].isfinite().all()
    found = totals(metrics)
    assert all(value.isfinite().all() for value in found.values())
    if history is not None:
        parts = sum(found[f"epo/{part}_fraction"][0] for part in ("below", "inside", "above"))
        assert parts == found["epo/inside_fraction"][1]
        assert found["epo/outside_fraction"][0] == parts - found["epo/inside_fraction"][0]


@quick
@given(batches(), HISTORIES, st.integers(0, 5), st.integers(1, 3), st.randoms(use_true_random=False))
def test_added_losses_do_not_depend_on_order_padding_or_micro_batches(
    batch: Batch, history: Tensor | None, cut: int, columns: int, random: Any
) -> None:
    """Each has a normaliser of its own, so those of the parts add up to that of the whole."""
    order = list(range(len(batch.mask)))
    random.shuffle(order)
    for loss_of in (lambda each: smooth(each, history), imitate):
        whole, metrics = loss_of(batch)
        others = [[batch[order]], [padded(batch, columns)], [batch[:cut], batch[cut:]]]
        for parts in others:
            found = [loss_of(part) for part in parts]
            torch.testing.assert_close(sum(loss for loss, _ in found), whole, rtol=1e-9, atol=1e-12)
            for name, expected in totals(metrics).items():
                added = sum(totals(of_part)[name] for _, of_part in found)
                torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)


@quick
@given(batches())
def test_positive_nll_is_finite_and_says_what_it_did(batch: Batch) -> None:
    logps = torch.where(batch.mask, batch.logps, float("nan")).requires_grad_()
    loss, metrics = imitate(replace(batch, logps=logps))
    loss.backward()
    chosen = batch.mask & batch.correct.unsqueeze(1)
    assert logps.grad is not None
    assert torch.equal(logps.grad, torch.where(chosen, -0.25, 0.0).double())
    found = totals(metrics)
    torch.testing.assert_close(found["positive_nll/loss"][0] / 4.0, loss.detach().double(), rtol=1e-5, atol=1e-5)
    assert found["positive_nll/token_fraction"].tolist() == [chosen.sum(), batch.mask.sum()]


@quick
@given(batches(), st.integers(0, 5), st.sampled_from(["scalar", "per_turn"]))
def test_the_history_does_not_depend_on_micro_batches(batch: Batch, cut: int, kind: str) -> None:
    """Nor on an entropy that is no number, which would stay in every later mean."""
    hostile = batch.entropies.clone()
    hostile[batch.mask & (batch.entropies == 11.0)] = float("nan")
    means = []
    for parts in ([slice(None)], [slice(0, cut), slice(cut, None)]):
        history = EntropyHistory()
        for rows in parts:
            history.add(hostile[rows], batch.mask[rows])
        history.finish_step(lambda totals: totals)
        means.append(history.mean(kind, like=hostile))
    first, second = means
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-9, equal_nan=True)
        assert first.isfinite().all() or kind == "per_turn" or not (batch.mask & hostile.isfinite()).any()
