"""DPPO: a trust region in probabilities instead of PPO's in ratios (arXiv 2602.04879)."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_not_negative, check_shapes, is_number
from .control import PPO_CLIP_LOSSES, Context, Control, Figure, Mark, Metric, Metrics, MicroBatch, Panel, TokenView
from .importance import ratio_of
from .tokens import PolicyTokens, TokenMean, in_float32

PUBLISHED_DELTAS = {"tv": 0.15, "kl": 0.05}
"""Of verl's example: a difference of probabilities, and nats."""
PROBABILITY_FLOOR = 1e-8
"""Of `1 - p`, below what a float32 log-prob near 0 can tell from 0."""


@dataclass
class DPPOFields:
    """The fields of DPPO (arXiv 2602.04879).

    Args:
        dppo_divergence (`str`, *optional*):
            Distance of the policy from the one that sampled, of a token: `"tv"` (total variation, `|p - q|`) or `"kl"`
            (`KL(q || p)` of "this token or another", nats). It switches DPPO on, in place of PPO-clip: `epsilon` does
            nothing any more. With vLLM set `vllm_importance_sampling_correction=False`.
        dppo_delta_low (`float`, *optional*):
            A token with a negative advantage that has become less probable loses its gradient beyond this distance, at
            least 0. Default and published: 0.15 for `"tv"`, 0.05 for `"kl"`.
        dppo_delta_high (`float`, *optional*):
            The same for a token with a positive advantage that has become more probable. Default and published: 0.15
            for `"tv"`, 0.05 for `"kl"`.
        dppo_truncation (`float`, *optional*, defaults to `10.0`):
            Upper bound of the importance ratio that weighs a gradient, at least 1. The authors' code: 10 by default;
            verl's example: 10000; `inf` is the paper's loss.
    """

    dppo_divergence: str | None = field(
        default=None, metadata={"help": "DPPO: distance of the policy from the sampler, tv or kl; switches it on."}
    )
    dppo_delta_low: float | None = field(
        default=None, metadata={"help": "DPPO: largest distance with A < 0. Published: 0.15 (tv), 0.05 (kl)."}
    )
    dppo_delta_high: float | None = field(
        default=None, metadata={"help": "DPPO: largest distance with A > 0. Published: 0.15 (tv), 0.05 (kl)."}
    )
    dppo_truncation: float = field(
        default=10.0, metadata={"help": "DPPO: upper bound of the importance ratio; inf for none. Published: 10."}
    )

    @property
    def dppo_enabled(self) -> bool:
        return self.dppo_divergence is not None


def deltas(config: Any) -> tuple[float, float]:
    """`(low, high)` of a configuration with DPPO on."""
    default = PUBLISHED_DELTAS[config.dppo_divergence]
    low, high = config.dppo_delta_low, config.dppo_delta_high
    return default if low is None else low, default if high is None else high


def check(config: Any) -> None:
    """Refuse values that DPPO cannot work with."""
    given = [name for name in ("dppo_delta_low", "dppo_delta_high") if getattr(config, name) is not None]
    for name in given:
        check_not_negative(config, name, "0.15 (tv), 0.05 (kl)")
    if not (is_number(config.dppo_truncation) and config.dppo_truncation >= 1.0):
        raise ValueError(
            f"dppo_truncation={config.dppo_truncation!r} must be at least 1, the ratio of a policy that has not "
            "moved; inf for none. Published: 10."
        )
    if config.dppo_divergence is None:
        if given:
            raise ValueError(
                f"{given[0]}={getattr(config, given[0])} does nothing without dppo_divergence. Set "
                f"dppo_divergence to tv or kl, or leave {given[0]} out."
            )
    elif config.dppo_divergence not in tuple(PUBLISHED_DELTAS):  # YAML may have a list there
        raise ValueError(f"dppo_divergence={config.dppo_divergence!r} is unknown. Choose tv or kl.")
    else:
        _check_other_ratios(config)


def _check_other_ratios(config: Any) -> None:
    """Refuse what else of TRL reads the importance ratio, which DPPO sets to 1."""
    delta, beta = getattr(config, "delta", None), getattr(config, "beta", 0.0)
    if delta is not None:
        raise ValueError(
            f"delta={delta} bounds the ratio of PPO-clip, which dppo_divergence={config.dppo_divergence!r} replaces. "
            "Leave delta out; dppo_truncation bounds DPPO's ratio."
        )
    if beta != 0.0 and config.use_bias_correction_kl:
        raise ValueError(
            f"beta={beta} with use_bias_correction_kl=True multiplies the KL term by the importance ratio, which DPPO "
            "sets to 1. Set use_bias_correction_kl=False, or beta=0."
        )
    if getattr(config, "use_vllm", False) and config.vllm_importance_sampling_correction:
        raise ValueError(
            "vllm_importance_sampling_correction=True with use_vllm=True would correct the gap between vLLM and the "
            f"trainer a second time: dppo_divergence={config.dppo_divergence!r} measures from what vLLM sampled by. "
            "Set vllm_importance_sampling_correction=False."
        )


