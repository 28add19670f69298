"""What goes with the samples of asynchronous training from the rollout queue to the loss and the recorder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..controls import MicroBatch
from .async_contact import AsyncLossCall

ABSENT = -1
"""Where a sample has no token."""


class TaggedMetrics(dict[str, float]):
    """The metrics of a sample, which TRL hands on as they are, with the version of the weights that it is tagged with.

    Attributes:
        version: Of the server's weights, when the sample's group was requested.
    """

    def __init__(self, metrics: Mapping[str, float], version: int) -> None:
        super().__init__(metrics)
        self.version = version


def per_token(values: Sequence[Sequence[float]], segment_id: Tensor) -> Tensor:
    """A number of each sample at each of its trained tokens.

    Args:
        values: For each packed row, one for each of its samples.
        segment_id: The sample of each token, `(rows, M)`.

    Returns:
        `(rows, M)`.
    """
    longest = max(map(len, values))
    table = torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in values])
    return table.gather(1, segment_id)


def sample_ids(rows: Sequence[Any]) -> Tensor:
    """The tokens of the samples of packed rows, `(rows, samples, tokens)`, with `ABSENT` where there is none."""
    ids = [[torch.as_tensor(sample["input_ids"]) for sample in row.samples] for row in rows]
    longest = max(len(sample) for row in ids for sample in row)
    table = torch.full((len(ids), max(map(len, ids)), longest), ABSENT)
    for i, row in enumerate(ids):
        for j, sample in enumerate(row):
            table[i, j, : len(sample)] = sample
    return table


def as_rollout(call: AsyncLossCall, batch: MicroBatch) -> dict[str, Tensor]:
    """A micro-batch under the names of synchronous training, for the recorder."""
    starts, (rows, width) = call.completions.starts.unsqueeze(1), call.completions.shape
    ids = call.inputs["sample_ids"][0, :rows]

    def span(positions: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens at these positions, and whether there is one."""
        inside = (positions >= 0) & (positions < ids.shape[1])
        found = ids.gather(1, positions.clamp(0, ids.shape[1] - 1)).where(inside, ABSENT)
        return found.clamp(min=0), found != ABSENT

    longest = int(starts.max())
    completion_ids, completion_mask = span(starts + torch.arange(width, device=ids.device))
    prompt_ids, prompt_mask = span(starts - longest + torch.arange(longest, device=ids.device))
    columns = {
        "advantages": batch.tokens.advantages,
        "old_per_token_logps": batch.tokens.old_logps,
        "completion_index": torch.arange(rows, device=ids.device),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
    }
    return columns if batch.old_entropies is None else columns | {"old_entropies": batch.old_entropies}
