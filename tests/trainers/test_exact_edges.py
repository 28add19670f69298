"""Gradients where a threshold is met exactly or a count is 0, against the papers' formulas, as in the trainer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import reference
from tests.reference import Batch
from tests.stubbed import trainer_gradients, trainer_inputs
from tests.trainers.test_exact_gradients import ALL, BASE, ERC, LEVELS, check, random_batch


@pytest.mark.parametrize("counts", [(171.0, 0.0), (0.0, 0.0)])
def test_empty_counts_do_not_divide_by_zero(build: Callable[..., Any], counts: tuple[float, float]) -> None:
    s = replace(BASE, **ALL)
    b, _ = random_batch(0)
    b = replace(b, num_items=counts[0], num_correct_tokens=counts[1], rewards=torch.zeros(8, dtype=torch.float64))
    check(build(s), s, b, trainer_inputs(b, b.mask))


def test_positive_nll_min_reward(build: Callable[..., Any]) -> None:
    """A reward equal to the threshold counts as correct."""
    b, inputs = random_batch(0)
    for threshold in (0.5, 0.99, 2.5, -1.0):
        s = replace(BASE, nll_coef=0.3, nll_min_reward=threshold)
        check(build(s), s, b, inputs)


@pytest.mark.parametrize(
    ("rho", "kept"),
    [(0.75, False), (0.751, True), (1.0, True), (1.249, True), (1.25, False), (3.0, False), (0.1, False)],
)
def test_erc_band_is_open(build: Callable[..., Any], rho: float, kept: bool) -> None:
    """Band (0.75, 1.25) and H_old + 1e-8 = 0.5, so that both bounds are met exactly."""
    s = replace(BASE, erc=(0.75, 1.25))
    b, _ = random_batch(0)
    b.entropy_old = torch.full_like(b.lp, 0.5 - 1e-8)
    b.entropy = torch.full_like(b.lp, 0.5 * rho - 1e-8).requires_grad_()
    assert (b.entropy.detach() + 1e-8)[0, 0] / (b.entropy_old + 1e-8)[0, 0] == rho
    trainer = build(s)
    _, (found, _) = trainer_gradients(trainer, b, trainer_inputs(b, b.mask))
    assert bool((found != 0).any()) is kept
    check(trainer, s, b, trainer_inputs(b, b.mask))


@pytest.mark.parametrize("floor", [0.1, 1.0])
@pytest.mark.parametrize("level", LEVELS)
def test_erc_entropy_floor(build: Callable[..., Any], level: str, floor: float) -> None:
    s = replace(BASE, level=level, erc_floor=floor, **ERC)
    b, inputs = random_batch(0)
    check(build(s), s, b, inputs)
    papers = replace(s, erc_floor=1e-8)
    fates = {tuple(reference.keeps_gradient(b, of, i, t) for of in (s, papers)) for i, t in reference.valid_tokens(b)}
    assert (True, False) in fates  # a token that only the paper's floor clips


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("log_ratio", "sign"), [(0.25, 1.0), (-0.25, -1.0)])
def test_a_ratio_on_the_edge_is_not_clipped(
    build: Callable[..., Any], log_ratio: float, sign: float, level: str
) -> None:
    """With r = 1 + eps_hi or 1 - eps_lo exactly, the token keeps its own weight r instead of alpha (1 +- eps)."""
    edge = torch.tensor(log_ratio, dtype=torch.float64).exp().item()
    s = replace(
        BASE, level=level, eps_lo=1 - edge if log_ratio < 0 else 0.2, eps_hi=edge - 1 if log_ratio > 0 else 0.2
    )
    s = replace(s, alphas=(0.5, 0.5))
    assert edge in (1 - s.eps_lo, 1 + s.eps_hi)
    lp = torch.full((1, 4), -1.0, dtype=torch.float64, requires_grad=True)
    b = Batch(
        lp=lp,
        entropy=torch.ones_like(lp).requires_grad_(),
        mask=torch.ones(1, 4, dtype=torch.long),
        advantages=torch.tensor([sign], dtype=torch.float64),
        num_items=4.0,
        lp_old=lp.detach() - log_ratio,
        entropy_old=torch.ones_like(lp),
        rewards=torch.ones(1, dtype=torch.float64),
        num_correct_tokens=4.0,
    )
    s = replace(s, accumulation=1, micro_batches_per_rollout=2)
    _, (found, _) = trainer_gradients(build(s), b, trainer_inputs(b, b.mask))
    # -r A, over a token count of 4 / 2
    torch.testing.assert_close(found, torch.full_like(lp, -edge * sign / 2), rtol=1e-12, atol=0)
