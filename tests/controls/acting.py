"""The rows of the table, each with settings that switch it on, and what it makes of a random rollout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.controls.micro_batches import Batch
from trl_entropy import AsyPPOConfig, EntropyGRPOConfig
from trl_entropy.controls import CONTROLS, ActiveControls, Context, PolicyTokens, Rollout, TokenMean, micro_batch
from trl_entropy.trainers.critics import disagreement

ROWS = {control.prefix: control for control in CONTROLS}
ERC = {"erc_low": 0.95, "erc_high": 1.05}
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 0.5}
STARE = {"stare_target_entropy": 9.0, "stare_variant": "C2", "stare_fraction": 0.3}
CLIP_COV = {"clip_cov_fraction": 0.3, "clip_cov_low": -50.0, "clip_cov_high": 50.0}
KL_COV = {"kl_cov_coef": 1.0, "kl_cov_fraction": 0.3}
EPO = {"epo_coef": 1.0, "epo_kappa_low": 0.8, "epo_kappa_high": 1.2, "epo_penalty": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "qae": {"qae_quantile": 0.4},
    "entropy_advantage": {"entropy_advantage_alpha": 0.4},
    "dppo": {"dppo_divergence": "tv"},
    "dppo, kl": {"dppo_divergence": "kl", "dppo_truncation": math.inf},
    "ce_gppo": CE_GPPO,
    "ce_gppo_loop": {**CE_GPPO, "ce_gppo_loop_target": 1.0, "ce_gppo_loop_kp": 0.3, "ce_gppo_loop_ki": 0.3},
    "par": {"par_schedule": "entropy", "par_initial": 0.5},
    "par, stage": {"par_schedule": "stage"},
    "entropic": {"entropic_target": 0.5, "entropic_kp": 0.3, "entropic_probability": 0.3},
    "stare": STARE,
    "stare, adaptive": {**STARE, "stare_adaptive_step": 0.1},
    "steer": {"steer_min_weight": 0.5},
    "fipo": {"fipo_half_life": 2.0, "fipo_raise_only": False},
    "erc": ERC,
    "erc, outward": {**ERC, "erc_side": "outward"},
    "erc, to a share": {**ERC, "erc_target_fraction": 0.3},
    "clip_cov": CLIP_COV,
    "clip_cov, of a micro-batch": {**CLIP_COV, "clip_cov_selection": "micro_batch"},
    "kl_cov": KL_COV,
    "kl_cov, of a micro-batch": {**KL_COV, "kl_cov_selection": "micro_batch"},
    "kl_cov, with PPO-clip": {**KL_COV, "kl_cov_ppo_clip": True},
    "asyppo": {"entropy_coef": 0.01, "advantage_mask_fraction": 0.3, "entropy_filter_fraction": 0.5},
    "epo": EPO,
    "epo, per turn": {**EPO, "epo_history": "per_turn", "epo_form": "indicator"},
    "positive_nll": {"positive_nll_coef": 0.1},
    "coefficient": {"target_entropy": 0.5, "target_entropy_by": "coefficient"},
}
"""A row's prefix, and what the case is of, with the fields that switch it on."""


def row(case: str) -> Any:
    return ROWS[case.split(",")[0]]


@cache
def config_of(case: str, level: str, loss_type: str, **changes: Any) -> Any:
    config_class = AsyPPOConfig if case == "asyppo" else EntropyGRPOConfig
    off = {"use_cpu": True, "bf16": False, "report_to": "none", "steps_per_generation": 4}
    fields = {**CASES[case], **changes, "importance_sampling_level": level, "loss_type": loss_type}
    return config_class(output_dir="unused", **off, **fields)


def values_of(batch: Batch) -> Tensor:
    """Of two critics, `(2, B, T + 1)`."""
    return torch.nn.functional.pad(torch.stack([batch.entropies, batch.old_entropies]), (0, 1))


@dataclass(frozen=True)
class Acted:
    """What a row made of a rollout.

    Attributes:
        columns: What it added to the rollout.
        tokens: As TRL's loss reads them.
        loss: What it adds to TRL's loss.
        gradients: Of that with respect to log-probs and entropies, `(2, B, T)`.
        metrics: Numerators and denominators over all micro-batches.
    """

    columns: dict[str, Tensor]
    tokens: PolicyTokens
    loss: Tensor
    gradients: Tensor
    metrics: dict[str, Tensor]


WHOLE = (slice(None),)


def act(
    case: str,
    batch: Batch,
    level: str = "token",
    loss_type: str = "dapo",
    parts: Sequence[slice] = WHOLE,
    **changes: Any,
) -> Acted:
    """Let a row act on two rollouts, of these numbers both; what it makes of the second."""
    config = config_of(case, level, loss_type, **changes)
    active = ActiveControls.of(config, critics=case == "asyppo")
    for step in (1, 2):
        acted = _act(active, batch, parts, Context(config, level, 0.2, 0.28, None, loss_type == "cispo", step=step))
    return acted


def _act(active: ActiveControls, batch: Batch, parts: Sequence[slice], context: Context) -> Acted:
    context = replace(context, total_steps=4, group_size=len(batch.mask))
    of_completions = any(control.sets_advantages for control in active.controls)
    advantages = batch.advantages[:, 0] if of_completions else batch.advantages
    rollout = Rollout(batch.mask, batch.rewards, advantages, batch.old_logps, batch.old_entropies)
    added, metrics = active.on_rollout(rollout, context)
    columns = dict(added)
    if any(control.comes_with_critics for control in active.controls):
        columns |= disagreement(values_of(batch)[:, :, :-1], batch.mask, context.settings, context.gather)
    context = replace(context, per_window=lambda name, needed_by: columns[name].clamp(min=1))
    totals = {name: mean.totals() for name, mean in metrics.items()}
    found = []
    for part in parts:
        rows = {name: value[part] if value.dim() else value for name, value in columns.items()}
        *shaped, counted = _act_on_micro_batch(active, batch[part], rows, context)
        found.append(shaped)
        for name, mean in counted.items():
            totals[name] = totals.get(name, torch.zeros(2)) + mean.totals()
    tokens, losses, gradients = zip(*found, strict=True)
    return Acted(added, joined(tokens), torch.stack(losses).sum(), torch.cat(gradients, 1), totals)


def _act_on_micro_batch(
    active: ActiveControls, batch: Batch, columns: dict[str, Tensor], context: Context
) -> tuple[PolicyTokens, Tensor, Tensor, dict[str, TokenMean]]:
    leaves = [batch.logps.clone().requires_grad_(), batch.entropies.clone().requires_grad_()]
    given = micro_batch(replace(batch.tokens, logps=leaves[0]), leaves[1], batch.old_entropies, context.level, columns)
    tokens, metrics = active.shape(given, context)
    loss, counted = active.loss(given, context)
    if loss is None:
        return tokens, torch.zeros(()), torch.zeros(2, *batch.mask.shape), {**metrics, **counted}
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return tokens, loss.detach(), torch.stack(gradients), {**metrics, **counted}


def fields_of(tokens: PolicyTokens) -> dict[str, Tensor]:
    return {name: value for name, value in vars(tokens).items() if value is not None}


def joined(parts: Sequence[PolicyTokens]) -> PolicyTokens:
    return PolicyTokens(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields_of(parts[0])})
