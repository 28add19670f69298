"""What a control is: one row that says everything the rest of the package needs to know of it.

A module of this folder holds the control's fields (a dataclass, mixed into the configurations), its pure functions and
its row; `table.CONTROLS` lists the rows in the order in which they act. Trainers, model card, record, figures,
diagnosis and the tables of the documentation read the rows, and none of them names a control.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .health import LogHistory, Rule
from .reporting import Figure, Mark, Metric, Panel, TokenView
from .tokens import PolicyTokens, TokenMean

PPO_CLIP_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""TRL's loss types that clip the importance ratio as PPO does."""
LINEAR_LOSSES = (*PPO_CLIP_LOSSES, "cispo", "sapo")
"""TRL's loss types that are linear in each token's advantage, so that a token can be left out of them."""

Metrics = Mapping[str, TokenMean]
Switch = bool | Callable[[Any], bool]
"""Whether something holds for a control: always or never, or by the configuration."""
SWITCHES = ("steers_entropy", "needs_old_entropies", "needs_rollout_pass")
"""The attributes of a `Control` that may depend on the configuration."""


@dataclass(frozen=True)
class Context:
    """What a control may ask of the trainer.

    Attributes:
        settings: The configuration, which has the control's fields.
        level: `importance_sampling_level`, `"token"` or `"sequence"`.
        eps_low: Half-width of the clip range `[1 - eps_low, 1 + eps_high]` below 1.
        eps_high: Half-width of the clip range above 1.
        delta: Dual clip: tokens with `A < 0` and a ratio above it get no gradient; `None` for no such bound.
        constant_ratio: Whether the loss takes the importance ratio as a constant weight (CISPO).
        training: False in an evaluation.
        step: Index of the RL step (batch of rollouts), from 0.
        total_steps: RL steps of the training.
        sum_over_processes: Sums a tensor over the processes, the shorter ones padded with zeros along its first axis.
        gather: Concatenates a 1-D tensor of one length on all processes, in the order of their ranks.
        per_window: A count over the rollout (a column of it, by name; then the setting that needs it, for an error),
            rescaled so that a sum divided by it, summed over the micro-batches of an accumulation window and averaged
            over processes, is the mean over the rollout.
        group_size: Completions of a prompt, which stand next to each other in a rollout.
    """

    settings: Any
    level: str = "token"
    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    constant_ratio: bool = False
    training: bool = True
    step: int = 0
    total_steps: int = 1
    sum_over_processes: Callable[[Tensor], Tensor] = lambda totals: totals
    gather: Callable[[Tensor], Tensor] = lambda flat: flat
    per_window: Callable[[str, str], Tensor] = lambda name, needed_by: torch.ones(())
    group_size: int = 1


@dataclass(frozen=True)
class Rollout:
    """A scored rollout of this process, before its first update.

    Attributes:
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        rewards: Total reward of each completion, `(B,)`; NaN where no reward function scored it.
        advantages: `(B,)`, or `(B, T)` from critics.
        old_logps: Log-probs under the policy that is about to be trained, `(B, T)`; `None` unless the rollout has them
            or a control's `needs_rollout_pass` asks for them.
        old_entropies: Its entropies, nats, `(B, T)`; `None` likewise.
    """

    mask: Tensor
    rewards: Tensor
    advantages: Tensor
    old_logps: Tensor | None = None
    old_entropies: Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of an update.

    Attributes:
        tokens: As no control has shaped them; `logps` without a graph.
        log_weight: Their log importance weight, `(B, T)`, or `(B, 1)` at sequence level.
        logps: Log-probs with their graph, `(B, T)`.
        entropies: Entropies of the policy being trained, nats, with their graph where a control needs it, `(B, T)`.
        bonus_entropies: The same values, without a graph where a token is to have no entropy bonus.
        old_entropies: Entropies of the rollout policy, nats, `(B, T)`; `None` where no control needs them.
        columns: The micro-batch's part of the rollout, with what the controls' `on_rollout` added to it.
    """

    tokens: PolicyTokens
    log_weight: Tensor
    logps: Tensor
    entropies: Tensor
    bonus_entropies: Tensor
    old_entropies: Tensor | None
    columns: Mapping[str, Tensor]


class State(Protocol):
    """What a control remembers between rollouts."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text, in lists and dicts."""
        ...

    def load_state_dict(self, state: dict[str, Any], *, own: bool = True) -> None:
        """Continue from `state_dict()`; `own` is False for another process's, whose unfinished sums are not ours."""
        ...


@dataclass(frozen=True)
class TargetLoop:
    """How a control holds the mean entropy at a target.

    Attributes:
        name: Its value of `target_entropy_by`.
        settings: The fields to set for a target in nats, with their values.
    """

    name: str
    settings: Callable[[float], Mapping[str, Any]]


