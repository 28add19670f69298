"""The losses of the papers, written out token by token: what the trainer's gradients are compared with.

Nothing here comes from `trl_entropy` or from TRL's loss. Every function loops over plain Python indices, so that each
line can be held against the formula that it states. Tensors are float64 in the tests, entropies are in nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ENTROPY_FLOOR = 1e-8  # nats; arXiv 2512.05591 adds it to both entropies of the ratio


@dataclass
class Batch:
    """One micro-batch. `lp` and `entropy` are the leaves that gradients are taken with respect to."""

    lp: Tensor  # (B, T) log-probability of the sampled token under the policy being trained
    entropy: Tensor  # (B, T) entropy of that policy
    mask: Tensor  # (B, T) 1 where the model wrote a token that counts
    advantages: Tensor  # (B,) or (B, T)
    num_items: float  # valid tokens of the whole generation batch
    lp_old: Tensor | None = None  # (B, T); None: the rollout policy is the current one
    entropy_old: Tensor | None = None  # (B, T)
    lp_ref: Tensor | None = None  # (B, T)
    lp_sampling: Tensor | None = None  # (B, T) as reported by the inference engine
    engine_ratio: Tensor | None = None  # (B, T) or (B, 1) importance weight of the inference engine's mismatch
    rewards: Tensor | None = None  # (B,)
    num_correct_tokens: float = 0.0  # valid tokens of correct completions in the whole generation batch


@dataclass
class Settings:
    """Hyperparameters under the papers' names; `None` or 0 switches a part off."""

    loss_type: str = "dapo"
    level: str = "token"
    eps_lo: float = 0.2
    eps_hi: float = 0.2
    dual_clip: float | None = None
    erc: tuple[float, float] | None = None
    erc_floor: float = ENTROPY_FLOOR
    alphas: tuple[float, float] | None = None
    nll_coef: float = 0.0
    nll_min_reward: float = 1.0
    beta: float = 0.0
    kl_times_ratio: bool = False
    top_entropy_fraction: float = 1.0
    entropy_coef: float = 0.0
    off_policy_threshold: float | None = None
    max_completion_length: int = 1
    accumulation: int = 1  # micro-batches per optimizer step
    micro_batches_per_rollout: int = 1
    training: bool = True
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)  # for positive advantages, for the others


def loss(b: Batch, s: Settings) -> Tensor:
    """Loss of one micro-batch: policy, KL, entropy bonus and positive NLL, with TRL's aggregation. A scalar."""
    total = aggregate(token_losses(b, s), b, s)
    if s.entropy_coef:
        total = total - s.entropy_coef * entropy_bonus(b, s)
    if s.nll_coef:
        total = total + s.nll_coef * positive_nll(b, s)
    return total


def weighted_loss(b: Batch, s: Settings, weight: Callable[[int, int], float]) -> Tensor:
    """Policy loss of one micro-batch, each token's term times a constant of its own."""
    assert not s.beta
    return aggregate({(i, t): weight(i, t) * term for (i, t), term in token_losses(b, s).items()}, b, s)


def valid_tokens(b: Batch) -> list[tuple[int, int]]:
    return [(i, t) for i, row in enumerate(b.mask.tolist()) for t, valid in enumerate(row) if valid]


def advantage(b: Batch, i: int, t: int) -> float:
    return (b.advantages[i] if b.advantages.dim() == 1 else b.advantages[i, t]).item()


def ratio(b: Batch, s: Settings, i: int, t: int) -> Tensor:
    """r = pi / pi_old of one token, or of its whole sequence: the geometric mean over its valid tokens (GSPO).

    A token that ERC clips enters the ratio of its sequence as a constant.
    """
    old = b.lp.detach() if b.lp_old is None else b.lp_old
    if s.level == "token":
        return torch.exp(b.lp[i, t] - old[i, t])
    differences = []
    for u in [u for j, u in valid_tokens(b) if j == i]:
        constant = gates_the_ratio(s) and not keeps_gradient(b, s, i, u)
        differences.append((b.lp[i, u].detach() if constant else b.lp[i, u]) - old[i, u])
    return torch.exp(torch.stack(differences).mean())


