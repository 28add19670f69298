"""Advantages, returns and their statistics against plain loops and by hand."""

import dataclasses
import itertools
import math

import pytest
import torch

from trl_entropy.critics import Episodes, critic_targets, explained_variance, generalized_advantages, whiten


def loop_advantages(state_values, rewards, mask, ends, truncated, gamma, lam):
    """GAE token by token, from the last one backwards."""
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(len(mask)):
        following = state_values[row, ends[row]].item() if truncated[row] else 0.0
        running, last = 0.0, True
        for token in reversed(range(mask.shape[1])):
            if not mask[row, token]:
                continue
            delta = gamma * following - state_values[row, token].item() + (rewards[row].item() if last else 0.0)
            running = delta + gamma * lam * running
            advantages[row, token], following, last = running, state_values[row, token].item(), False
    return advantages


def episode(tokens, rows=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, tokens, generator=draw) < 0.6
    mask[0] = False
    mask[1] = True
    mask[2, : tokens // 2] = False
    mask[3, tokens // 2 :] = False
    ends = torch.randint(0, tokens + 1, (rows,), generator=draw)
    ends = torch.maximum(ends, (mask * torch.arange(1, tokens + 1)).amax(1))
    return {
        "state_values": torch.randn(rows, tokens + 1, generator=draw, dtype=torch.float64),
        "rewards": torch.randn(rows, generator=draw, dtype=torch.float64),
        "mask": mask,
        "ends": ends,
        "truncated": torch.arange(rows) % 2 == 0,
    }


@pytest.mark.parametrize(("gamma", "lam"), list(itertools.product([0.0, 0.9, 1.0], repeat=2)))
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 37])
def test_equals_the_loop(tokens, gamma, lam):
    given = episode(tokens)
    expected = loop_advantages(**given, gamma=gamma, lam=lam)
    found = generalized_advantages(Episodes(**given), gamma=gamma, lam=lam)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    returns = critic_targets(Episodes(**given), gamma=gamma, lam=lam)
    expected_returns = torch.where(given["mask"], expected + given["state_values"][:, :-1], 0.0)
    torch.testing.assert_close(returns, expected_returns, rtol=1e-12, atol=1e-12)


def test_by_hand_across_an_observation():
    # model, observation, model; V = 1, 50, 2, 60; reward 10; gamma 0.5, lambda 0.5
    # last token: delta = 10 + 0 - 2 = 8; first: delta = 0.5 * 2 - 1 = 0, A = 0 + 0.25 * 8 = 2
    given = {
        "state_values": torch.tensor([[1.0, 50.0, 2.0, 60.0]]),
        "rewards": torch.tensor([10.0]),
        "mask": torch.tensor([[True, False, True]]),
        "ends": torch.tensor([3]),
        "truncated": torch.tensor([False]),
    }
    assert generalized_advantages(Episodes(**given), gamma=0.5, lam=0.5).tolist() == [[2.0, 0.0, 8.0]]
    # cut off: delta = 10 + 0.5 * 60 - 2 = 38, A = 0 + 0.25 * 38 = 9.5
    given["truncated"] = torch.tensor([True])
    assert generalized_advantages(Episodes(**given), gamma=0.5, lam=0.5).tolist() == [[9.5, 0.0, 38.0]]


def test_monte_carlo_target_is_the_reward():
    given = episode(9, seed=1) | {"truncated": torch.zeros(12, dtype=torch.bool)}
    targets = critic_targets(Episodes(**given), gamma=1.0, lam=1.0)
    expected = torch.where(given["mask"], given["rewards"].unsqueeze(1), 0.0)
    torch.testing.assert_close(targets, expected, rtol=1e-12, atol=1e-12)


def test_nothing_leaks_out_of_masked_tokens():
    given = episode(9, seed=2) | {"truncated": torch.zeros(12, dtype=torch.bool)}
    expected = generalized_advantages(Episodes(**given), gamma=0.9, lam=0.9)
    spoilt = given | {"state_values": given["state_values"].clone()}
    spoilt["state_values"][:, :-1][~given["mask"]] = math.nan
    spoilt["state_values"][:, -1] = math.nan
    assert torch.equal(generalized_advantages(Episodes(**spoilt), gamma=0.9, lam=0.9), expected)