@dataclass(frozen=True)
class Control:
    """One control.

    It acts in up to four places, each a function that gets the `Context` and, last, the control's state (`None` for a
    control without one): `on_rollout`, `on_repeat`, `shape` and `loss`.

    Attributes:
        name: As its paper calls it.
        prefix: Of its metrics, its fields and its state. The configuration's property `<prefix>_enabled` says whether
            it is on.
        summary: What it does, a sentence or two.
        published: The published settings, in the order of the fields, a phrase.
        paper: Title.
        arxiv: Id.
        fields: Fields of the configuration that are its settings.
        switch: What switches it on, where that is not its first field alone, in Markdown.
        check: Refuses values out of range; called with every configuration that has the fields.
        acts_on_policy: Whether it acts where a rollout is used for one optimizer step, so that all ratios are 1.
        reads_sampler: Whether it compares with the log-probs that an inference engine sampled by, where there is one:
            the engine's rounding is then a difference on-policy too.
        loss_types: TRL's loss types that it can act on, `None` for all; `loss_reason` says why no other.
        levels: The values of `importance_sampling_level` that it can act at; `level_reason` says why no other.
        excludes: Prefixes of controls that cannot be on beside it, and why.
        steers_entropy: Whether it closes a loop on the mean entropy; two such loops at once fight.
        target_loop: How it serves `target_entropy`; `None` if it does not.
        comes_with_critics: Whether a trainer with critics has it on.
        sets_advantages: Whether it makes the advantages of a rollout anew from those of its completions.
        replaces_ppo_clip: Whether it decides instead of PPO-clip which gradients are dropped.
        needs_old_entropies: Whether it reads the rollout policy's entropies.
        needs_entropy_gradients: Whether it differentiates entropies.
        needs_rollout_pass: Whether `on_rollout` reads log-probs and entropies even where TRL does not compute them.
        rollout_settings: Fields on which the columns of `on_rollout` depend: resumed with others, they are made anew.
        state: Makes its state from the configuration, or `None` where it needs none.
        on_rollout: Columns, `(B, ...)` or 0-dim, to add to a scored rollout, and metrics.
        on_repeat: Metrics of the entropies of a second forward pass with the same weights; gets the entropies, the
            first pass's and the mask, `(rows, T)` each. Called with `needs_old_entropies` alone, before `on_rollout`.
        shape: The micro-batch's tokens as TRL's loss shall read them, given what the controls before made of them, and
            metrics; without gradients.
        loss: A scalar to add to TRL's loss, and metrics.
        metrics: What it logs.
        marks: What it does to single tokens, in the order of their precedence.
        figures: Of its metrics.
        token_views: Figures of the recorded tokens.
        rules: What its metrics say about a run's health.
        remedies: Rules of the diagnosis for whose finding it is a remedy, and which fields to set, a phrase.
        counts: Metrics that together count the tokens it acts on.
        drops: Those that count tokens without a gradient, and the field that makes it fewer, a phrase; or nothing.
    """

    name: str
    prefix: str
    summary: str
    published: str
    paper: str
    arxiv: str
    fields: tuple[str, ...]
    switch: str = ""
    check: Callable[[Any], None] = lambda config: None
    acts_on_policy: bool = True
    reads_sampler: bool = False
    loss_types: tuple[str, ...] | None = None
    loss_reason: str = ""
    levels: tuple[str, ...] = ("token", "sequence")
    level_reason: str = ""
    excludes: tuple[tuple[str, str], ...] = ()
    steers_entropy: Switch = False
    target_loop: TargetLoop | None = None
    comes_with_critics: bool = False
    replaces_ppo_clip: bool = False
    sets_advantages: bool = False
    needs_old_entropies: Switch = False
    needs_entropy_gradients: bool = False
    needs_rollout_pass: Switch = False
    rollout_settings: tuple[str, ...] = ()
    state: Callable[[Any], State | None] | None = None
    on_rollout: Callable[[Rollout, Context, Any], tuple[Mapping[str, Tensor], Metrics]] | None = None
    on_repeat: Callable[[Tensor, Tensor, Tensor, Context, Any], Metrics] | None = None
    shape: Callable[[MicroBatch, PolicyTokens, Context, Any], tuple[PolicyTokens, Metrics]] | None = None
    loss: Callable[[MicroBatch, Context, Any], tuple[Tensor, Metrics]] | None = None
    metrics: tuple[Metric, ...] = ()
    marks: tuple[Mark, ...] = ()
    figures: tuple[Figure, ...] = ()
    token_views: tuple[TokenView, ...] = ()
    rules: tuple[Rule, ...] = ()
    remedies: tuple[tuple[str, str], ...] = ()
    counts: tuple[str, ...] = ()
    drops: tuple[tuple[str, ...], str] | None = None

    def known_to(self, config: Any) -> bool:
        """Whether a configuration has the control's fields."""
        return hasattr(config, f"{self.prefix}_enabled")

    def enabled(self, config: Any) -> bool:
        """Whether a configuration switches it on."""
        return bool(getattr(config, f"{self.prefix}_enabled", False))

    def under(self, config: Any) -> "Control":
        """The row with what depends on the configuration decided."""
        switches = {name: getattr(self, name) for name in SWITCHES}
        decided = {name: switch(config) for name, switch in switches.items() if callable(switch)}
        return replace(self, **decided) if decided else self

    def idle_on_policy(self, config: Any) -> bool:
        """Whether it has nothing to do where a configuration uses a rollout for one optimizer step."""
        return not self.acts_on_policy and not (self.reads_sampler and getattr(config, "use_vllm", False))

    def settings_of(self, config: Any) -> dict[str, Any]:
        """Its fields in a configuration, with their values."""
        return {name: getattr(config, name) for name in self.fields if hasattr(config, name)}


__all__ = [
    "LINEAR_LOSSES",
    "PPO_CLIP_LOSSES",
    "Context",
    "Control",
    "Figure",
    "LogHistory",
    "Mark",
    "Metric",
    "Metrics",
    "MicroBatch",
    "Panel",
    "Rollout",
    "State",
    "TargetLoop",
    "TokenView",
]