def binary_divergence(logps: Tensor, sampler_logps: Tensor, kind: str) -> Tensor:
    """Distance of the policy `p` from the sampler `q`, of the sampled token against all others (arXiv 2602.04879).

    Both are lower bounds of the distance of the whole distributions, and need no other token's probability:

        tv:  |p - q|
        kl:  q log(q / p) + (1 - q) log((1 - q) / (1 - p))

    `1 - p` is taken as `-expm1(lp)`, which keeps its digits where `p` is near 1, and is at least 1e-8 (the authors'
    code adds 1e-8 to `1 - exp(lp)`, which in float32 is 0 or a multiple of 6e-8 there).

    Args:
        logps: Log-probs of the sampled tokens, `(B, T)`.
        sampler_logps: The same under the policy that sampled them, `(B, T)`.
        kind: `"tv"` or `"kl"`.

    Returns:
        `(B, T)`, without an autograd graph, float32 at least: a difference of probabilities, or nats.

    Raises:
        ValueError: If `kind` is neither, or the shapes do not fit.
    """
    check_shapes(logps=(logps, "B T"), sampler_logps=(sampler_logps, "B T"))
    new, old = (in_float32(values.detach()) for values in (logps, sampler_logps))
    probability = old.exp()
    if kind == "tv":
        return (new.exp() - probability).abs()
    if kind != "kl":
        raise ValueError(f"dppo_divergence={kind!r} is unknown. Choose tv or kl.")
    new_rest, old_rest = (-torch.expm1(values).clamp(max=-PROBABILITY_FLOOR) for values in (new, old))
    # 0 log 0 is 0; a log-prob that rounding made slightly positive has the floor of 1 - p
    token = torch.where(probability > 0.0, probability * (old - new), 0.0)
    return token + old_rest * torch.log(old_rest / new_rest)


