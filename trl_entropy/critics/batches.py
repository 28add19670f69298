"""The mini-batches that a critic trains on, and each process's part of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .processes import num_processes, process_rank, summed


@dataclass(frozen=True)
class Rollout:
    """What the critics of this process learn from: `B` completions of up to `T` tokens.

    Attributes:
        input_ids: `(B, P + T)`.
        attention_mask: `(B, P + T)`.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        targets: Returns, `(B, T)`; read where `mask` is True.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    targets: Tensor

    def select(self, rows: Tensor) -> "Rollout":
        """Some of the rows; where none are asked for, the first one with nothing in it to learn."""
        if len(rows):
            return Rollout(*(value[rows.to(value.device)] for value in vars(self).values()))
        first = {name: value[:1] for name, value in vars(self).items()}
        return Rollout(**first | {"mask": torch.zeros_like(first["mask"])})


@dataclass(frozen=True)
class RowTable:
    """Where each completion of the global batch is, the same on all processes.

    Attributes:
        owners: Rank of the process that has it, int64 `(N,)`, on the CPU.
        tokens: Number of its valid tokens, int64 `(N,)`, on the CPU.
        places: Its row on this process, -1 where another one has it, int64 `(N,)`, on the CPU.
    """

    owners: Tensor
    tokens: Tensor
    places: Tensor

    @classmethod
    def build(cls, rows: Tensor, mask: Tensor, num_rows: int) -> "RowTable":
        """Share the rows of all processes: `rows` are the global indices of this process's, `(B,)`.

        Raises:
            ValueError: If a completion is on no process or on several.
        """
        if len(rows) != len(mask):
            raise ValueError(
                f"rows has {len(rows)} entries for {len(mask)} completions. Give the global index of each."
            )
        table = torch.zeros(3, num_rows, dtype=torch.int64, device=mask.device)
        local = rows.to(mask.device)
        table[:, local] = torch.stack([torch.full_like(local, process_rank()), mask.sum(1), torch.ones_like(local)])
        owners, tokens, copies = summed(table).cpu()
        if (copies != 1).any():
            raise ValueError(
                f"rows must name each of the {num_rows} completions on exactly one process. Give the global index of "
                "each local one."
            )
        places = torch.full((num_rows,), -1)
        places[rows.cpu()] = torch.arange(len(rows))
        return cls(owners, tokens, places)


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step of one critic.

    Attributes:
        tokens: Number of valid tokens in it on all processes.
        parts: Rows of this process for each forward pass, at most `batch_size` each. As many as on any process, so
            that the collectives of sharded critics meet: some may be empty.
    """

    tokens: int
    parts: list[Tensor]


def mini_batches(own: Tensor, table: RowTable, batch_size: int, generator: torch.Generator) -> Iterator[MiniBatch]:
    """One pass over a critic's completions, in random order.

    A mini-batch is `batch_size` completions per process of the global order, whichever processes have them, so that
    the updates do not depend on how the rows are split. A mini-batch without a valid token is left out.

    Args:
        own: Global indices of the critic's completions, int64.
        table: Where they are.
        batch_size: Completions per process.
        generator: CPU generator, in the same state on all processes.
    """
    order = own[torch.randperm(len(own), generator=generator)]
    for chunk in order.split(batch_size * num_processes()):
        tokens, owners = int(table.tokens[chunk].sum()), table.owners[chunk]
        num_parts = -(-int(owners.bincount(minlength=1).max()) // batch_size)
        mine = table.places[chunk[owners == process_rank()]]
        if tokens:
            parts = [mine[start : start + batch_size] for start in range(0, num_parts * batch_size, batch_size)]
            yield MiniBatch(tokens, parts)
