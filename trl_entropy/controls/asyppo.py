"""AsyPPO: what the disagreement of an ensemble of critics does to the policy's update (arXiv 2510.01656)."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .control import LINEAR_LOSSES, Context, Control, Figure, Mark, Metric, Metrics, MicroBatch, Panel, TokenView
from .health import Finding, LogHistory, ends, enough, needed_entries, window
from .tokens import PolicyTokens, TokenMean

USELESS_VARIANCE = 0.05
"""A critic that explains less than 5 % of the variance of the returns gives the advantages of a constant baseline."""
NOISY_VARIANCE = -0.02
"""A constant explains 0; values that are worse than a constant were learnt from noise."""
EQUAL_RETURNS = 0.25
"""One rollout in four; each moves the policy by what the critics happen to disagree with themselves."""


@dataclass
class CriticFields:
    """The fields of an ensemble of critics (arXiv 2510.01656).

    Args:
        num_critics (`int`, *optional*, defaults to `2`):
            Number of critics.
        critic_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Learning rate of the critics' AdamW, constant.
        critic_num_epochs (`int`, *optional*, defaults to `1`):
            Passes of each critic over its share of a rollout.
        critic_per_device_train_batch_size (`int`, *optional*):
            Completions per process in a critic's mini-batch; `per_device_train_batch_size` if not set.
        critic_gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Recompute the critics' activations in the backward pass.
        critic_dtype (`str`, *optional*, defaults to `"float32"`):
            Weights of the critics: `"float32"`, or `"bfloat16"` with the optimizer's state in float32.
        critic_gae_lambda (`float`, *optional*, defaults to `1.0`):
            Lambda of the critics' targets, in [0, 1]; 1 is the Monte-Carlo return of the paper.
        advantage_mask_fraction (`float`, *optional*, defaults to `0.2`):
            Share of the valid tokens, those with the lowest disagreement of the critics, that get advantage 0, in
            [0, 1).
        entropy_filter_fraction (`float`, *optional*, defaults to `0.2`):
            Share of the valid tokens, those with the highest disagreement, that get no entropy bonus, in [0, 1). It
            acts on whichever bonus is on: `entropy_coef`, `use_adaptive_entropy` or `epo_coef`.
    """

    num_critics: int = field(default=2, metadata={"help": "AsyPPO: number of critics, at most num_generations."})
    critic_learning_rate: float = field(default=1e-5, metadata={"help": "AsyPPO: learning rate of the critics."})
    critic_num_epochs: int = field(default=1, metadata={"help": "AsyPPO: passes of a critic over its share."})
    critic_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "AsyPPO: completions per process in a critic's mini-batch."}
    )
    critic_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "AsyPPO: recompute the critics' activations in the backward pass."}
    )
    critic_dtype: str = field(
        default="float32", metadata={"help": "AsyPPO: weights of the critics, float32 or bfloat16."}
    )
    critic_gae_lambda: float = field(default=1.0, metadata={"help": "AsyPPO: lambda of the critics' targets."})
    advantage_mask_fraction: float = field(
        default=0.2, metadata={"help": "AsyPPO: share of tokens, lowest disagreement first, with advantage 0."}
    )
    entropy_filter_fraction: float = field(
        default=0.2, metadata={"help": "AsyPPO: share of tokens, highest disagreement first, without entropy bonus."}
    )


def check(config: Any) -> None:
    """Refuse what no ensemble of critics can do."""
    most = getattr(config, "num_generations", math.inf)
    if config.num_critics > most or (config.num_critics < 1 and most < math.inf):
        raise ValueError(
            f"num_critics={config.num_critics} must be in 1..num_generations={most}, so that every critic sees every "
            "prompt."
        )
    for name in ("num_critics", "critic_num_epochs", "critic_per_device_train_batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not 0.0 < config.critic_learning_rate < math.inf:
        raise ValueError(f"critic_learning_rate={config.critic_learning_rate} must be above 0. Default: 1e-5.")
    if config.critic_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"critic_dtype={config.critic_dtype!r} is unknown. Choose float32 or bfloat16.")
    if not 0.0 <= config.critic_gae_lambda <= 1.0:
        raise ValueError(f"critic_gae_lambda={config.critic_gae_lambda} must be in [0, 1]. Published: 1.")
    for name in ("advantage_mask_fraction", "entropy_filter_fraction"):
        fraction = getattr(config, name)
        if not 0.0 <= fraction < 1.0:
            raise ValueError(f"{name}={fraction} must be in [0, 1). Published: 0.2; 0 is off.")
        if fraction and config.num_critics == 1:
            raise ValueError(
                f"{name}={fraction} needs the disagreement of at least two critics, and num_critics=1. Set {name}=0 "
                "(with both fractions 0 this is classic PPO), or num_critics=2."
            )


def shape(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: None) -> tuple[PolicyTokens, Metrics]:
    """Advantage 0 where the critics agree most, no entropy bonus where they disagree most."""
    columns, mask, entropies = batch.columns, tokens.mask, batch.entropies.detach()
    masked, filtered = columns["advantage_masked"], columns["entropy_filtered"]
    shaped = replace(tokens, advantages=torch.where(masked, 0.0, tokens.advantages), without_bonus=filtered)
    return shaped, {
        "asyppo/masked_fraction": TokenMean(masked, mask),
        "asyppo/filtered_fraction": TokenMean(filtered, mask),
        "asyppo/entropy_masked": TokenMean(entropies, mask & masked),
        "asyppo/entropy_filtered": TokenMean(entropies, mask & filtered),
        "asyppo/value_std": TokenMean(columns["value_std"], mask),
    }


def critic_explains_nothing(log_history: LogHistory) -> Finding | None:
    """The critics explain less than `USELESS_VARIANCE` of the variance of the returns."""
    explained = enough(log_history, "asyppo/explained_variance")
    share = ends(explained, log_history)[1] if explained else math.nan
    if not share < USELESS_VARIANCE:
        return None
    remedy = (
        "They fit noise: try a smaller critic_learning_rate, critic_num_epochs=1 or more completions per rollout, and "
        "leave bootstrap_truncated=False where a truncated completion has failed."
        if share < NOISY_VARIANCE
        else "If the share still rises, try critic_warmup_rollouts or a larger critic_learning_rate. If not, these "
        "critics cannot tell from a state how its completion ends: take critics that know the task better, or the "
        "group's advantages (EntropyGRPOTrainer)."
    )
    return Finding(
        "critic_explains_nothing",
        f"The critics explain {share:.1%} of the variance of the returns: the advantages are those of a constant "
        "baseline or worse.",
        remedy,
    )


def returns_do_not_vary(log_history: LogHistory) -> Finding | None:
    """More than `EQUAL_RETURNS` of the last rollouts have one and the same return throughout."""
    name = "asyppo/explained_variance"
    logged = [entry[name] for entry in log_history if name in entry]
    if len(logged) < needed_entries(log_history):
        return None
    last = logged[-window(logged, log_history) :]
    # in transformers' log a NaN is None
    share = sum(value is None or (isinstance(value, float) and math.isnan(value)) for value in last) / len(last)
    if share <= EQUAL_RETURNS:
        return None
    return Finding(
        "returns_do_not_vary",
        f"In {share:.0%} of the last rollouts all returns are equal: the advantages are the critics' errors, which "
        "`whiten_advantages` scales to full size. Where a group's advantages would be 0, these move the policy.",
        "Take prompts that the policy solves sometimes (neither never nor always), more completions per rollout, or "
        "the group's advantages (EntropyGRPOTrainer) until it does.",
    )


ASYPPO = Control(
    name="AsyPPO",
    prefix="asyppo",
    summary="Advantages from the mean of small critics that each train on their own share of every prompt's "
    "completions. Tokens on which the critics agree get advantage 0, those on which they disagree most no "
    "entropy bonus.",
    published="2 critics, `critic_gae_lambda` 1, fractions 0.2; 32 completions a prompt",
    paper="Asymmetric Proximal Policy Optimization: mini-critics boost LLM reasoning",
    arxiv="2510.01656",
    fields=(
        "num_critics",
        "critic_learning_rate",
        "critic_num_epochs",
        "critic_per_device_train_batch_size",
        "critic_warmup_rollouts",
        "gae_gamma",
        "gae_lambda",
        "critic_gae_lambda",
        "bootstrap_truncated",
        "whiten_advantages",
        "advantage_mask_fraction",
        "entropy_filter_fraction",
        "critic_gradient_checkpointing",
        "critic_dtype",
    ),
    switch="`AsyPPOTrainer`, `critics`",
    check=check,
    loss_types=LINEAR_LOSSES,
    loss_reason="which weights whole sequences by the sign of one advantage, and AsyPPO's advantages are per token",
    comes_with_critics=True,
    rollout_settings=(
        "gae_gamma",
        "gae_lambda",
        "bootstrap_truncated",
        "whiten_advantages",
        "advantage_mask_fraction",
        "entropy_filter_fraction",
    ),
    shape=shape,
    metrics=(
        Metric(
            "explained_variance",
            "share",
            "variance of the returns that the critics' mean explains, before they train on them; "
            "`asyppo/critic_<m>/explained_variance` for each",
            "rises from 0; negative for long, the critics learn nothing; NaN where all returns are equal",
        ),
        Metric("critic_<m>/loss", "reward squared", "mean squared error of a critic on its share", "falls"),
        Metric("critic_<m>/grad_norm", "-", "norm of a critic's gradient before clipping", "stays in one band"),
        Metric("critic_<m>/value_mean", "reward", "mean value", "near the mean reward"),
        Metric(
            "value_std",
            "reward",
            "standard deviation of the critics' values, mean over tokens; `_p10`, `_p50`, `_p90` its quantiles",
            "above 0, else the critics are one",
        ),
        Metric("masked_fraction", "share of tokens", "advantage masked", "`advantage_mask_fraction`"),
        Metric("filtered_fraction", "share of tokens", "entropy bonus filtered", "`entropy_filter_fraction`"),
        Metric("entropy_masked", "nats", "mean entropy of the masked tokens", "below `asyppo/entropy_filtered`"),
        Metric("entropy_filtered", "nats", "mean entropy of the filtered tokens", "above `asyppo/entropy_masked`"),
        Metric(
            "entropy_overlap",
            "share of tokens",
            "tokens with the highest disagreement that also have the highest entropy",
            "well below 1: the two differ",
        ),
    ),
    marks=(
        Mark(
            "advantage_masked",
            "M",
            "masked",
            "critics agree: advantage masked by AsyPPO",
            ("#d9f2d0", "3px dotted", "#2c6b12"),
            "asyppo/masked_fraction",
        ),
        Mark(
            "entropy_filtered",
            "F",
            "without bonus",
            "critics disagree: no entropy bonus in AsyPPO",
            ("#fff0b8", "3px dotted", "#735a00"),
            "asyppo/filtered_fraction",
        ),
    ),
    figures=(
        Figure(
            "explained_variance",
            "Variance of the returns that the critics explain",
            (Panel("share of the variance", ("asyppo/explained_variance",)),),
            "Healthy: rises from 0, of rollouts that the critics have not trained on yet; one that stays near 0 gives "
            "the advantages of a constant baseline, one below 0 worse.",
        ),
    ),
    token_views=(
        TokenView(
            "token_disagreement",
            "AsyPPO's critics: disagreement against entropy",
            "scatter",
            "H_old",
            "Healthy: no tight relation, else sigma only stands for entropy, and masking by entropy does worse in the "
            "paper, filtering by it collapses the policy. Low sigma: advantage masked; high: no entropy bonus.",
            y="value_std",
            flags=(("advantage_masked", "masked"), ("entropy_filtered", "filtered")),
        ),
    ),
    rules=(critic_explains_nothing, returns_do_not_vary),
)
