"""Exactly the asked number of tokens of the global batch, whatever the scores and the processes."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from trl_entropy.controls.selection import global_uniform
from trl_entropy.critics import highest_fraction, lowest_fraction


def identity(flat):
    return flat


def loop_lowest(scores, mask, count):
    """The `count` lowest valid tokens: NaN last, then by place in the batch."""
    chosen = torch.zeros_like(mask)
    valid = [(row, token) for row in range(mask.shape[0]) for token in range(mask.shape[1]) if mask[row, token]]
    # sorted() keeps the order of equal ones
    numbers = sorted((place for place in valid if not scores[place].isnan()), key=lambda place: scores[place].item())
    for place in (numbers + [place for place in valid if scores[place].isnan()])[:count]:
        chosen[place] = True
    return chosen


def batch(seed, rows=8, tokens=11):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, tokens, generator=draw, dtype=torch.float64)
    # many ties
    scores = (scores * 2).round() / 2
    scores[torch.rand(scores.shape, generator=draw) < 0.1] = math.nan
    return scores, torch.rand(rows, tokens, generator=draw) < 0.7


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.29, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_loop(seed, fraction):
    scores, mask = batch(seed)
    count = int(fraction * int(mask.sum()) + 1e-9)
    lowest = lowest_fraction(scores, mask, fraction, identity)
    assert lowest.sum() == count
    assert torch.equal(lowest, loop_lowest(scores, mask, count))
    assert torch.equal(highest_fraction(scores, mask, fraction, identity), loop_lowest(-scores, mask, count))


def on_processes(select, parts, fraction):
    """What each of several processes selects: threads whose gather waits for the others."""
    barrier, sent = threading.Barrier(len(parts)), [None] * len(parts)

    def run(rank):
        def gather(flat):
            sent[rank] = flat
            barrier.wait(10)
            everything = torch.cat(sent)
            barrier.wait(10)
            return everything

        return select(*parts[rank], fraction, gather, rank=rank)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


@pytest.mark.parametrize("select", [lowest_fraction, highest_fraction])
@pytest.mark.parametrize("split", [[4, 4], [1, 7], [3, 2, 3]])
def test_split_over_processes_does_not_matter(select, split):
    scores, mask = batch(7)
    mask[:1] = False
    whole = select(scores, mask, 0.3, identity)
    parts = list(zip(scores.split(split), mask.split(split), strict=True))
    # the second process has shorter completions padded to another width
    parts[1] = tuple(torch.nn.functional.pad(value, (0, 3)) for value in parts[1])
    found = on_processes(select, parts, 0.3)
    assert found[1].shape[1] == 14
    assert not found[1][:, 11:].any()
    found[1] = found[1][:, :11]
    assert torch.equal(torch.cat(found), whole)


def test_equal_scores_are_taken_in_order():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    expected = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.equal(lowest_fraction(torch.zeros(2, 3), mask, 0.4, identity), expected)
    assert torch.equal(highest_fraction(torch.zeros(2, 3), mask, 0.4, identity), expected)


def test_decimal_fractions():
    # 0.29 * 100 is 28.999999999999996 in binary
    mask = torch.ones(10, 10, dtype=torch.bool)
    assert lowest_fraction(torch.randn(10, 10), mask, 0.29, identity).sum() == 29


def test_no_valid_token():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert not lowest_fraction(torch.randn(2, 3), nothing, 0.5, identity).any()


def test_bfloat16_scores_and_infinities():
    scores = torch.tensor([[math.inf, math.nan, -math.inf, 1.0]], dtype=torch.bfloat16)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert lowest_fraction(scores, mask, 0.5, identity).tolist() == [[False, False, True, True]]
    assert highest_fraction(scores, mask, 0.5, identity).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="must be in"):
        lowest_fraction(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), fraction, identity)


def test_at_least():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    scores = torch.tensor([[2.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    lowest, highest = (
        torch.tensor([[False] * 3, [True, False, False]]),
        torch.tensor([[False, True, False], [False] * 3]),
    )
    for fraction in (0.0, 0.2):
        assert torch.equal(lowest_fraction(scores, mask, fraction, identity, at_least=1), lowest)
        assert torch.equal(highest_fraction(scores, mask, fraction, identity, at_least=1), highest)
    assert torch.equal(lowest_fraction(scores, mask, 0.5, identity, at_least=9), mask)


def test_uniform_numbers_by_place_in_the_global_batch():
    _, mask = batch(7)
    draw = torch.Generator().manual_seed(3)
    whole = global_uniform(mask, draw, identity)
    expected = torch.rand(int(mask.sum()), generator=torch.Generator().manual_seed(3))
    assert torch.equal(whole[mask], expected)
    assert (whole[~mask] == 1.0).all()

    def uniform(mask, seed, gather, rank):
        return global_uniform(mask, torch.Generator().manual_seed(seed), gather, rank=rank)

    found = on_processes(uniform, [(part,) for part in mask.split([3, 5])], 3)
    assert torch.equal(torch.cat(found), whole)
