"""The controls that are on, one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .checks import check_shapes
from .control import Context, Control, Metrics, MicroBatch, Rollout, State
from .entropy_ratios import ENTROPY_FLOOR
from .importance import bounded_old_logps, clipped_by_ppo, log_importance_weight, ratio_of
from .table import CONTROLS
from .tokens import PolicyTokens, TokenMean


def controls_of(config: Any) -> tuple[Control, ...]:
    """The controls that a configuration switches on, in their order."""
    return tuple(control.under(config) for control in CONTROLS if control.enabled(config))


def ratio_controls(config: Any) -> str:
    """Those of them that act only where the new policy differs from the old one, in words; empty for none."""
    return " and ".join(control.name for control in controls_of(config) if not control.acts_on_policy)


@dataclass
class ActiveControls:
    """The controls that a configuration switches on, with what they remember.

    Attributes:
        controls: In their order.
        states: By the prefixes of those that have one.
    """

    controls: tuple[Control, ...]
    states: dict[str, State]

    @classmethod
    def of(cls, config: Any, critics: bool = False) -> "ActiveControls":
        """Those of a configuration, their states new; with `critics`, those that critics bring along too."""
        enabled = (one for one in CONTROLS if one.enabled(config) or (critics and one.comes_with_critics))
        controls = tuple(one.under(config) for one in enabled)
        made = {one.prefix: one.state(config) for one in controls if one.state is not None}
        return cls(controls, {prefix: state for prefix, state in made.items() if state is not None})

    @property
    def shape_tokens(self) -> bool:
        """Whether one of them changes what TRL's loss reads of a token."""
        return any(control.shape is not None for control in self.controls)

    def need(self, what: str) -> bool:
        """Whether one of them has the attribute `needs_<what>` of `Control`."""
        return any(getattr(control, f"needs_{what}") for control in self.controls)

    def on_rollout(self, rollout: Rollout, context: Context) -> tuple[dict[str, Tensor], dict[str, TokenMean]]:
        """The columns that they add to a scored rollout, and their metrics."""
        columns: dict[str, Tensor] = {}
        metrics: dict[str, TokenMean] = {}
        for control in self.controls:
            if control.on_rollout is not None:
                added, counted = control.on_rollout(rollout, context, self.states.get(control.prefix))
                columns |= added
                metrics |= counted
                if "advantages" in added:
                    rollout = replace(rollout, advantages=added["advantages"])
        return columns, metrics

    def on_repeat(
        self, entropies: Tensor, old_entropies: Tensor, mask: Tensor, context: Context
    ) -> dict[str, TokenMean]:
        """Their metrics of a second forward pass with the same weights, `(rows, T)` each."""
        metrics: dict[str, TokenMean] = {}
        for control in self.controls:
            if control.on_repeat is not None:
                state = self.states.get(control.prefix)
                metrics |= control.on_repeat(entropies, old_entropies, mask, context, state)
        return metrics

    @torch.no_grad()
    def shape(self, batch: MicroBatch, context: Context) -> tuple[PolicyTokens, dict[str, TokenMean]]:
        """The tokens as TRL's loss shall read them, and the metrics.

        PPO-clip comes first: which tokens it would drop is counted on the raw ratio. Importance ratios are bounded.
        """
        tokens = batch.tokens
        low, high = clipped_by_ppo(ratio_of(batch.log_weight), tokens.advantages, context.eps_low, context.eps_high)
        metrics = {
            "ppo_clip/low_fraction": TokenMean(low, tokens.mask),
            "ppo_clip/high_fraction": TokenMean(high, tokens.mask),
        }
        tokens = replace(tokens, old_logps=bounded_old_logps(tokens.old_logps, batch.log_weight))
        for control in self.controls:
            if control.shape is not None:
                tokens, counted = control.shape(batch, tokens, context, self.states.get(control.prefix))
                metrics |= counted
        return tokens, metrics

    def loss(self, batch: MicroBatch, context: Context) -> tuple[Tensor | None, dict[str, TokenMean]]:
        """The scalar to add to TRL's loss, `None` for none, and the metrics."""
        added, metrics = [], dict[str, TokenMean]()
        for control in self.controls:
            if control.loss is not None:
                loss, counted = control.loss(batch, context, self.states.get(control.prefix))
                added.append(loss)
                metrics |= counted
        return torch.stack(added).sum() if added else None, metrics

    def state_dict(self) -> dict[str, Any]:
        """What they remember, by prefix."""
        return {prefix: state.state_dict() for prefix, state in self.states.items()}

    def load_state_dict(self, saved: Mapping[str, Any], *, own: bool) -> list[str]:
        """Continue from `state_dict()`.

        Args:
            saved: From a checkpoint.
            own: Whether it is this process's.

        Returns:
            The names of the controls that the checkpoint has nothing of, which begin anew.
        """
        for prefix, state in self.states.items():
            if prefix in saved:
                state.load_state_dict(saved[prefix], own=own)
        return [one.name for one in self.controls if one.prefix in self.states and one.prefix not in saved]