def test_wrong_shapes_are_named():
    given = episode(5)
    with pytest.raises(ValueError, match=r"state_values must be \(12, 6\)"):
        Episodes(**given | {"state_values": given["state_values"][:, :-1]})
    with pytest.raises(ValueError, match=r"rewards \(12, 1\)"):
        Episodes(**given | {"rewards": given["rewards"].unsqueeze(1)})


def identity(sums):
    return sums


def test_whiten():
    given = episode(20, seed=3)
    advantages, mask = 5 + 3 * given["state_values"][:, :-1].float(), given["mask"]
    advantages[~mask] = math.nan
    white = whiten(advantages, mask, identity)
    assert white.dtype == torch.float32
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white[mask].std(unbiased=False).item() == pytest.approx(1.0, abs=1e-6)
    assert (white[~mask] == 0).all()
    order = advantages[mask].argsort()
    assert torch.equal(order, white[mask].argsort())


def test_whiten_over_processes():
    """The halves of a batch, each with the sums of both, give the whole."""
    given = episode(20, seed=4)
    advantages, mask = given["state_values"][:, :-1], given["mask"]
    expected = whiten(advantages, mask, identity)
    calls = []
    whiten(advantages, mask, lambda sums: calls.append(sums) or sums)
    for half in (slice(0, 6), slice(6, 12)):
        totals = iter(calls)
        found = whiten(advantages[half], mask[half], lambda _, totals=totals: next(totals))
        torch.testing.assert_close(found, expected[half])


@pytest.mark.parametrize("num_valid", [0, 1, 3])
def test_whiten_without_variance(num_valid):
    mask = torch.arange(6).unsqueeze(0) < num_valid
    assert whiten(torch.full((1, 6), 0.1), mask, identity).abs().max() < 1e-3


def test_explained_variance_by_hand():
    # R = 0, 1, 2, 3: variance 1.25. V = 0, 1, 2, 1: errors 0, 0, 0, 2, variance 3 / 4, so 1 - 0.6 = 0.4
    targets, values = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]]), torch.tensor([[0.0, 1.0, 2.0, 1.0, -9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert explained_variance(values, targets, mask, identity) == pytest.approx(0.4)
    assert explained_variance(targets, targets, mask, identity) == 1.0
    # a constant offset is no error of the ranking
    assert explained_variance(targets + 7, targets, mask, identity) == pytest.approx(1.0)
    assert explained_variance(-targets, targets, mask, identity) == pytest.approx(-3.0)


def test_explained_variance_without_any():
    mask = torch.ones(1, 7, dtype=torch.bool)
    assert math.isnan(explained_variance(torch.randn(1, 7), torch.full((1, 7), 0.1), mask, identity))
    assert math.isnan(explained_variance(torch.zeros(1, 7), torch.zeros(1, 7), ~mask, identity))


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_explained_variance_of_equal_returns_beside_large_values(scale):
    """`A + V` of rewards of 0 is 0 but for the rounding of V."""
    torch.manual_seed(0)
    mask, ends = torch.ones(16, 40, dtype=torch.bool), torch.full((16,), 40)
    given = Episodes(scale * torch.randn(16, 41), torch.zeros(16), mask, ends, torch.zeros(16, dtype=torch.bool))
    targets = critic_targets(given, gamma=1.0, lam=1.0)
    assert 0 < targets.abs().max() < 1e-4 * scale
    assert math.isnan(explained_variance(given.state_values[:, :-1], targets, mask, identity))
    one_right = critic_targets(dataclasses.replace(given, rewards=torch.eye(16)[0]), gamma=1.0, lam=1.0)
    assert explained_variance(given.state_values[:, :-1], one_right, mask, identity) < 1
