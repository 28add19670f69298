"""The critics together: values, shards, training, saving (AsyPPO, arXiv 2510.01656)."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .batches import MiniBatch, Rollout, RowTable, mini_batches
from .checkpoint import read_critics, write_critics
from .optimizer import CriticOptimizer
from .processes import maximum, num_processes, shard, summed
from .sharding import assign_shards
from .value_model import state_values


class CriticEnsemble:
    """Critics that train on disjoint shards of every prompt's completions, each with its own AdamW.

    On one process the critics are plain modules. With several processes in `torch.distributed` each critic is sharded
    over them with FSDP2, transformer block by transformer block, whatever the policy uses; on the CPU with gloo too.
    Every method but `assign` must then be called on all processes together.

    Args:
        critics: From `load_critic`; sizes may differ. They are moved to the device.
        learning_rate: Of every critic, constant.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: Largest norm of a critic's gradient; 0 leaves it as it is.
        device: Where they live.
        seed: Of the shards and of the order of the mini-batches; the same on all processes.
        autocast_dtype: Compute in this dtype by autocast; `None` computes in that of the weights. For bfloat16 weights
            load the critics with `dtype=torch.bfloat16`: the optimizer then keeps float32 copies.

    Raises:
        ValueError: If there is no critic, or if two share weights.
    """

    def __init__(
        self,
        critics: Sequence[nn.Module],
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        device: torch.device | str,
        seed: int,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        _check_separate(critics)
        self.device = torch.device(device)
        self.critics = [shard(critic, self.device).eval() for critic in critics]
        self._optimizers = [
            CriticOptimizer(
                critic, learning_rate=learning_rate, weight_decay=weight_decay, max_grad_norm=max_grad_norm
            )
            for critic in self.critics
        ]
        self._generator = torch.Generator().manual_seed(seed)
        self._autocast_dtype = autocast_dtype

    def __len__(self) -> int:
        """Number of critics."""
        return len(self.critics)

    @torch.no_grad()
    def state_values(
        self, input_ids: Tensor, attention_mask: Tensor, num_completion_tokens: int, batch_size: int
    ) -> Tensor:
        """Every critic's values of the states, `batch_size` rows at a time.

        Args:
            input_ids: Prompts padded on the left and completions padded on the right, `(B, P + T)`.
            attention_mask: 1 where there is a token, `(B, P + T)`.
            num_completion_tokens: `T`.
            batch_size: Rows of one forward pass.

        Returns:
            Float32 `(M, B, T + 1)`: of the states from before the first completion token to after the last, 0 where
            there is no token.
        """
        starts = range(0, len(input_ids), batch_size)
        # sharded critics need as many forward passes on every process: the surplus ones repeat the first rows
        surplus = [0] * (maximum(len(starts), self.device) - len(starts))
        found = []
        for critic in self.critics:
            chunks = []
            for start in [*starts, *surplus]:
                rows = slice(start, start + batch_size)
                with self._autocast():
                    chunks.append(state_values(critic, input_ids[rows], attention_mask[rows], num_completion_tokens))
            found.append(torch.cat(chunks[: len(starts)]))
        return torch.stack(found)

    def assign(self, group_sizes: Sequence[int]) -> Tensor:
        """The critic of each completion of the global batch, int64 `(N,)`; see `assign_shards`.

        Args:
            group_sizes: Number of completions of each prompt of the global batch.

        Raises:
            ValueError: If a prompt has fewer completions than there are critics.
        """
        return assign_shards(group_sizes, len(self), self._generator)

    def train_on(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        targets: Tensor,
        critic_of_row: Tensor,
        rows: Tensor,
        *,
        epochs: int,
        batch_size: int,
    ) -> dict[str, float]:
        """Train every critic on its own completions: the mean over valid tokens of `(V - R)^2`.

        A mini-batch is `batch_size x processes` completions of a critic's share of the global batch, so two processes
        make the updates of one with twice the batch size.

        Args:
            input_ids: This process's rows, `(B, P + T)`; `B`, `P` and `T` may differ between processes.
            attention_mask: `(B, P + T)`.
            mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
            targets: Returns, `(B, T)`.
            critic_of_row: From `assign`, the same on all processes, `(N,)`.
            rows: Index of each of this process's rows in the global batch, `(B,)`.
            epochs: Passes over the shares.
            batch_size: Completions per process in a mini-batch, and at most in one forward pass.

        Returns:
            `critic_<m>/loss`, the mean over the passes before each update, and `critic_<m>/grad_norm`, before
            clipping; without those of a critic that had no valid token.

        Raises:
            ValueError: If `rows` does not name each completion once over all processes.
        """
        table = RowTable.build(rows, mask, len(critic_of_row))
        rollout = Rollout(input_ids, attention_mask, mask, targets)
        metrics: dict[str, float] = {}
        for index in range(len(self)):
            own = (critic_of_row.cpu() == index).nonzero().flatten()
            batches = [batch for _ in range(epochs) for batch in mini_batches(own, table, batch_size, self._generator)]
            if batches:
                errors, norms = zip(*(self._update(index, rollout, batch) for batch in batches), strict=True)
                loss = summed(torch.stack(errors).sum()) / sum(batch.tokens for batch in batches)
                metrics[f"critic_{index}/loss"] = loss.item()
                metrics[f"critic_{index}/grad_norm"] = torch.stack(norms).mean().item()
        return metrics

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `critic_<m>/`, which plain `from_pretrained` loads, and `state_<m>.pt` for each critic.

        The folder appears under its name when all of it is written: a process killed before leaves the former one.

        Args:
            folder: Replaced if it exists.
        """
        write_critics(folder, self.critics, self._optimizers, self._generator)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continue exactly from what `save` wrote, on any number of processes.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it holds other critics.
        """
        read_critics(folder, self._optimizers, self._generator)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast_dtype)

    def _update(self, index: int, rollout: Rollout, batch: MiniBatch) -> tuple[Tensor, Tensor]:
        """One step of one critic: this process's sum of squared errors, and the gradient's norm."""
        critic, errors = self.critics[index], torch.zeros((), device=self.device)
        critic.train()
        for part in batch.parts:
            rows = rollout.select(part)
            with self._autocast():
                predicted = state_values(critic, rows.input_ids, rows.attention_mask, rows.mask.shape[1])
            difference = torch.where(rows.mask, predicted[:, :-1] - rows.targets, 0.0)
            error = difference.square().sum()
            # FSDP averages over the processes, and the loss is a mean over all their tokens
            (error * (num_processes() / batch.tokens)).backward()
            errors += error.detach()
        critic.eval()
        return errors, self._optimizers[index].step()


def _check_separate(critics: Sequence[nn.Module]) -> None:
    if not critics:
        raise ValueError("critics is empty: give at least one.")
    owners: dict[int, int] = {}
    for index, critic in enumerate(critics):
        for value in critic.parameters():
            if owners.setdefault(id(value), index) != index:
                raise ValueError(
                    f"Critics {owners[id(value)]} and {index} share weights. Load each of them anew, or copy one."
                )
