"""The controls' losses on the samples of asynchronous training, token by token, with no code of the package.

A batch is a list of `Token`s, of all samples. `LOSSES` has for each control the fields that switch it on and its loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

EPS, EPS_HIGH = 0.2, 0.28


@dataclass(frozen=True)
class Token:
    """A trained token.

    Attributes:
        sample: Index of its sample.
        place: Its place in the sample.
        lp: Log-prob under the policy being trained, with its graph.
        entropy: Of that policy, with its graph.
        old: Log-prob that the server recorded.
        old_entropy: Entropy under the weights that the sample is tagged with.
        a: Advantage.
        reward: Of the sample.
    """

    sample: int
    place: int
    lp: Tensor
    entropy: Tensor
    old: float
    old_entropy: float
    a: float
    reward: float

    @property
    def r(self) -> float:
        return math.exp(self.lp.item() - self.old)


def surrogate(t: Token, a: float | None = None) -> Tensor:
    """PPO's clipped loss with another advantage."""
    a, r = t.a if a is None else a, torch.exp(t.lp - t.old)
    return -torch.min(r * a, r.clamp(1 - EPS, 1 + EPS_HIGH) * a)


def below(t: Token) -> bool:
    return t.a < 0 and t.r < 1 - EPS


def above(t: Token) -> bool:
    return t.a > 0 and t.r > 1 + EPS_HIGH


def mean_entropy(tokens: list[Token]) -> float:
    return sum(t.entropy.item() for t in tokens) / len(tokens)


def weighted(weight: Callable[[Token, list[Token]], float]) -> Callable[[list[Token]], Tensor]:
    """PPO's loss with a weight for each token."""
    return lambda tokens: sum(weight(t, tokens) * surrogate(t) for t in tokens) / len(tokens)


def ce_gppo(t: Token, alpha1: float, alpha2: float) -> Tensor:
    one = torch.exp(t.lp - t.lp.item())
    if below(t):
        return -alpha1 * (1 - EPS) * one * t.a
    if above(t):
        return -alpha2 * (1 + EPS_HIGH) * one * t.a
    return surrogate(t)


def ce_gppo_loop(tokens: list[Token]) -> Tensor:
    actuator = min(max(0.05 * (mean_entropy(tokens) - 9.0), -1.0), 1.0)
    return sum(ce_gppo(t, 0.75 * (1 + actuator), 0.9 * (1 - actuator)) for t in tokens) / len(tokens)


def erc(t: Token, tokens: list[Token]) -> float:
    ratio = (t.entropy.item() + 1e-8) / (t.old_entropy + 1e-8)
    return float(0.8 < ratio < 1.3)


def entropy_advantage(tokens: list[Token]) -> Tensor:
    return sum(surrogate(t, t.a + min(0.4 * t.entropy.item(), abs(t.a) / 2)) for t in tokens) / len(tokens)


def dppo(tokens: list[Token]) -> Tensor:
    def term(t: Token) -> Tensor:
        p, q = math.exp(t.lp.item()), math.exp(t.old)
        far = abs(p - q) > 0.05 and (p - q) * t.a > 0
        return -torch.exp(t.lp - t.lp.item()) * (0.0 if far else min(t.r, 1.5) * t.a)

    return sum(map(term, tokens)) / len(tokens)


def entropic(t: Token, tokens: list[Token]) -> float:
    actuator = min(max(0.05 * (mean_entropy(tokens) - 9.0), -1.0), 1.0)
    return 1 + actuator * math.copysign(1, t.a) if math.exp(t.lp.item()) > 0.1 else 1.0


def stare(t: Token, tokens: list[Token]) -> float:
    side = sorted((u.lp.item(), i) for i, u in enumerate(tokens) if u.a * t.a > 0)
    chosen = {i for _, i in side[: math.ceil(0.3 * len(side))]}
    return (1.1 if t.a > 0 else 0.9) if tokens.index(t) in chosen else 1.0


def steer(t: Token, tokens: list[Token]) -> float:
    def change(u: Token, r: float) -> float:
        lp = u.lp.item()
        return abs(r * u.a * (1 - math.exp(lp)) * (lp + u.entropy.item()))

    largest = max(0.02, *(change(u, 1.0) for u in tokens))
    return 0.7 ** min(1.0, change(t, t.r) / largest)