def gates_the_ratio(s: Settings) -> bool:
    """Whether ERC acts on the ratio of a sequence rather than on each token's own term."""
    return s.level == "sequence" and s.loss_type != "cispo"


def policy_term(r: Tensor, a: float, s: Settings) -> Tensor:
    """Loss of one token with importance ratio `r` and advantage `a`."""
    if s.alphas is not None:
        return ce_gppo_term(r, a, s)
    if s.loss_type == "sapo":  # arXiv 2511.20347: a sigmoid instead of a clip
        temperature = s.sapo_temperatures[0] if a > 0 else s.sapo_temperatures[1]
        return -torch.sigmoid(temperature * (r - 1)) * 4 / temperature * a
    clipped = torch.clamp(r, 1 - s.eps_lo, 1 + s.eps_hi)
    if s.dual_clip is not None:
        r = torch.clamp(r, max=s.dual_clip)
    return -torch.min(r * a, clipped * a)


def ce_gppo_term(r: Tensor, a: float, s: Settings) -> Tensor:
    """Equation of CE-GPPO (arXiv 2509.20712), with the dual clip on negative advantages."""
    assert s.alphas is not None
    alpha1, alpha2 = s.alphas
    if a < 0 and r < 1 - s.eps_lo:
        return -alpha1 * (1 - s.eps_lo) * (r / r.detach()) * a
    if a > 0 and r > 1 + s.eps_hi:
        return -alpha2 * (1 + s.eps_hi) * (r / r.detach()) * a
    if a < 0 and s.dual_clip is not None and r > s.dual_clip:
        return -s.dual_clip * a * torch.ones_like(r)
    return -r * a


def keeps_gradient(b: Batch, s: Settings, i: int, t: int) -> bool:
    """ERC (arXiv 2512.05591): the entropy ratio of the token lies strictly inside the band."""
    if s.erc is None or b.entropy_old is None:
        return True
    new, old = b.entropy[i, t].item(), b.entropy_old[i, t].item()
    if new < ENTROPY_FLOOR and old < ENTROPY_FLOOR:
        return True  # two entropies of zero: their ratio is noise
    rho = (new + s.erc_floor) / (old + s.erc_floor)
    return s.erc[0] < rho < s.erc[1]


def off_policy_keep(b: Batch, s: Settings, i: int, t: int) -> bool:
    """DeepSeek-V3.2's sequence mask: drop a negative advantage in a sequence that has drifted from its sampler."""
    if s.off_policy_threshold is None or advantage(b, i, t) >= 0:
        return True
    sampler = b.lp_sampling if b.lp_sampling is not None else b.lp_old
    if sampler is None:
        return True
    drift = [(sampler[i, u] - b.lp[i, u]).item() for j, u in valid_tokens(b) if j == i]
    return sum(drift) / len(drift) <= s.off_policy_threshold


def high_entropy_tokens(b: Batch, s: Settings) -> set[tuple[int, int]]:
    """The valid tokens whose entropy is at or above the quantile (linear interpolation) of the micro-batch."""
    tokens = valid_tokens(b)
    if s.top_entropy_fraction >= 1.0 or not tokens:
        return set(tokens)
    values = sorted(b.entropy[i, t].item() for i, t in tokens)
    position = (1 - s.top_entropy_fraction) * (len(values) - 1)
    below, above = math.floor(position), math.ceil(position)
    threshold = values[below] + (position - below) * (values[above] - values[below])
    return {(i, t) for i, t in tokens if b.entropy[i, t].item() >= threshold}


def kl_term(b: Batch, s: Settings, i: int, t: int) -> Tensor:
    """k3 estimator of KL(pi || pi_ref), times the importance ratio where the bias correction is on."""
    assert b.lp_ref is not None
    d = b.lp_ref[i, t] - b.lp[i, t]
    kl = torch.exp(d) - d - 1
    return kl * ratio(b, s, i, t) if s.kl_times_ratio else kl


