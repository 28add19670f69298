"""Rewards and advantages of single tokens, from a reward function or from a rollout function.

TRL's rewards are one per completion. Here a reward function may return a dict: its rewards as TRL wants them under
`"rewards"`, and beside them one of

- `"token_rewards"`: per completion a list with one number per token of it, `r_{i,t}`, or `None` for no such rewards.
  What follows a token is credited to it: its advantage is

      A_{i,t} = A_i + G_{i,t} - mean over the completions j of the group of G_{j,0},   G_{i,t} = sum of r_{i,s}, s >= t

  where `A_i` is the completion's advantage from the rewards, with TRL's normalisation. Token rewards themselves are
  neither discounted nor divided by a standard deviation, and are no part of the rewards that TRL logs and that
  controls read. A reward at the last token alone is then what the same reward is to TRL with `scale_rewards="none"`.
- `"token_advantages"`: likewise, but they are the advantages, whatever the rewards: no group takes part.

A rollout function may return a field of one of these names. In place of the lists, both may give a tensor or an array
`(B, T)`, of whose rows what is beyond the completion's tokens is not read. Token rewards of several functions are
added up, weighted by `reward_weights` (a rollout function's by 1). Tokens that the model did not write, such as a
tool's answers, have their place in the lists, and what is said of them does not count.
"""

import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..controls import Context
from ..controls.control import LINEAR_LOSSES
from ..controls.selection import own_rows

FIELDS = ("token_rewards", "token_advantages")


@dataclass(frozen=True)
class TokenValues:
    """What one function says of the tokens of this process's completions.

    Attributes:
        name: Of `FIELDS`.
        source: The function, for an error.
        weight: Of token rewards.
        rows: Per completion one number per token, or `None`; or a tensor or an array `(B, T)`.
    """

    name: str
    source: str
    weight: float
    rows: Any

    def collated(self, like: Tensor, completion_ids: Sequence[Any]) -> Tensor:
        """`(B, T)` with the numbers of each completion from the left, 0 elsewhere; `like` is such a tensor.

        Raises:
            ValueError: If a completion's numbers are not as many as its tokens, in a tensor at least as many, or are
                not finite.
        """
        where = f"{self.name} of {self.source}"
        padded = hasattr(self.rows, "ndim")
        if padded and self.rows.ndim != 2:
            shape = tuple(self.rows.shape)
            raise ValueError(f"{where} has the shape {shape}; give (completions, tokens), or a list per completion.")
        if len(self.rows) != len(completion_ids):
            raise ValueError(f"{where}: {len(self.rows)} lists for {len(completion_ids)} completions; give one each.")
        values = torch.zeros_like(like)
        for index, (row, ids) in enumerate(zip(self.rows, completion_ids, strict=True)):
            if row is None and self.name == "token_rewards":
                continue
            row = row[: len(ids)].tolist() if padded else row
            numbers = [] if row is None else [float(one) for one in row]
            if row is None or len(numbers) != len(ids):
                given = "none" if row is None else f"{len(numbers)}"
                raise ValueError(
                    f"{where}: completion {index} has {len(ids)} tokens and {given} of its numbers are given. Give "
                    "one per token of `completion_ids`, those that the model did not write included."
                )
            if bad := [place for place, one in enumerate(numbers) if not math.isfinite(one)]:
                raise ValueError(f"{where}: {numbers[bad[0]]} at token {bad[0]} of completion {index} is not finite.")
            values[index, : len(numbers)] = values.new_tensor(numbers)
        return values


def is_whole(row: Any) -> bool:
    """Whether what stands in a completion's row is of all completions: a tensor or an array, or a tuple of lists."""
    return getattr(row, "ndim", 0) > 1 or (isinstance(row, tuple) and any(hasattr(one, "__len__") for one in row))


