"""Properties of advantages, returns and the critics' masks on random episodes: empty rows, large values, cuts."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.controls.micro_batches import Batch, batches, padded, quick
from trl_entropy.critics import Episodes, critic_targets, explained_variance, generalized_advantages, whiten
from trl_entropy.trainers.critics import disagreement

DISCOUNTS = st.sampled_from([0.0, 0.5, 0.95, 1.0])
finite = batches(advantages=(-3.0, -0.5, 0.0, 0.5, 3.0))


def episodes_of(batch: Batch) -> Episodes:
    """Values down to -2000, with a reward of each token; every completion ends with its last token that counts."""
    after = torch.where(batch.rewards.isnan(), 3.0, -5.0).unsqueeze(1)  # of a state beyond all tokens
    positions = torch.arange(1, batch.mask.shape[1] + 1)
    return Episodes(
        state_values=torch.cat([batch.logps, after], dim=1),
        rewards=batch.rewards.nan_to_num(0.0),
        mask=batch.mask,
        ends=(batch.mask * positions).amax(1),
        truncated=batch.rewards.isnan(),
        token_rewards=torch.where(batch.mask, batch.advantages, 0.0),
    )


def widened(episodes: Episodes, columns: int) -> Episodes:
    """With states and tokens that do not count; the state in which a completion was cut off stays where it was."""

    def pad(value: Tensor, filler: float) -> Tensor:
        return torch.nn.functional.pad(value, (0, columns), value=filler)

    assert episodes.token_rewards is not None
    return replace(
        episodes,
        state_values=pad(episodes.state_values, 7.0),
        mask=pad(episodes.mask, False),
        token_rewards=pad(episodes.token_rewards, 0.0),
    )


def without_observations(episode: Episodes) -> Episodes:
    """One completion with the tokens alone that count: what lies between them takes no time."""
    assert episode.token_rewards is not None
    keep, end = episode.mask[0], episode.state_values[:, episode.ends[0]].unsqueeze(1)
    return replace(
        episode,
        state_values=torch.cat([episode.state_values[:, :-1][:, keep], end], dim=1),
        mask=episode.mask[:, keep],
        ends=keep.sum().unsqueeze(0),
        token_rewards=episode.token_rewards[:, keep],
    )


def rows_of(episodes: Episodes, rows: slice | list[int]) -> Episodes:
    return Episodes(**{name: value[rows] for name, value in vars(episodes).items()})


@quick
@given(finite, DISCOUNTS, DISCOUNTS, st.integers(1, 3))
def test_advantages_are_each_row_s_own(batch: Batch, gamma: float, lam: float, columns: int) -> None:
    episodes = episodes_of(batch)
    for estimate in (generalized_advantages, critic_targets):
        whole = estimate(episodes, gamma=gamma, lam=lam)
        assert whole.isfinite().all()
        assert (whole[~batch.mask] == 0.0).all()
        wide = estimate(widened(episodes, columns), gamma=gamma, lam=lam)
        torch.testing.assert_close(wide[:, :-columns], whole, rtol=1e-12, atol=1e-9)
        for index in range(len(whole)):
            alone = estimate(rows_of(episodes, [index]), gamma=gamma, lam=lam)
            torch.testing.assert_close(alone[0], whole[index], rtol=1e-12, atol=1e-9)
            written = estimate(without_observations(rows_of(episodes, [index])), gamma=gamma, lam=lam)
            torch.testing.assert_close(written[0], whole[index][batch.mask[index]], rtol=1e-12, atol=1e-9)


@quick
@given(finite)
def test_undiscounted_returns_are_what_follows(batch: Batch) -> None:
    """Rewards of the tokens from each on, that of the completion, and the value where it was cut off."""
    episodes = episodes_of(batch)
    returns = critic_targets(episodes, gamma=1.0, lam=1.0)
    for i, row in enumerate(batch.mask):
        cut_off = episodes.state_values[i, episodes.ends[i]].item() if episodes.truncated[i] else 0.0
        for t in row.nonzero().flatten().tolist():
            rest = batch.advantages[i, t:][row[t:]].sum().item()
            expected = rest + episodes.rewards[i].item() + cut_off
            assert math.isclose(returns[i, t].item(), expected, rel_tol=1e-9, abs_tol=1e-9)


def on_two(run: Callable[[Callable[[Tensor], Tensor], slice], Tensor], cut: int, totals: list[Tensor]) -> Tensor:
    """What two processes make of their shares of the rows; their sums are to add up to those of one."""
    found, left = [], [total.clone() for total in totals]
    for rows in (slice(0, cut), slice(cut, None)):
        calls = iter(range(len(totals)))

        def reduce(own: Tensor, calls: Iterator[int] = calls) -> Tensor:
            call = next(calls)
            left[call] -= own
            return totals[call]

        found.append(run(reduce, rows))
    for rest, total in zip(left, totals, strict=True):
        torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-9 * (1.0 + total.abs().max().item()))
    return torch.cat(found)


@quick
@given(finite, st.integers(0, 5), st.integers(1, 3))
def test_whitened_advantages(batch: Batch, cut: int, columns: int) -> None:
    values, mask, sums = 10.0 * batch.advantages + 7.0, batch.mask, []
    white = whiten(values, mask, lambda own: sums.append(own) or own)
    assert white.isfinite().all()
    assert (white[~mask] == 0.0).all()
    if mask.any():
        spread = values[mask].std(unbiased=False) > 0
        torch.testing.assert_close(white[mask].mean(), torch.zeros(()).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(white[mask].std(unbiased=False), spread.double(), rtol=0, atol=1e-6)
        assert torch.equal(white[mask].sign(), (values - values[mask].mean())[mask].round(decimals=6).sign())
    shares = on_two(lambda reduce, rows: whiten(values[rows], mask[rows], reduce), cut, sums)
    torch.testing.assert_close(shares, white, rtol=1e-12, atol=1e-12)
    wide = padded(batch, columns)
    again = whiten(10.0 * wide.advantages + 7.0, wide.mask, lambda own: own)
    torch.testing.assert_close(again[:, :-columns], white, rtol=1e-9, atol=1e-9)


@quick
@given(finite, st.integers(1, 3))
def test_explained_variance_is_at_most_one(batch: Batch, columns: int) -> None:
    backwards = batch[list(reversed(range(len(batch.mask))))]
    found = [
        explained_variance(one.entropies, one.advantages, one.mask, lambda sums: sums)
        for one in (batch, backwards, padded(batch, columns))
    ]
    varies = len(set(batch.advantages[batch.mask].tolist())) > 1
    assert all(math.isnan(share) is not varies for share in found)
    if varies:
        assert found[0] <= 1.0
        assert all(math.isclose(share, found[0], rel_tol=1e-9, abs_tol=1e-9) for share in found)
        assert explained_variance(batch.advantages - 2.0, batch.advantages, batch.mask, lambda sums: sums) == 1.0


@quick
@given(finite, st.sampled_from([0.0, 0.2, 0.5, 0.9]), st.sampled_from([0.0, 0.2, 0.5, 0.9]), st.integers(1, 3))
def test_the_masks_have_the_shares_that_are_set(batch: Batch, low: float, high: float, columns: int) -> None:
    """Lowest disagreement first, and highest first; however the rows are padded."""
    settings = SimpleNamespace(advantage_mask_fraction=low, entropy_filter_fraction=high)

    def masks(of: Batch) -> dict[str, Tensor]:
        return disagreement(torch.stack([of.entropies, of.old_entropies]), of.mask, settings, lambda flat: flat)

    found, mask, count = masks(batch), batch.mask, int(batch.mask.sum())
    deviation = found["value_std"]
    assert deviation.isfinite().all()
    for name, share, sign in (("advantage_masked", low, 1.0), ("entropy_filtered", high, -1.0)):
        chosen = found[name]
        assert not (chosen & ~mask).any()
        assert int(chosen.sum()) == math.floor(round(share * 10) * count / 10)
        inside, outside = (sign * deviation[which] for which in (chosen, mask & ~chosen))
        assert not len(inside) or not len(outside) or inside.max() <= outside.min()
        wide = masks(padded(batch, columns))[name]
        assert torch.equal(wide[:, :-columns], chosen)
        assert not wide[:, -columns:].any()