def dppo(
    tokens: PolicyTokens,
    sampler_logps: Tensor,
    *,
    divergence: str,
    delta_low: float,
    delta_high: float,
    truncation: float = math.inf,
) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """Drop the tokens that have left DPPO's trust region, instead of those that have left PPO-clip's.

    The paper's loss is `-M r A` with `r = p / q` and a mask `M` without gradient (arXiv 2602.04879, the binary
    forms), where `D` is `binary_divergence`:

        M = 0  if A > 0, p > q and D > delta_high,  or  A < 0, p < q and D > delta_low;  else 1

    The authors' code truncates the ratio from above, `-M sg(min(r, c)) A lp`, which is what this does; `c` of infinity
    has the gradient of the paper's loss. It comes out of PPO-clip when a token's advantage is `M min(r, c) A` and its
    ratio exactly 1, `old_logps = sg(lp)`, inside every clip range. The top-K forms are not here: they need more of the
    sampler than the sampled token's log-prob.

    The paper's text was not at hand: the formulas are those of the authors' code (`sail-sg/Stable-RL`), the settings
    those of verl's example. That code measures from the log-probs that the inference engine sampled by; other copies
    of it measure from those that the trainer computes again.

    Args:
        tokens: The micro-batch.
        sampler_logps: Log-probs of the sampled tokens under the policy that sampled them, `(B, T)`.
        divergence: `"tv"` or `"kl"`.
        delta_low: Largest distance with `A < 0`, at least 0.
        delta_high: Largest distance with `A > 0`, at least 0.
        truncation: `c`, at least 1.

    Returns:
        The micro-batch with shaped `advantages` and `old_logps`, and the metrics.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_shapes(advantages=(tokens.advantages, "B T"), sampler_logps=(sampler_logps, "B T"))
    advantages, current = tokens.advantages, tokens.logps.detach()
    log_weight = current - sampler_logps
    distance, ratio = binary_divergence(current, sampler_logps, divergence), ratio_of(log_weight)
    low = (advantages < 0) & (log_weight < 0) & (distance > delta_low)
    high = (advantages > 0) & (log_weight > 0) & (distance > delta_high)
    weighted = ratio.clamp(max=truncation) * advantages
    shaped = replace(tokens, advantages=torch.where(low | high, 0.0, weighted), old_logps=current)
    return shaped, {
        "dppo/dropped_fraction": TokenMean(low | high, tokens.mask),
        "dppo/low_fraction": TokenMean(low, tokens.mask),
        "dppo/high_fraction": TokenMean(high, tokens.mask),
        "dppo/truncated_fraction": TokenMean((ratio > truncation) & ~high, tokens.mask),
        "dppo/divergence": TokenMean(distance, tokens.mask),
    }


def sampler_logps(batch: MicroBatch) -> Tensor:
    """What the inference engine sampled by, `(B, T)`; the trainer's own log-probs where it has not said so.

    vLLM reports no number for a token now and then, which TRL makes a NaN.
    """
    old_logps = batch.tokens.old_logps
    sampled = batch.columns.get("sampling_per_token_logps", old_logps)
    return torch.where(sampled.isnan(), old_logps, sampled)


def shape(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: None) -> tuple[PolicyTokens, Metrics]:
    settings = context.settings
    delta_low, delta_high = deltas(settings)
    return dppo(
        tokens,
        sampler_logps(batch),
        divergence=settings.dppo_divergence,
        delta_low=delta_low,
        delta_high=delta_high,
        truncation=settings.dppo_truncation,
    )


DPPO = Control(
    name="DPPO",
    prefix="dppo",
    summary="In place of PPO-clip: a token loses its gradient once its probability, rather than its ratio, has moved "
    "too far in the direction of its advantage, measured from what it was sampled with.",
    published="`tv`, 0.15, 0.15; `kl`, 0.05, 0.05; 10",
    paper="Rethinking the Trust Region in LLM Reinforcement Learning",
    arxiv="2602.04879",
    fields=("dppo_divergence", "dppo_delta_low", "dppo_delta_high", "dppo_truncation"),
    check=check,
    acts_on_policy=False,
    reads_sampler=True,
    loss_types=PPO_CLIP_LOSSES,
    loss_reason="which has no PPO clip for DPPO to replace",
    levels=("token",),
    level_reason="whose ratio is the sequence's, and DPPO's trust region is each token's own",
    excludes=(("ce_gppo", "DPPO decides instead of PPO-clip which gradients are dropped, and gives none back"),),
    replaces_ppo_clip=True,
    shape=shape,
    metrics=(
        Metric(
            "dropped_fraction",
            "share of tokens",
            "tokens that DPPO takes the gradient of",
            "small and steady; above 0.5, the steps are too large",
        ),
        Metric(
            "low_fraction",
            "share of tokens",
            "of those, `A < 0` and less probable by more than `dppo_delta_low`",
            "about as many as above",
        ),
        Metric(
            "high_fraction",
            "share of tokens",
            "of those, `A > 0` and more probable by more than `dppo_delta_high`",
            "about as many as below; many more: the policy sharpens",
        ),
        Metric(
            "truncated_fraction",
            "share of tokens",
            "tokens whose gradient is weighed by `dppo_truncation` instead of their larger ratio",
            "near 0",
        ),
        Metric(
            "divergence",
            "probability (`tv`), nats (`kl`)",
            "mean distance of a token's probability from the one it was sampled with",
            "well below `dppo_delta_low` and `dppo_delta_high`; at a rollout's first step, the gap of the inference "
            "engine alone",
        ),
    ),
    marks=(
        Mark(
            "dppo_dropped",
            "D",
            "dropped by DPPO",
            "further from the sampler than DPPO allows: no gradient",
            ("#e6dcf5", "3px solid", "#5a2d91"),
            "dppo/dropped_fraction",
        ),
    ),
    figures=(
        Figure(
            "dppo",
            "Tokens dropped by DPPO",
            (
                Panel("below (share of tokens)", ("dppo/low_fraction",)),
                Panel("above (share of tokens)", ("dppo/high_fraction",)),
                Panel("mean distance", ("dppo/divergence",)),
            ),
            "Healthy: small and steady shares, and a distance that does not grow from rollout to rollout; a distance "
            "that stays at a rollout's first step is the gap between the inference engine and the trainer.",
            from_zero=True,
        ),
    ),
    token_views=(
        TokenView(
            "token_dppo_region",
            "What DPPO drops: probability against importance ratio",
            "scatter",
            "p_old",
            "Healthy: the dropped lie at the right, where a small ratio is a large change of probability; improbable "
            "tokens, at the left, are kept at ratios that PPO-clip (dotted) would drop.",
            y="ratio",
            flags=(("dppo_dropped", "clipped"),),
        ),
    ),
    counts=("dppo/dropped_fraction",),
    drops=(("dppo/dropped_fraction",), "a larger dppo_delta_low and dppo_delta_high"),
)
