"""Every completion is in exactly one shard, every critic sees every prompt."""

import itertools

import pytest
import torch

from trl_entropy.critics import assign_shards


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shares(sizes, num_critics, generator):
    """Completions of each prompt that each critic got, one list per prompt."""
    shards = assign_shards(sizes, num_critics, generator)
    assert shards.dtype == torch.int64
    assert shards.shape == (sum(sizes),)
    return [part.bincount(minlength=num_critics).tolist() for part in shards.split(sizes)]


def test_random_group_shapes():
    draw = torch.Generator().manual_seed(1)
    for case in range(1000):
        num_critics = int(torch.randint(1, 6, (), generator=draw))
        sizes = torch.randint(num_critics, 4 * num_critics + 2, (1 + case % 7,), generator=draw).tolist()
        for size, counts in zip(sizes, shares(sizes, num_critics, draw), strict=True):
            assert len(counts) == num_critics
            assert sum(counts) == size
            assert min(counts) >= 1
            assert max(counts) - min(counts) <= 1


def test_generator_decides():
    sizes = [5] * 20
    first = assign_shards(sizes, 2, generator(3))
    assert torch.equal(first, assign_shards(sizes, 2, generator(3)))
    assert not torch.equal(first, assign_shards(sizes, 2, generator(4)))


def test_extras_favour_nobody():
    # 7 completions for 3 critics leave one over: over 3000 prompts each critic gets 1000 +- 26 of them
    counts = torch.tensor(shares([7] * 3000, 3, generator()))
    extras = (counts == 3).sum(0)
    assert extras.sum() == 3000
    assert (extras - 1000).abs().max() < 130


def test_every_place_in_a_group_is_shared():
    # 4 completions, 2 critics: each place is critic 0's in half of the prompts, 1000 +- 22 of 2000, and any two
    # places have the same critic in a third of them, 667 +- 21
    shards = assign_shards([4] * 2000, 2, generator()).view(2000, 4)
    assert ((shards == 0).sum(0) - 1000).abs().max() < 110
    for first, second in itertools.combinations(range(4), 2):
        assert abs(int((shards[:, first] == shards[:, second]).sum()) - 667) < 105


def test_small_group_is_refused():
    with pytest.raises(ValueError, match=r"2 completions and num_critics=3"):
        assign_shards([4, 2], 3, generator())


def test_no_prompts():
    assert assign_shards([], 2, generator()).shape == (0,)
