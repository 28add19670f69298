"""The likelihood term of the Klear recipes: correct completions are also imitated (arXiv 2508.07629)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_not_negative, check_shapes
from .control import Context, Control, Metric, Metrics, MicroBatch, Rollout
from .tokens import TokenMean, in_float32


@dataclass
class PositiveNLLFields:
    """The fields of the likelihood term (arXiv 2508.07629).

    Args:
        positive_nll_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the token-mean negative log-likelihood of the correct completions that is added to the loss, at
            least 0. The released recipes of ERC and CE-GPPO all use 0.1.
        positive_nll_min_reward (`float`, *optional*, defaults to `1.0`):
            A completion is correct when its total reward, weighted by `reward_weights`, is at least this.
    """

    positive_nll_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the negative log-likelihood of the correct completions. Published: 0.1."},
    )
    positive_nll_min_reward: float = field(
        default=1.0, metadata={"help": "A completion is correct when its weighted total reward is at least this."}
    )

    @property
    def positive_nll_enabled(self) -> bool:
        return self.positive_nll_coef != 0.0


def check(config: Any) -> None:
    """Refuse values that the term cannot work with."""
    check_not_negative(config, "positive_nll_coef", "0.1; 0 is off")
    if not math.isfinite(config.positive_nll_min_reward):
        raise ValueError(
            f"positive_nll_min_reward={config.positive_nll_min_reward} must be a finite number: the total reward from "
            "which on a completion counts as correct."
        )


def positive_nll(
    logps: Tensor, mask: Tensor, correct: Tensor, num_tokens: Tensor | float
) -> tuple[Tensor, dict[str, TokenMean]]:
    """Negative log-likelihood of the correct completions: `-sum of lp over their tokens / num_tokens`.

    Args:
        logps: Log-probability of each sampled token under the policy being trained, with its graph, `(B, T)`.
        mask: Bool, `(B, T)`.
        correct: Bool, `(B,)`.
        num_tokens: Normaliser, the number of tokens of correct completions that the mean is taken over.

    Returns:
        The scalar loss (to be multiplied by its coefficient), and the metrics.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(mask=(mask, "B T"), logps=(logps, "B T"), correct=(correct, "B"))
    chosen = mask & correct.unsqueeze(-1)
    loss = -torch.where(chosen, in_float32(logps), 0.0).sum() / num_tokens
    return loss, {
        "positive_nll/loss": TokenMean(-logps.detach(), chosen),
        "positive_nll/token_fraction": TokenMean(chosen, mask),
    }


def on_rollout(rollout: Rollout, context: Context, state: None) -> tuple[Mapping[str, Tensor], Metrics]:
    tokens = rollout.mask & _is_correct(rollout.rewards, context).unsqueeze(-1)
    return {"rewards": rollout.rewards, "num_correct_tokens": context.sum_over_processes(tokens.sum())}, {}


def loss(batch: MicroBatch, context: Context, state: None) -> tuple[Tensor, Metrics]:
    coef = context.settings.positive_nll_coef
    num_tokens = context.per_window("num_correct_tokens", f"positive_nll_coef={coef}")
    correct = _is_correct(batch.columns["rewards"], context)
    added, metrics = positive_nll(batch.logps, batch.tokens.mask, correct, num_tokens)
    return coef * added, metrics


def _is_correct(rewards: Tensor, context: Context) -> Tensor:
    return rewards >= context.settings.positive_nll_min_reward


POSITIVE_NLL = Control(
    name="Positive NLL",
    prefix="positive_nll",
    summary="Adds the token-mean negative log-likelihood of the correct completions. Every released ERC and CE-"
    "GPPO script has it: to measure a method alone, set it to 0.",
    published="0.1",
    paper="Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization",
    arxiv="2508.07629",
    fields=("positive_nll_coef", "positive_nll_min_reward"),
    check=check,
    rollout_settings=("positive_nll_min_reward",),
    on_rollout=on_rollout,
    loss=loss,
    metrics=(
        Metric(
            "loss",
            "nats",
            "mean negative log-likelihood of the tokens of correct completions, before its coefficient",
            "falls slowly; near 0, the policy repeats itself",
        ),
        Metric("token_fraction", "share of tokens", "tokens of correct completions", "rises with the reward"),
    ),
)
