"""EPO: entropy smoothed against its own history, for multi-turn agents (arXiv 2509.22576, v2 of February 2026)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_not_negative, check_shapes
from .control import Context, Control, Figure, Mark, Metric, Metrics, MicroBatch, Panel, Rollout
from .entropy_history import EntropyHistory
from .tokens import TokenMean, in_float32
from .turns import trajectory_weights, turn_indices

EPO_CHOICES = {
    "epo_schedule": ("decay", "grow", "constant"),
    "epo_form": ("hinge", "indicator"),
    "epo_history": ("scalar", "per_turn"),
}


@dataclass
class EPOFields:
    """The fields of EPO (arXiv 2509.22576).

    Args:
        epo_coef (`float`, *optional*, defaults to `0.0`):
            Weight lambda of the smoothed entropy term, at least 0; 0 is off. Published: 0.001.
        epo_kappa_low (`float`, *optional*, defaults to `0.8`):
            Lower edge of the entropy corridor as a multiple of the mean entropy of the earlier RL steps. Published
            with `epo_kappa_high`: (0, 2), (0.8, 1.2), (0.5, 1.5).
        epo_kappa_high (`float`, *optional*, defaults to `1.2`):
            Upper edge, above `epo_kappa_low`.
        epo_penalty (`float`, *optional*, defaults to `0.1`):
            Weight alpha of the penalty outside the corridor, at least 0; the paper keeps it below 0.5. Published: 0.05
            (ScienceWorld), 0.1 (ALFWorld).
        epo_gamma (`float`, *optional*, defaults to `3.0`):
            Rate of the schedule of the smoothing weight beta, at least 0.
        epo_schedule (`str`, *optional*, defaults to `"decay"`):
            `"decay"` takes beta from 2 towards 1 (the paper), `"grow"` from 1 towards 2, `"constant"` keeps it 1.
        epo_form (`str`, *optional*, defaults to `"hinge"`):
            Penalty outside the corridor, `"hinge"` (distance, v2 of the paper) or `"indicator"` (0 or 1, v1 and the
            released code). The indicator's gradient is exactly zero: it is only reported.
        epo_history (`str`, *optional*, defaults to `"scalar"`):
            `"scalar"` for one history of all tokens (the paper), `"per_turn"` for one per turn index (the released
            code).
    """

    epo_coef: float = field(
        default=0.0, metadata={"help": "EPO: weight lambda of the smoothed entropy term; 0 is off. Published: 0.001."}
    )
    epo_kappa_low: float = field(
        default=0.8, metadata={"help": "EPO: lower edge of the corridor, as a multiple of the mean past entropy."}
    )
    epo_kappa_high: float = field(
        default=1.2, metadata={"help": "EPO: upper edge of the corridor, as a multiple of the mean past entropy."}
    )
    epo_penalty: float = field(
        default=0.1, metadata={"help": "EPO: weight alpha of the penalty outside the corridor."}
    )
    epo_gamma: float = field(default=3.0, metadata={"help": "EPO: rate of the schedule of the smoothing weight."})
    epo_schedule: str = field(
        default="decay", metadata={"help": "EPO: schedule of the smoothing weight: decay, grow or constant."}
    )
    epo_form: str = field(
        default="hinge", metadata={"help": "EPO: penalty outside the corridor: hinge, or indicator (no gradient)."}
    )
    epo_history: str = field(
        default="scalar",
        metadata={"help": "EPO: one history of all tokens (scalar), or one per turn index (per_turn)."},
    )

    @property
    def epo_enabled(self) -> bool:
        return self.epo_coef != 0.0


def check(config: Any) -> None:
    """Refuse values that EPO cannot work with."""
    published = {"epo_coef": "0.001; 0 is off", "epo_penalty": "0.05 and 0.1", "epo_gamma": "3"}
    for name, values in published.items():
        check_not_negative(config, name, values)
    low, high = config.epo_kappa_low, config.epo_kappa_high
    if not 0.0 <= low < high:
        raise ValueError(
            f"epo_kappa_low={low} and epo_kappa_high={high} must satisfy 0 <= epo_kappa_low < epo_kappa_high. "
            "Published: (0, 2), (0.8, 1.2) and (0.5, 1.5)."
        )
    for name, choices in EPO_CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown. Choose one of {', '.join(choices)}.")


def epo_beta(step: int, total_steps: int, *, gamma: float, schedule: str) -> float:
    """Weight of the smoothing term at an RL step (arXiv 2509.22576).

    `decay`, the paper's: `1 + exp(-gamma k / k_mid)` with `k_mid = floor(K / 2)`, from 2 towards 1. `grow` mirrors it,
    `2 - exp(-gamma k / k_mid)`, from 1 towards 2, as a widely read summary of the paper describes it. `constant` is 1.

    Args:
        step: Index `k` of the RL step (batch of rollouts), from 0.
        total_steps: Number `K` of RL steps of the training.
        gamma: Rate, at least 0.
        schedule: `"decay"`, `"grow"` or `"constant"`.

    Raises:
        ValueError: If `schedule` is none of the three.
    """
    decayed = math.exp(-gamma * step / max(total_steps // 2, 1))
    values = {"decay": 1.0 + decayed, "grow": 2.0 - decayed, "constant": 1.0}
    if schedule not in values:
        raise ValueError(f"epo_schedule={schedule!r} is unknown. Choose one of {', '.join(values)}.")
    return values[schedule]


def corridor_penalty(entropies: Tensor, low: Tensor, high: Tensor, form: str) -> Tensor:
    """How far each token's entropy lies outside the corridor (arXiv 2509.22576).

    `hinge` (v2 of the paper): `relu(low - H) + relu(H - high)`. `indicator` (v1 and the released code): 1 outside, 0
    inside; it is piecewise constant, so its gradient is exactly zero and only the reported loss shows it.

    Args:
        entropies: Nats, with their graph, `(B, T)`.
        low: Lower edge, nats, broadcastable to `(B, T)`.
        high: Upper edge, nats.
        form: `"hinge"` or `"indicator"`.

    Raises:
        ValueError: If `form` is neither.
    """
    if form == "hinge":
        return torch.relu(low - entropies) + torch.relu(entropies - high)
    if form == "indicator":
        return ((entropies < low) | (entropies > high)).to(entropies.dtype)
    raise ValueError(f"epo_form={form!r} is unknown. Choose hinge or indicator.")


def epo(
    entropies: Tensor,
    mask: Tensor,
    history: Tensor | None,
    *,
    beta: float,
    kappa_low: float,
    kappa_high: float,
    penalty: float,
    form: str,
    num_trajectories: Tensor | float,
    bonus_entropies: Tensor | None = None,
) -> tuple[Tensor, dict[str, TokenMean]]:
    """`-(L_H - beta_k L_smooth)`, to be multiplied by lambda and added to the policy loss (arXiv 2509.22576).

    `L_H` is the mean over trajectories of the mean over turns of the mean over a turn's tokens of `H`; `L_smooth` is
    the same mean of `penalty * P`, with `P` the distance of `H` from the corridor `[kappa_low, kappa_high] x history`.
    Trajectories without a valid token do not count.

    Args:
        entropies: Nats, with their graph, `(B, T)`.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        history: Mean entropy of the earlier RL steps, nats, 0-dim, or `(turns,)` for one per turn index with NaN where
            a turn index has none; `None` at the first RL step, which is not smoothed.
        beta: `beta_k`, from `epo_beta`.
        kappa_low: Lower edge of the corridor, as a multiple of `history`.
        kappa_high: Upper edge.
        penalty: `alpha`.
        form: See `corridor_penalty`.
        num_trajectories: Normaliser of the mean over trajectories.
        bonus_entropies: What `L_H` reads instead of `entropies`, where some tokens are to have no bonus; same values.

    Returns:
        The scalar loss, and the metrics.

    Raises:
        ValueError: If the shapes do not fit, or `form` is unknown.
    """
    check_shapes(
        mask=(mask, "B T"),
        entropies=(entropies, "B T"),
        bonus_entropies=(bonus_entropies, "B T"),
        history=(history, "turns" if history is not None and history.dim() else ""),
    )
    turns, entropies = turn_indices(mask), in_float32(entropies)
    weights = trajectory_weights(mask, turns, entropies.dtype)
    # where, not the weight alone: an observation's entropy may be anything
    bonus_entropies = entropies if bonus_entropies is None else in_float32(bonus_entropies)
    bonus = (weights * torch.where(mask, bonus_entropies, 0.0)).sum() / num_trajectories
    metrics = {"epo/beta": TokenMean(torch.full((), beta, device=mask.device), mask)}
    if history is None:
        return -bonus, metrics
    reference = history if history.dim() == 0 else _per_token(history, turns)
    smoothed = mask & ~reference.isnan()
    low, high = kappa_low * reference, kappa_high * reference
    distance = torch.where(smoothed, corridor_penalty(entropies, low, high, form), 0.0)
    smooth = (weights * penalty * distance).sum() / num_trajectories
    below, above = entropies.detach() < low, entropies.detach() > high
    metrics |= {
        "epo/history": TokenMean(reference, smoothed),
        "epo/corridor_low": TokenMean(low, smoothed),
        "epo/corridor_high": TokenMean(high, smoothed),
        "epo/below_fraction": TokenMean(below, smoothed),
        "epo/inside_fraction": TokenMean(~(below | above), smoothed),
        "epo/above_fraction": TokenMean(above, smoothed),
        "epo/outside_fraction": TokenMean(below | above, smoothed),
        "epo/penalty": TokenMean(distance.detach(), smoothed),
    }
    return -(bonus - beta * smooth), metrics


def _per_token(history: Tensor, turns: Tensor) -> Tensor:
    """Each token's turn looked up in the history of turn indices, NaN beyond its end; `(B, T)`."""
    padded = torch.nn.functional.pad(history, (0, 1), value=math.nan)
    return padded[turns.clamp(min=0, max=len(history))]


