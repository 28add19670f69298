"""DPPO's trust region, token by token."""

import math

import pytest
import torch

from trl_entropy.controls import PolicyTokens, binary_divergence, dppo

INFINITY = math.inf


def logs(*probabilities: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log().to(dtype)


def shaped(new: tuple[float, ...], old: tuple[float, ...], advantages: tuple[float, ...], **settings: object):
    tokens = PolicyTokens(
        logps=logs(*new),
        old_logps=torch.full((1, len(new)), -9.0, dtype=torch.float64),  # the trainer's own: not what is read
        advantages=torch.tensor([advantages], dtype=torch.float64),
        mask=torch.ones(1, len(new), dtype=torch.bool),
    )
    settings = {"divergence": "tv", "delta_low": 0.15, "delta_high": 0.25, **settings}
    return tokens, *dppo(tokens, logs(*old), **settings)  # type: ignore[arg-type]


def test_divergences_by_hand() -> None:
    new, old = logs(0.5, 0.2, 0.9), logs(0.25, 0.2, 0.3)
    torch.testing.assert_close(binary_divergence(new, old, "tv"), torch.tensor([[0.25, 0.0, 0.6]]).double())
    # 0.25 ln(1/2) + 0.75 ln(3/2); 0; 0.3 ln(1/3) + 0.7 ln(7)
    expected = [0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.0, 0.3 * math.log(1 / 3) + 0.7 * math.log(7)]
    torch.testing.assert_close(binary_divergence(new, old, "kl"), torch.tensor([expected]).double())
    with pytest.raises(ValueError, match="dppo_divergence='js' is unknown"):
        binary_divergence(new, old, "js")


def test_only_a_step_away_from_the_sampler_is_dropped() -> None:
    """Up by 0.3 and 0.2, down by 0.2 and 0.1: over 0.25 with A > 0, over 0.15 with A < 0."""
    new, old = (0.6, 0.5, 0.1, 0.2), (0.3, 0.3, 0.3, 0.3)
    tokens, after, metrics = shaped(new, old, (1.0, 1.0, -1.0, -1.0))
    expected = torch.tensor([[0.0, 5 / 3, 0.0, -2 / 3]]).double()
    torch.testing.assert_close(after.advantages, expected)
    assert torch.equal(after.old_logps, tokens.logps)
    assert metrics["dppo/high_fraction"].value.tolist() == [[True, False, False, False]]
    assert metrics["dppo/low_fraction"].value.tolist() == [[False, False, True, False]]
    assert metrics["dppo/dropped_fraction"].value.tolist() == [[True, False, True, False]]
    torch.testing.assert_close(metrics["dppo/divergence"].value, torch.tensor([[0.3, 0.2, 0.2, 0.1]]).double())
    _, back, _ = shaped(new, old, (-1.0, -1.0, 1.0, 1.0))  # each moves towards the sampler
    torch.testing.assert_close(back.advantages, torch.tensor([[-2.0, -5 / 3, 1 / 3, 2 / 3]]).double())


def test_an_improbable_token_may_rise_far_and_a_probable_one_may_not_fall() -> None:
    """Of the paper's argument: PPO-clip at 0.2 would drop the first and keep the second."""
    _, after, _ = shaped((0.1, 0.79), (0.001, 0.95), (1.0, -1.0), delta_low=0.15)
    torch.testing.assert_close(after.advantages, torch.tensor([[100.0, 0.0]]).double())


def test_the_ratio_is_truncated_from_above_alone() -> None:
    """The last is dropped, so that nothing of it is left to truncate."""
    new, old = (0.1, 0.001, 0.5, 0.5, 0.9), (0.01, 0.1, 0.5, 0.02, 0.05)
    _, after, metrics = shaped(new, old, (1.0, -1.0, -1.0, -2.0, 1.0), truncation=5.0)
    torch.testing.assert_close(after.advantages, torch.tensor([[5.0, -0.01, -1.0, -10.0, 0.0]]).double())
    assert metrics["dppo/truncated_fraction"].value.tolist() == [[True, False, False, True, False]]


def test_a_distance_of_delta_is_inside() -> None:
    tokens = PolicyTokens(*(torch.zeros(1, 1) for _ in range(2)), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    sampled = torch.tensor([[-math.log(2.0)]])  # p = 1, q = 0.5
    for delta, kept in ((0.5, True), (0.4999, False)):
        after, _ = dppo(tokens, sampled, divergence="tv", delta_low=0.0, delta_high=delta)
        assert bool(after.advantages.item()) is kept


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_float32_keeps_its_digits_where_the_token_is_almost_certain(kind: str) -> None:
    new = torch.tensor([[-1e-6, -3e-5, -1e-4, -2e-3, 0.0]])
    old = torch.tensor([[-1e-3, -2e-3, -1e-7, -1e-6, 0.0]])
    exact = binary_divergence(new.double(), old.double(), kind)
    torch.testing.assert_close(binary_divergence(new, old, kind).double(), exact, rtol=2e-4, atol=1e-7)


def test_edges_are_numbers() -> None:
    infinite = float("-inf")
    new = torch.tensor([[0.0, 1e-7, -80.0, -2.0, 0.0]])
    old = torch.tensor([[-1.0, -1e-8, 0.0, infinite, infinite]])
    for kind in ("tv", "kl"):
        distance = binary_divergence(new, old, kind)
        assert distance.isfinite().all()
        assert (distance >= -1e-6).all()
    tokens = PolicyTokens(new, new, torch.ones(1, 5), torch.ones(1, 5, dtype=torch.bool))
    after, _ = dppo(tokens, old, divergence="tv", delta_low=INFINITY, delta_high=INFINITY)
    assert after.advantages.isfinite().all()
    empty = PolicyTokens(*(torch.zeros(2, 0) for _ in range(3)), torch.zeros(2, 0, dtype=torch.bool))
    after, metrics = dppo(empty, torch.zeros(2, 0), divergence="kl", delta_low=0.05, delta_high=0.05)
    assert after.advantages.shape == (2, 0)
    assert metrics["dppo/divergence"].totals().tolist() == [0.0, 0.0]
