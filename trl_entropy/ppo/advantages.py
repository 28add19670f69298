"""Rewards of the tokens and generalised advantages, operation for operation those of TRL's PPOTrainer.

`B` responses, `T` response tokens. The score of a response is the reward of the position after its last token, where
there is one, so values are learnt up to that position and log-probs up to the one before.
"""

import torch
from torch import Tensor


def padding_masks(sequence_lengths: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """True after the last token of each response, and True after the position that follows it.

    Args:
        sequence_lengths: Index of each response's last token, -1 for an empty one, int64 `(B,)`.
        num_tokens: `T`.

    Returns:
        Two bool `(B, T)`.
    """
    positions = torch.arange(num_tokens, device=sequence_lengths.device).expand(len(sequence_lengths), -1)
    last = sequence_lengths.unsqueeze(1)
    return positions > last, positions > last + 1


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate of each token's KL from the reference: `k1` is `lp - lp_ref`, `k3` is `exp(d) - 1 - d` with `d = -k1`.

    Args:
        logprobs: `(B, T)`.
        ref_logprobs: `(B, T)`.
        estimator: `"k1"` or `"k3"` (http://joschu.net/blog/kl-approx.html).

    Returns:
        Nats, `(B, T)`.
    """
    difference = ref_logprobs - logprobs
    return -difference if estimator == "k1" else (difference.exp() - 1) - difference


def token_rewards(non_score_reward: Tensor, scores: Tensor, sequence_lengths: Tensor) -> Tensor:
    """Add each response's score to the reward of the position after its last token, or of the last one there is.

    Args:
        non_score_reward: KL penalty, `(B, T)`.
        scores: `(B,)`.
        sequence_lengths: Index of each response's last token, int64 `(B,)`.

    Returns:
        `(B, T)`.
    """
    rewards = non_score_reward.clone()
    after = sequence_lengths + 1
    ends = torch.where(after < rewards.size(1), after, sequence_lengths)
    rewards[torch.arange(rewards.size(0), device=rewards.device), ends] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages (arXiv 1506.02438, eq. 16) with a reward at every position and 0 after the last one.

    Args:
        rewards: `(B, T)`.
        values: Value of the state before each token, 0 where there is none, `(B, T)`.
        gamma: Discount.
        lam: Lambda.

    Returns:
        `(B, T)`.
    """
    running: Tensor | float = 0
    found = []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = delta + gamma * lam * running
        found.append(running)
    return torch.stack(found[::-1], dim=1)
