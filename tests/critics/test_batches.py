"""What a process feeds its critics where it has no row of a mini-batch."""

import torch

from trl_entropy.critics.batches import Rollout


def test_no_rows_are_one_row_with_nothing_to_learn() -> None:
    ids, ones = torch.arange(12).reshape(3, 4), torch.ones(3, 2)
    rows = Rollout(ids, torch.ones_like(ids), ones.bool(), ones).select(torch.tensor([], dtype=torch.int64))
    assert rows.input_ids.tolist() == [[0, 1, 2, 3]]
    assert rows.mask.tolist() == [[False, False]]
    assert rows.attention_mask.shape == (1, 4)
    assert rows.targets.shape == (1, 2)