def on_rollout(rollout: Rollout, context: Context, history: EntropyHistory) -> tuple[Mapping[str, Tensor], Metrics]:
    if context.training:
        history.finish_step(context.sum_over_processes)
    return {"num_trajectories": context.sum_over_processes(rollout.mask.any(1).sum())}, {}


def loss(batch: MicroBatch, context: Context, history: EntropyHistory) -> tuple[Tensor, Metrics]:
    settings, mask, entropies = context.settings, batch.tokens.mask, batch.entropies
    if context.training:
        # the policy that wrote the rollout; on-policy it is the one being trained
        history.add(entropies if batch.old_entropies is None else batch.old_entropies, mask)
    added, metrics = epo(
        entropies,
        mask,
        history.mean(settings.epo_history, like=entropies.detach()),
        # by position, not by the history's length: a resumed run may have another schedule, or no history
        beta=epo_beta(context.step, context.total_steps, gamma=settings.epo_gamma, schedule=settings.epo_schedule),
        kappa_low=settings.epo_kappa_low,
        kappa_high=settings.epo_kappa_high,
        penalty=settings.epo_penalty,
        form=settings.epo_form,
        num_trajectories=context.per_window("num_trajectories", f"epo_coef={settings.epo_coef}"),
        bonus_entropies=batch.bonus_entropies,
    )
    return settings.epo_coef * added, metrics