def fipo(t: Token, tokens: list[Token]) -> float:
    ahead = [u for u in tokens if u.sample == t.sample and u.place >= t.place and u.r <= 10]
    future = sum(2 ** (-(u.place - t.place) / 2) * (u.lp.item() - u.old) for u in ahead)
    weight = min(max(math.exp(future), 1.0), 1.2)
    return min(weight, 1.0) if t.a < 0 and t.r > 4 else weight


def covariance(t: Token, tokens: list[Token]) -> float:
    mean_a, mean_lp = (sum(values) / len(tokens) for values in ([u.a for u in tokens], [u.lp.item() for u in tokens]))
    return (t.a - mean_a) * (t.lp.item() - mean_lp)


def clip_cov(t: Token, tokens: list[Token]) -> float:
    """With a fraction of 1 all candidates are dropped, whatever their lots."""
    return 0.0 if 0.1 < covariance(t, tokens) < 1.0 else 1.0


def kl_cov(tokens: list[Token]) -> Tensor:
    ranked = sorted(range(len(tokens)), key=lambda i: -covariance(tokens[i], tokens))
    chosen = ranked[: max(1, int(0.2 * len(tokens)))]
    terms = [-torch.exp(t.lp - t.old) * t.a for t in tokens]
    return (sum(terms) + sum((tokens[i].lp - tokens[i].old).abs() for i in chosen)) / len(tokens)


def epo(tokens: list[Token]) -> Tensor:
    """At the second RL step of four, after one with the same entropies."""
    history, bonus, smooth = mean_entropy(tokens), [], []
    for _, of_sample in groupby(tokens, lambda t: t.sample):
        turns: list[list[Token]] = []
        for t in of_sample:
            if turns and turns[-1][-1].place == t.place - 1:
                turns[-1].append(t)
            else:
                turns.append([t])
        outside = [
            [0.1 * (torch.relu(0.8 * history - t.entropy) + torch.relu(t.entropy - 1.2 * history)) for t in turn]
            for turn in turns
        ]
        bonus.append(sum(sum(t.entropy for t in turn) / len(turn) for turn in turns) / len(turns))
        smooth.append(sum(sum(turn) / len(turn) for turn in outside) / len(turns))
    beta = 1 + math.exp(-3 * 1 / 2)
    return weighted(plain)(tokens) - 0.5 * (sum(bonus) - beta * sum(smooth)) / len(bonus)


def plain(t: Token, tokens: list[Token]) -> float:
    return 1.0


def positive_nll(tokens: list[Token]) -> Tensor:
    correct = [t for t in tokens if t.reward >= 1]
    return weighted(plain)(tokens) + 0.1 * sum(-t.lp for t in correct) / len(correct)


ALPHAS = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 0.9}
LOSSES: dict[str, tuple[dict[str, Any], Callable[[list[Token]], Tensor]]] = {
    "entropy_advantage": ({"entropy_advantage_alpha": 0.4}, entropy_advantage),
    "dppo": (
        {"dppo_divergence": "tv", "dppo_delta_low": 0.05, "dppo_delta_high": 0.05, "dppo_truncation": 1.5},
        dppo,
    ),
    "ce_gppo": (ALPHAS, lambda tokens: sum(ce_gppo(t, 0.75, 0.9) for t in tokens) / len(tokens)),
    "ce_gppo_loop": ({**ALPHAS, "ce_gppo_loop_target": 9.0, "ce_gppo_loop_kp": 0.05}, ce_gppo_loop),
    "par": (
        {"par_schedule": "entropy", "par_target": 9.0, "par_delta": 0.2, "par_initial": 0.7},
        weighted(lambda t, tokens: 0.5 if t.a > 0 else 1.0),
    ),
    "entropic": ({"entropic_target": 9.0, "entropic_kp": 0.05, "entropic_probability": 0.1}, weighted(entropic)),
    "stare": ({"stare_target_entropy": 9.0, "stare_variant": "C2", "stare_fraction": 0.3}, weighted(stare)),
    "steer": ({"steer_min_weight": 0.7}, weighted(steer)),
    "fipo": ({"fipo_half_life": 2.0}, weighted(fipo)),
    "erc": ({"erc_low": 0.8, "erc_high": 1.3}, weighted(erc)),
    "clip_cov": ({"clip_cov_fraction": 1.0, "clip_cov_low": 0.1, "clip_cov_high": 1.0}, weighted(clip_cov)),
    "kl_cov": ({"kl_cov_coef": 1.0, "kl_cov_fraction": 0.2}, kl_cov),
    "epo": ({"epo_coef": 0.5}, epo),
    "positive_nll": ({"positive_nll_coef": 0.1}, positive_nll),
}
