"""Advantages and returns of the tokens that the model wrote, from the critics' values.

`B` completions, `T` completion tokens. A value belongs to a state: `state_values[:, t]` is that of the state before
completion token `t`, and `state_values[:, T]` that of the state after the last column: `(B, T + 1)` in all.

In a multi-turn completion the observations between two turns are part of the transition: the next state of a turn's
last token is the one before the next turn's first token. Nothing is learnt about states inside an observation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """Completions with their rewards and the values of their states, as advantages and returns are made of them.

    Attributes:
        state_values: Values of the states, `(B, T + 1)`.
        rewards: Total reward of each completion, `(B,)`.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        ends: Number of tokens of each completion, observations included, int64 `(B,)`.
        truncated: True for the completions that were cut off rather than finished, bool `(B,)`.
        token_rewards: Rewards of the tokens that the model wrote, beside that of the completion, `(B, T)`; `None` for
            none.

    Raises:
        ValueError: If the shapes do not fit each other.
    """

    state_values: Tensor
    rewards: Tensor
    mask: Tensor
    ends: Tensor
    truncated: Tensor
    token_rewards: Tensor | None = None

    def __post_init__(self) -> None:
        rows, tokens = self.mask.shape
        shapes = {name: tuple(getattr(self, name).shape) for name in ("rewards", "ends", "truncated")}
        if self.state_values.shape != (rows, tokens + 1) or any(shape != (rows,) for shape in shapes.values()):
            found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(
                f"For a mask of shape {(rows, tokens)}, state_values must be {(rows, tokens + 1)}, one per state, and "
                f"rewards, ends and truncated {(rows,)}; got state_values {tuple(self.state_values.shape)}, {found}."
            )


def generalized_advantages(episodes: Episodes, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation over the tokens that the model wrote (arXiv 1506.02438, eq. 16).

    `delta_t = reward_t + gamma V_next(t) - V_t` and `A_t = delta_t + gamma lam A_next(t)`, where `next(t)` is the next
    token that the model wrote. The reward is given at the last of them. Its next state is worth 0, or, in a truncated
    completion, the value of the state in which it was cut off.

    Args:
        episodes: `B` completions of up to `T` tokens.
        gamma: Discount per token that the model wrote, in [0, 1].
        lam: Lambda of GAE, in [0, 1].

    Returns:
        Advantages, 0 where `mask` is False, `(B, T)`.
    """
    values, mask, ends = episodes.state_values, episodes.mask, episodes.ends
    last_states = torch.where(episodes.truncated, values.gather(1, ends.unsqueeze(1)).squeeze(1), 0.0)
    next_written = _next_written(mask)
    next_values = torch.cat([values[:, :-1], last_states.unsqueeze(1)], dim=1).gather(1, next_written)
    is_last = mask & (next_written == mask.shape[1])
    given = torch.where(is_last, episodes.rewards.unsqueeze(1), 0.0)
    if episodes.token_rewards is not None:
        given = given + episodes.token_rewards
    deltas = torch.where(mask, given + gamma * next_values - values[:, :-1], 0.0)
    # an observation hands on what follows it, undiscounted
    decay = torch.ones_like(deltas).masked_fill(mask, gamma * lam)
    return torch.where(mask, _discounted_sums(deltas, decay), 0.0)


def critic_targets(episodes: Episodes, *, gamma: float, lam: float) -> Tensor:
    """Lambda-returns `R_t = A_t + V_t` that the critics learn; with `lam=1` the Monte-Carlo return of the paper
    where no completion is marked as truncated.

    Args:
        episodes: `B` completions of up to `T` tokens.
        gamma: Discount per token that the model wrote, in [0, 1].
        lam: The critics' lambda, in [0, 1].

    Returns:
        Returns, 0 where `mask` is False, `(B, T)`.
    """
    advantages = generalized_advantages(episodes, gamma=gamma, lam=lam)
    return torch.where(episodes.mask, advantages + episodes.state_values[:, :-1], 0.0)


def whiten(advantages: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over the valid tokens of the global batch.

    Advantages that are all equal, a single one included, become 0.

    Args:
        advantages: `(B, T)`.
        mask: True for valid tokens, bool `(B, T)`.
        reduce: Sums a small tensor over the processes.

    Returns:
        `(B, T)`, 0 where `mask` is False.
    """
    wide = _wide(advantages)
    count, total = reduce(_sums(mask, torch.ones_like(wide), wide)).unbind()
    centred = wide - total / count.clamp(min=1)
    variance = reduce(_sums(mask, centred.square())).squeeze(0) / count.clamp(min=1)
    # 1e-8 as in TRL's PPO: it keeps rounding errors small where the variance is nothing else
    return torch.where(mask, centred * (variance + 1e-8).rsqrt(), 0.0).to(advantages.dtype)


def explained_variance(
    state_values: Tensor, targets: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor]
) -> float:
    """`1 - Var(targets - state_values) / Var(targets)` over the valid tokens of the global batch; 1 is perfect.

    Args:
        state_values: Of the states before each token, `(B, T)`.
        targets: Returns, `(B, T)`.
        mask: True for valid tokens, bool `(B, T)`.
        reduce: Sums a small tensor over the processes.

    Returns:
        At most 1; negative for a critic worse than a constant; NaN where the targets do not vary or there are none.
    """
    target, value = _wide(targets), _wide(state_values)
    error = target - value
    sums = reduce(_sums(mask, torch.ones_like(target), target, error))
    count, target_mean, error_mean = sums[0].clamp(min=1), *(sums[1:] / sums[0].clamp(min=1))
    deviations = (target - target_mean).square(), (error - error_mean).square()
    squares = reduce(_sums(mask, *deviations, (mask.shape[1] * value).square()))
    # equal targets have a variance of rounding errors: their own, and those of `A + V` over the tokens of a completion
    scale = count * target_mean.square() + squares[2]
    if squares[0] <= torch.finfo(torch.float32).eps ** 2 * scale:
        return math.nan
    return (1.0 - squares[1] / squares[0]).item()


def _next_written(mask: Tensor) -> Tensor:
    """Index of the next token that the model wrote after each token, `T` where there is none; int64 `(B, T)`."""
    tokens = mask.shape[1]
    positions = torch.arange(tokens, device=mask.device).expand_as(mask).masked_fill(~mask, tokens)
    from_here_on = positions.flip(1).cummin(1).values.flip(1)
    return torch.nn.functional.pad(from_here_on[:, 1:], (0, 1), value=tokens)


def _discounted_sums(deltas: Tensor, decay: Tensor) -> Tensor:
    """`A_t = delta_t + decay_t A_{t+1}` by doubling: after each step `A_t` covers twice as many tokens; `(B, T)`."""
    sums, reach = deltas, 1
    while reach < deltas.shape[1]:
        # beyond the last token there is nothing to add
        sums = sums + decay * torch.nn.functional.pad(sums[:, reach:], (0, reach))
        decay = decay * torch.nn.functional.pad(decay[:, reach:], (0, reach))
        reach *= 2
    return sums


def _wide(values: Tensor) -> Tensor:
    """In float64 where the device has it: sums over millions of tokens."""
    return values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)


def _sums(mask: Tensor, *values: Tensor) -> Tensor:
    """Sum of each tensor over the tokens where `mask` is True, `(len(values),)`."""
    return torch.stack([torch.where(mask, value, 0.0).sum() for value in values])