def clip_controls(
    tokens: PolicyTokens,
    entropies: Tensor,
    old_entropies: Tensor | None,
    *,
    level: str,
    eps_low: float,
    eps_high: float,
    ce_gppo_alphas: tuple[float, float] | None = None,
    erc_bounds: tuple[float, float] | None = None,
    erc_entropy_floor: float = ENTROPY_FLOOR,
    delta: float | None = None,
    constant_ratio: bool = False,
) -> tuple[PolicyTokens, Metrics]:
    """CE-GPPO and ERC as the trainers compose them, for a training loop of one's own.

    The first reads the raw ratio, each later one what the one before left.

    Args:
        tokens: The micro-batch.
        entropies: Of the policy being trained, nats, `(B, T)`.
        old_entropies: Of the rollout policy, nats, `(B, T)`; `None` where ERC is off.
        level: `"token"` or `"sequence"` (TRL's `importance_sampling_level`).
        eps_low: Half-width of the clip range `[1 - eps_low, 1 + eps_high]` below 1.
        eps_high: Half-width of the clip range above 1.
        ce_gppo_alphas: `(alpha1, alpha2)` of `ce_gppo`; `None` for off.
        erc_bounds: `(low, high)` of `erc`; `None` for off.
        erc_entropy_floor: Its floor, nats.
        delta: Dual clip, see `ce_gppo`.
        constant_ratio: Whether the loss takes the importance ratio as a constant weight (CISPO), so that each token's
            gradient is that of its own term at sequence level too.

    Returns:
        The micro-batch with shaped `advantages` and `old_logps`, `frozen` tokens where ERC clips at sequence level,
        and the metrics.

    Raises:
        ValueError: If ERC is on and `old_entropies` is `None`, if `level` is unknown, or if the shapes do not fit.
    """
    low, high = erc_bounds or (None, None)
    alpha1, alpha2 = ce_gppo_alphas or (None, None)
    settings = SimpleNamespace(
        ce_gppo_enabled=ce_gppo_alphas is not None,
        ce_gppo_alpha1=alpha1,
        ce_gppo_alpha2=alpha2,
        erc_enabled=erc_bounds is not None,
        erc_low=low,
        erc_high=high,
        erc_entropy_floor=erc_entropy_floor,
        erc_side="both",
        erc_target_fraction=None,
    )
    context = Context(settings, level, eps_low, eps_high, delta, constant_ratio)
    return ActiveControls.of(settings).shape(micro_batch(tokens, entropies, old_entropies, level), context)


def micro_batch(
    tokens: PolicyTokens,
    entropies: Tensor,
    old_entropies: Tensor | None,
    level: str,
    columns: Mapping[str, Tensor] | None = None,
) -> MicroBatch:
    """A `MicroBatch` of tensors `(B, T)`; its `tokens` are without a graph.

    Raises:
        ValueError: If `level` is neither `"token"` nor `"sequence"`, or the shapes do not fit.
    """
    check_shapes(mask=(tokens.mask, "B T"), entropies=(entropies, "B T"), old_entropies=(old_entropies, "B T"))
    raw = replace(tokens, logps=tokens.logps.detach())
    log_weight = log_importance_weight(raw.logps, raw.old_logps, raw.mask, level)
    return MicroBatch(raw, log_weight, tokens.logps, entropies, entropies, old_entropies, columns or {})