EPO = Control(
    name="EPO",
    prefix="epo",
    summary="An entropy bonus, smoothed towards a corridor around the mean entropy of all earlier rollouts.",
    published="0.001; (0, 2), (0.8, 1.2), (0.5, 1.5); 0.05, 0.1; 3",
    paper="EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning",
    arxiv="2509.22576",
    fields=(
        "epo_coef",
        "epo_kappa_low",
        "epo_kappa_high",
        "epo_penalty",
        "epo_gamma",
        "epo_schedule",
        "epo_form",
        "epo_history",
    ),
    check=check,
    needs_old_entropies=True,
    needs_entropy_gradients=True,
    state=lambda config: EntropyHistory(),
    on_rollout=on_rollout,
    loss=loss,
    metrics=(
        Metric("beta", "-", "weight of the smoothing at this rollout", "from 2 towards 1 with `decay`"),
        Metric("history", "nats", "mean entropy of the earlier rollouts, each counted once", "changes slowly"),
        Metric("corridor_low", "nats", "lower edge, `epo_kappa_low` times that", "changes slowly"),
        Metric("corridor_high", "nats", "upper edge", "changes slowly"),
        Metric("below_fraction", "share of tokens", "entropy below the corridor", "steady"),
        Metric("above_fraction", "share of tokens", "entropy above the corridor", "steady"),
        Metric("outside_fraction", "share of tokens", "the sum of the two", "steady or falling"),
        Metric("inside_fraction", "share of tokens", "entropy inside the corridor", "steady or rising"),
        Metric("penalty", "nats (`hinge`)", "mean distance from the corridor", "steady or falling"),
    ),
    marks=(
        Mark(
            "epo_below",
            "B",
            "below the corridor",
            "entropy below EPO's corridor",
            ("#dfe0fb", "1px solid", "#3b3f9c"),
            "epo/below_fraction",
        ),
        Mark(
            "epo_above",
            "A",
            "above the corridor",
            "entropy above EPO's corridor",
            ("#fbdcdc", "1px solid", "#9c2b2b"),
            "epo/above_fraction",
        ),
    ),
    figures=(
        Figure(
            "epo_corridor",
            "EPO's corridor",
            (Panel("entropy (nats per token)", ("entropy",), band=("epo/corridor_low", "epo/corridor_high")),),
            "Healthy: the entropy (line) stays inside the corridor (shaded) that its own history sets, or returns to "
            "it; an entropy that leaves it for good is more than epo_coef and epo_penalty can hold.",
        ),
    ),
    remedies=(
        ("entropy_collapse", "epo_coef=0.001"),
        (
            "entropy_oscillation",
            "epo_coef=0.02 with epo_penalty=2 (the paper's 0.001, and its penalty below 0.5, smooth less)",
        ),
    ),
)
