"""STARE: which tokens are re-weighted, when, and how the weights move."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.controls.test_selection import on_processes
from trl_entropy.controls import Context, Rollout, stare_weights
from trl_entropy.controls.selection import Gather, lowest_fraction
from trl_entropy.controls.stare import (
    STAREFields,
    STAREWeights,
    adaptive_weights,
    on_rollout,
    rollout_entropy,
)

C2 = {"fraction": 0.25, "positive_weight": 1.5, "negative_weight": 0.5}


def logps(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def settings(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(STAREFields()), "stare_target_entropy": 1.0, **fields})


def rollout(entropies: torch.Tensor, mask: torch.Tensor | None = None, advantages: object = None) -> Rollout:
    rows = len(entropies)
    return Rollout(
        mask=torch.ones_like(entropies, dtype=torch.bool) if mask is None else mask,
        rewards=torch.zeros(rows),
        advantages=torch.tensor([1.0, -1.0] * rows)[:rows] if advantages is None else advantages,  # type: ignore[arg-type]
        old_logps=-torch.arange(entropies.numel(), dtype=torch.float32).view_as(entropies),
        old_entropies=entropies,
    )


def test_the_most_surprising_tokens_of_either_sign_by_hand() -> None:
    """Of six with A > 0 and a quarter: ceil(1.5) = 2. Of three with A < 0: ceil(0.75) = 1. A = 0: none."""
    old = logps([-1.0, -5.0, -2.0], [-0.1, -3.0, -4.0], [-9.0, -8.0, -7.0], [-9.0, -9.0, -9.0])
    mask = torch.ones(4, 3, dtype=torch.bool)
    advantages = torch.tensor([2.0, 0.5, -1.0, 0.0])
    weights = stare_weights(old, advantages, mask, **C2)
    assert weights.tolist() == [[1.0, 1.5, 1.0], [1.0, 1.0, 1.5], [0.5, 1.0, 1.0], [1.0] * 3]
    o1 = stare_weights(old, advantages, mask, **{**C2, "negative_weight": 1.0})
    assert o1.tolist() == [[1.0, 1.5, 1.0], [1.0, 1.0, 1.5], [1.0] * 3, [1.0] * 3]
    mask[0, 1] = mask[2, 0] = False  # five left, ceil(1.25) = 2; two left, 1
    weights = stare_weights(old, advantages, mask, **C2)
    assert weights.tolist() == [[1.0] * 3, [1.0, 1.5, 1.5], [1.0, 0.5, 1.0], [1.0] * 3]


def test_sides_are_per_token_with_critics() -> None:
    old = logps([-1.0, -5.0, -2.0, -6.0])
    weights = stare_weights(old, torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool), **C2)
    assert weights.tolist() == [[1.0, 1.0, 1.5, 0.5]]


@pytest.mark.parametrize(
    ("total", "fraction", "count"),
    [(10, 0.1, 1), (11, 0.1, 2), (1, 0.1, 1), (100, 0.29, 29), (7, 1.0, 7), (0, 0.1, 0)],
)
def test_the_count_is_rounded_up(total: int, fraction: float, count: int) -> None:
    mask = torch.arange(128).unsqueeze(0) < total
    chosen = lowest_fraction(torch.zeros(1, 128), mask, fraction, lambda flat: flat, round_up=True)
    assert chosen.sum() == count
    assert bool((chosen <= mask).all())


def test_nothing_valid_all_equal_one_token_and_no_number() -> None:
    nothing = stare_weights(torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3, dtype=torch.bool), **C2)
    assert nothing.tolist() == [[1.0] * 3] * 2
    equal = stare_weights(torch.zeros(2, 4), torch.ones(2), torch.ones(2, 4, dtype=torch.bool), **C2)
    assert equal.tolist() == [[1.5, 1.5, 1.0, 1.0], [1.0] * 4]  # by their order
    one = stare_weights(torch.zeros(1, 1), -torch.ones(1), torch.ones(1, 1, dtype=torch.bool), **C2)
    assert one.tolist() == [[0.5]]
    broken = stare_weights(
        logps([math.nan, -1.0, -2.0, -0.5]), torch.ones(1), torch.ones(1, 4, dtype=torch.bool), **C2
    )
    assert broken.tolist() == [[1.0, 1.0, 1.5, 1.0]]


@pytest.mark.parametrize("split", [[4, 4], [1, 7], [3, 2, 3]])
def test_processes_select_together(split: list[int]) -> None:
    g = torch.Generator().manual_seed(1)
    old = torch.randn(8, 5, generator=g, dtype=torch.float64).round(decimals=1)  # ties
    mask = torch.rand(8, 5, generator=g) < 0.8
    advantages = torch.randn(8, generator=g)
    parts = list(zip(*(value.split(split) for value in (old, advantages, mask)), strict=True))

    def select(
        old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, fraction: float, gather: Gather, *, rank: int
    ) -> torch.Tensor:
        return stare_weights(old, advantages, mask, **{**C2, "fraction": fraction}, gather=gather, rank=rank)

    whole = stare_weights(old, advantages, mask, **C2)
    assert torch.equal(torch.cat(on_processes(select, parts, C2["fraction"])), whole)
    assert (whole != 1.0).sum() > 5


def test_the_gate_reads_the_mean_over_all_processes() -> None:
    """Here 0.9 and 0.6, there the sum 4.5 of 3 tokens: mean 1.2, above the target of 1. NaN and observations apart."""
    entropies = torch.tensor([[0.9, math.nan], [0.6, 77.0]])
    mask = torch.tensor([[True, True], [True, False]])
    alone, both = Context(settings()), Context(settings(), sum_over_processes=lambda t: t + t.new_tensor([4.5, 3.0]))
    of_this = rollout(entropies, mask)
    assert rollout_entropy(of_this, alone) == pytest.approx(0.75)
    assert rollout_entropy(of_this, both) == pytest.approx(1.2)
    columns, metrics = on_rollout(of_this, alone, None)
    assert columns["stare_weight"].tolist() == [[1.0, pytest.approx(1.1)], [1.0, 1.0]]
    assert metrics["stare/gate"].value == 1.0
    columns, metrics = on_rollout(of_this, both, None)
    assert columns["stare_weight"].tolist() == [[1.0] * 2] * 2
    assert metrics["stare/gate"].value == 0.0
    assert metrics["stare/entropy"].value == pytest.approx(1.2)


def test_the_gate_is_strict_and_off_without_an_entropy() -> None:
    for entropies in (torch.ones(2, 2), torch.full((2, 2), math.nan)):
        columns, metrics = on_rollout(rollout(entropies), Context(settings()), None)
        assert columns["stare_weight"].eq(1.0).all()
        assert metrics["stare/gate"].value == 0.0
    assert "stare/entropy" not in metrics


def test_c2_weakens_and_o1_does_not() -> None:
    found = {}
    for variant in ("O1", "C2"):
        context = Context(settings(stare_variant=variant))
        found[variant] = on_rollout(rollout(torch.zeros(2, 2)), context, None)[0]["stare_weight"]
    assert found["O1"].tolist() == [[1.0, pytest.approx(1.1)], [1.0, 1.0]]
    assert found["C2"].tolist() == [[1.0, pytest.approx(1.1)], [1.0, pytest.approx(0.9)]]


def test_the_adaptive_weights_by_hand() -> None:
    """Below the target by any amount: one step out; above it: one step back; at it: none. Bounded on both sides."""
    moving = settings(stare_adaptive_step=0.25, stare_variant="C2", stare_positive_max=1.5, stare_negative_min=0.5)
    weights = STAREWeights(1.125, 0.875)
    seen = []
    for entropy in (0.9, 0.1, 0.1, 1.0, 1.5, 1.5, 1.5, 1.5):
        weights.step(entropy, moving)
        seen.append((weights.positive, weights.negative))
    out, back = [(1.375, 0.625), (1.5, 0.5), (1.5, 0.5), (1.5, 0.5)], [(1.25, 0.75), (1.0, 1.0), (1.0, 1.0)]
    assert seen == [*out, *back, (1.0, 1.0)]


def test_they_move_before_they_are_used_and_not_in_an_evaluation() -> None:
    moving = settings(stare_adaptive_step=0.01)
    weights, low = STAREWeights(1.1, 0.9), rollout(torch.zeros(2, 2))
    columns, metrics = on_rollout(low, Context(moving, training=False), weights)
    assert columns["stare_weight"].max() == pytest.approx(1.1)
    columns, metrics = on_rollout(low, Context(moving), weights)
    assert columns["stare_weight"].max() == pytest.approx(1.11)
    assert metrics["stare/positive_weight"].value == pytest.approx(1.11)
    assert metrics["stare/negative_weight"].value == pytest.approx(0.89)
    on_rollout(rollout(torch.full((2, 2), math.nan)), Context(moving), weights)
    assert weights.positive == pytest.approx(1.11)


def test_state_round_trip() -> None:
    state = STAREWeights(1.3, 0.7).state_dict()
    assert adaptive_weights(settings()) is None
    fresh = adaptive_weights(settings(stare_adaptive_step=0.01))
    assert fresh is not None
    assert fresh.state_dict() == {"positive": 1.1, "negative": 0.9}
    fresh.load_state_dict(state, own=False)
    assert fresh.state_dict() == {"positive": 1.3, "negative": 0.7} == state


def test_without_the_rollouts_pass_it_says_so() -> None:
    bare = Rollout(torch.ones(1, 1, dtype=torch.bool), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="needs the rollout's entropies"):
        on_rollout(bare, Context(settings()), None)