def token_losses(b: Batch, s: Settings) -> dict[tuple[int, int], Tensor]:
    """Policy and KL loss of every valid token, before aggregation."""
    losses, selected = {}, high_entropy_tokens(b, s)
    for i, t in valid_tokens(b):
        r, a = ratio(b, s, i, t), advantage(b, i, t)
        if s.loss_type == "cispo":  # arXiv 2506.13585: the clipped ratio is a constant weight
            term = -torch.clamp(r, max=s.eps_hi).detach() * a * b.lp[i, t]
        else:
            term = policy_term(r, a, s)
        if not gates_the_ratio(s) and not keeps_gradient(b, s, i, t):
            term = term.detach()
        if (i, t) not in selected or not off_policy_keep(b, s, i, t):
            term = term * 0.0
        if b.engine_ratio is not None:
            term = term * b.engine_ratio[i, t if b.engine_ratio.shape[1] > 1 else 0]
        if s.beta:
            term = term + s.beta * kl_term(b, s, i, t)
        losses[i, t] = term
    return losses


def gspo_token_loss(b: Batch, s: Settings) -> Tensor:
    """GSPO-token (arXiv 2507.18071, eq. 13) with the gate of ERC's authors: a clipped token's term is detached.

    Each token has a ratio of its own, whose value is that of its sequence: `sg(r_seq) lp / sg(lp)` in the exponent.
    """
    losses = {}
    for i, t in valid_tokens(b):
        r = ratio(b, s, i, t).detach() * torch.exp(b.lp[i, t] - b.lp[i, t].detach())
        term = policy_term(r, advantage(b, i, t), s)
        losses[i, t] = term if keeps_gradient(b, s, i, t) else term.detach()
        if s.beta:
            losses[i, t] = losses[i, t] + s.beta * kl_term(b, s, i, t)
    return aggregate(losses, b, s)


def aggregate(losses: dict[tuple[int, int], Tensor], b: Batch, s: Settings) -> Tensor:
    """TRL's reduction of the per-token losses of one micro-batch, by loss type."""
    rows = b.mask.shape[0]
    row_sums = [torch.zeros((), dtype=b.lp.dtype) for _ in range(rows)]
    for (i, _), term in losses.items():
        row_sums[i] = row_sums[i] + term
    total = torch.stack(row_sums).sum()
    accumulation = s.accumulation if s.training else 1
    if s.loss_type in ("grpo", "sapo"):
        lengths = [sum(1 for j, _ in losses if j == i) for i in range(rows)]
        means = [row_sum / max(length, 1) for row_sum, length in zip(row_sums, lengths, strict=True)]
        return torch.stack(means).mean() / accumulation
    if s.loss_type == "bnpo":
        return total / max(len(losses), 1) / accumulation
    if s.loss_type == "dr_grpo":
        return total / (rows * s.max_completion_length) / accumulation
    if s.loss_type == "luspo":
        return total / rows / accumulation
    if s.loss_type in ("dapo", "cispo"):
        return total / tokens_per_optimizer_step(b.num_items, s)
    raise ValueError(f"No reference for loss_type={s.loss_type!r}.")


def tokens_per_optimizer_step(tokens_per_rollout: float, s: Settings) -> float:
    """Share of a count over the generation batch that falls to one accumulation window (one process)."""
    tokens = max(tokens_per_rollout, 1.0)
    return tokens * s.accumulation / s.micro_batches_per_rollout if s.training else tokens


def entropy_bonus(b: Batch, s: Settings) -> Tensor:
    """Mean entropy of the tokens that the policy loss acts on."""
    selected = sorted(high_entropy_tokens(b, s))
    values = [b.entropy[i, t] for i, t in selected]
    total = torch.stack(values).sum() if values else torch.zeros((), dtype=b.lp.dtype)
    return total / max(len(values), 1) / (s.accumulation if s.training else 1)


def positive_nll(b: Batch, s: Settings) -> Tensor:
    """Token mean of the negative log-likelihood of the correct completions (Klear-Reasoner, arXiv 2508.07629)."""
    assert b.rewards is not None
    terms = [-b.lp[i, t] for i, t in valid_tokens(b) if b.rewards[i] >= s.nll_min_reward]
    total = torch.stack(terms).sum() if terms else torch.zeros((), dtype=b.lp.dtype)
    return total / tokens_per_optimizer_step(b.num_correct_tokens, s)