class TokenCollector:
    """Takes what functions say of single tokens out of what they return."""

    def __init__(self) -> None:
        self.found: list[TokenValues] = []

    def watch(self, function: Any, source: str, weight: float) -> Any:
        """A reward function that returns TRL's rewards alone; a model is left as it is."""
        if isinstance(function, nn.Module) or not callable(function):
            return function
        called = function
        while isinstance(called, functools.partial):
            called = called.func
        if inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(type(called).__call__):

            @functools.wraps(function, updated=())
            async def watched_async(*args: Any, **kwargs: Any) -> Any:
                return self.take(await function(*args, **kwargs), source, weight)

            return watched_async

        @functools.wraps(function, updated=())
        def watched(*args: Any, **kwargs: Any) -> Any:
            return self.take(function(*args, **kwargs), source, weight)

        return watched

    def take(self, returned: Any, source: str, weight: float) -> Any:
        """The rewards of what a function returned, the rest of which is kept."""
        if not isinstance(returned, dict):
            return returned
        if "rewards" not in returned or not returned.keys() <= {"rewards", *FIELDS}:
            found = ", ".join(map(repr, returned))
            raise ValueError(
                f"{source} returned a dict with {found}: it must have 'rewards', one per completion, and may have "
                f"{' or '.join(map(repr, FIELDS))}."
            )
        self._keep(returned, source, weight)
        return returned["rewards"]

    def take_from(self, inputs: Sequence[dict[str, Any]], source: str) -> None:
        """What a rollout function says, from the fields that TRL has put into the rows."""
        fields = {name: [row.get(name) for row in inputs] for name in FIELDS if any(name in row for row in inputs)}
        # TRL puts a row of a list into each of its rows, and what is no list as a whole
        whole = {name: rows[0] for name, rows in fields.items() if is_whole(rows[0])}
        self._keep(fields | whole, source, 1.0)

    def _keep(self, fields: dict[str, Any], source: str, weight: float) -> None:
        for name in FIELDS:
            if fields.get(name) is not None:
                self.found.append(TokenValues(name, source, weight, fields[name]))


def summed_rewards(found: Sequence[TokenValues], mask: Tensor, dtype: torch.dtype, ids: Sequence[Any]) -> Tensor:
    """The weighted sum of token rewards, `(B, T)`, 0 where `mask` is False.

    Raises:
        ValueError: From `TokenValues.collated`.
    """
    like = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    rewards = torch.stack([values.weight * values.collated(like, ids) for values in found]).sum(0)
    return torch.where(mask, rewards, 0.0)


def credited(advantages: Tensor, rewards: Tensor, mask: Tensor, context: Context) -> Tensor:
    """Advantages of completions and rewards of their tokens, as advantages of the tokens.

    Args:
        advantages: Of the completions, `(B,)`, or already per token, `(B, T)`.
        rewards: Of the tokens, `(B, T)`, 0 where `mask` is False.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        context: Of the trainer: `gather` and `group_size`.

    Returns:
        `A_i + G_{i,t} - mean_j G_{j,0}`, `(B, T)`, 0 where `mask` is False.
    """
    to_go = rewards.flip(1).cumsum(1).flip(1)
    totals = context.gather(to_go[:, 0]).view(-1, context.group_size)  # a group may be spread over processes
    baseline = own_rows(totals.mean(1, keepdim=True).expand_as(totals).flatten(), len(mask)).unsqueeze(1)
    of_completion = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    return torch.where(mask, of_completion + to_go - baseline, 0.0)


def check_token_level(found: Sequence[TokenValues], loss_type: str, others: str) -> None:
    """Refuse what rewards and advantages of single tokens cannot be combined with.

    Args:
        found: At least one.
        loss_type: TRL's.
        others: What else sets the advantages, in words; empty for nothing.

    Raises:
        ValueError: Names the field, its source and what to leave out.
    """
    where = f"{found[0].name} of {found[0].source}"
    if loss_type not in LINEAR_LOSSES:
        raise ValueError(
            f"{where} cannot be used with loss_type={loss_type!r}, which weighs whole completions by one advantage. "
            f"Set loss_type to one of {', '.join(LINEAR_LOSSES)}."
        )
    if others:
        raise ValueError(f"{where} cannot be used with {others}, which sets the advantages. Leave one of the two out.")
    if len(found) > 1 and any(values.name == "token_advantages" for values in found):
        given = " and ".join(f"{values.name} of {values.source}" for values in found)
        raise ValueError(f"{given}: token advantages are the advantages as they are. Give them alone.")
