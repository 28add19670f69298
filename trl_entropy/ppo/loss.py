"""The losses of one micro-batch, operation for operation those of TRL's PPOTrainer, as functions of tensors.

`B` responses, `T` response tokens.
"""

import torch
from torch import Tensor
from trl.experimental.ppo.ppo_trainer import masked_mean

from ..controls import PolicyTokens


def token_entropies(logits: Tensor) -> Tensor:
    """Entropy of the policy at each token, nats, `(B, T)`, in float32 at least.

    A token that generation has ruled out, with a logit of minus infinity, counts with probability 0.

    Args:
        logits: Divided by the temperature, `(B, T, V)`.
    """
    return torch.stack([_entropies(row) for row in logits])  # row by row: two copies of all logits would be much


def _entropies(logits: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # 0 rather than a huge number: a gradient times that would overflow
    weighted = torch.softmax(logits, dim=-1) * logits.masked_fill(logits == -torch.inf, 0.0)
    return torch.logsumexp(logits, dim=-1) - weighted.sum(-1)


def clipped_terms(tokens: PolicyTokens, cliprange: float) -> tuple[Tensor, Tensor]:
    """`-A r` and `-A clip(r, 1 - cliprange, 1 + cliprange)`, the larger of which PPO minimises (arXiv 1707.06347).

    Args:
        tokens: The micro-batch; `logps` with their graph.
        cliprange: Half-width of the clip range.

    Returns:
        Two `(B, T)`.
    """
    ratio = torch.exp(tokens.logps - tokens.old_logps)
    clipped = torch.clamp(ratio, 1.0 - cliprange, 1.0 + cliprange)
    return -tokens.advantages * ratio, -tokens.advantages * clipped


def policy_loss(tokens: PolicyTokens, cliprange: float) -> Tensor:
    """PPO-clip: the mean over the micro-batch's valid tokens of the larger of the two `clipped_terms`, 0-dim."""
    return masked_mean(torch.max(*clipped_terms(tokens, cliprange)), tokens.mask)


@torch.no_grad()
def policy_statistics(tokens: PolicyTokens, entropies: Tensor, cliprange: float) -> dict[str, Tensor]:
    """What TRL's PPOTrainer reports of a micro-batch's policy, 0-dim each; `tokens` as no control has shaped them."""
    difference = tokens.logps - tokens.old_logps
    unclipped, clipped = clipped_terms(tokens, cliprange)
    return {
        "policy/approxkl_avg": 0.5 * (difference**2).mean(),
        "policy/clipfrac_avg": masked_mean((clipped > unclipped).float(), tokens.mask),
        "policy/entropy_avg": entropies.mean(),
        "val/ratio": torch.exp(difference).mean(),
    }


def value_loss(
    predicted: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """Half the mean squared error of the values, each kept within `cliprange` of the rollout's where that is worse.

    Args:
        predicted: Values with their graph, `(B, T)`.
        old_values: Values at the time of the rollout, `(B, T)`.
        returns: Targets, `(B, T)`.
        mask: True where a value is learnt, bool `(B, T)`.
        cliprange: TRL's `cliprange_value`.

    Returns:
        The loss, and the share of the values that were clipped; 0-dim both.
    """
    within = torch.clamp(predicted, old_values - cliprange, old_values + cliprange)
    errors, clipped_errors = torch.square(predicted - returns), torch.square(within - returns)
    loss = 0.5 * masked_mean(torch.max(errors, clipped_errors), mask)
    return loss, masked_mean((clipped_errors > errors).float(), mask).detach()
