"""Turns and their weights by hand."""

import pytest
import torch

from trl_entropy.controls.turns import trajectory_weights, turn_indices

# two turns of two and one tokens around an observation; one turn of three; nothing
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()


def test_turns_are_runs_of_model_written_tokens():
    assert turn_indices(MASK).tolist() == [[0, 0, -1, 1], [0, 0, 0, -1], [-1, -1, -1, -1]]
    late_start = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1]]).bool()
    assert turn_indices(late_start).tolist() == [[-1, 0, -1, -1, 1, 1, -1, 2]]


def test_weights_of_the_triple_mean():
    # row 0 has two turns: 1 / (2 x 2) each for the first, 1 / (2 x 1) for the second; row 1 has one turn of three
    weights = trajectory_weights(MASK, turn_indices(MASK), torch.float64)
    expected = [[0.25, 0.25, 0.0, 0.5], [1 / 3, 1 / 3, 1 / 3, 0.0], [0.0] * 4]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 1000), (torch.float16, 70_000)])
def test_counts_do_not_end_in_16_bits(dtype, tokens):
    # one turn; counted in bfloat16 it ends at 256 where sums are not kept wider, in float16 at infinity
    mask = torch.ones(1, tokens, dtype=torch.bool)
    weights = trajectory_weights(mask, turn_indices(mask), dtype)
    assert weights.dtype == dtype
    assert weights[0, 0].item() == pytest.approx(1 / tokens, rel=4e-3)
