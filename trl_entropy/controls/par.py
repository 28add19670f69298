"""Positive-Advantage Reweighting: how much tokens with a positive advantage count (arXiv 2511.05993)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_between, check_positive
from .control import LINEAR_LOSSES, Context, Control, Metric, Metrics, MicroBatch, Rollout, TargetLoop
from .steering import EntropyLoop, constants, held_at_bound, loop_figure, loop_metrics
from .tokens import PolicyTokens, TokenMean

SCHEDULES = ("stage", "epoch", "entropy")


@dataclass
class PARFields:
    """The fields of Positive-Advantage Reweighting (arXiv 2511.05993).

    Args:
        par_schedule (`str`, *optional*):
            How the weight lambda of the tokens with a positive advantage goes: `"entropy"`, up or down by `par_delta`
            with every rollout, as the mean entropy is above or below `par_target`; `"stage"`, 0 in the first half of
            the training, then linearly to 1; `"epoch"`, linearly from 0 in the first epoch to 1 in the last.
        par_target (`float`, *optional*, defaults to `0.2`):
            Mean entropy to hold with `par_schedule="entropy"`, nats per token, above 0. Published: 0.2.
        par_delta (`float`, *optional*, defaults to `0.05`):
            Change of lambda per rollout with `"entropy"`, in [0, 1]. Published: 0.05.
        par_initial (`float`, *optional*, defaults to `0.0`):
            Lambda before the first rollout with `"entropy"`, in [0, 1]. Published: 0.
    """

    par_schedule: str | None = field(
        default=None, metadata={"help": "PAR: weight of positive advantages by entropy, stage or epoch."}
    )
    par_target: float = field(
        default=0.2, metadata={"help": "PAR by entropy: mean entropy to hold, nats per token. Published: 0.2."}
    )
    par_delta: float = field(
        default=0.05, metadata={"help": "PAR by entropy: change of the weight per rollout. Published: 0.05."}
    )
    par_initial: float = field(default=0.0, metadata={"help": "PAR by entropy: the first weight. Published: 0."})

    @property
    def par_enabled(self) -> bool:
        return self.par_schedule is not None


def check(config: Any) -> None:
    """Refuse values that Positive-Advantage Reweighting cannot work with."""
    check_positive(config, "par_target", "0.2")
    check_between(config, "par_delta", 0.0, 1.0, "0.05")
    check_between(config, "par_initial", 0.0, 1.0, "0")
    schedule = config.par_schedule
    if schedule is not None and schedule not in SCHEDULES:
        raise ValueError(f"par_schedule={schedule!r} is unknown. Choose one of {', '.join(SCHEDULES)}.")
    if schedule == "epoch" and config.max_steps > 0:
        raise ValueError(
            f"par_schedule='epoch' needs the number of epochs, and max_steps={config.max_steps} overrides "
            "num_train_epochs. Set max_steps=-1, or par_schedule='stage'."
        )
    if schedule == "epoch" and config.num_train_epochs <= 1:
        raise ValueError(
            f"par_schedule='epoch' goes from the first epoch to the last, and num_train_epochs="
            f"{config.num_train_epochs}. Set at least 2, or par_schedule='stage'."
        )


def stage_weight(step: int, total_steps: int) -> float:
    """Lambda of the stage-based schedule: 0 in the first half, then linearly to 1 at the last RL step.

    Args:
        step: Index of the RL step (batch of rollouts), from 0.
        total_steps: RL steps of the training.
    """
    return min(max(0.0, 2.0 * step / max(total_steps - 1, 1) - 1.0), 1.0)


def epoch_weight(step: int, total_steps: int, epochs: float) -> float:
    """Lambda of the epoch-wise schedule, `(e - 1) / (E - 1)` in epoch `e` of `E`.

    The epoch is that in which the rollout begins, by its place among all of them; a part of an epoch at the end counts
    as one.

    Args:
        step: Index of the RL step, from 0.
        total_steps: RL steps of the training.
        epochs: `num_train_epochs`, above 1.
    """
    finished = math.floor(step * epochs / max(total_steps, 1))
    return min(finished / (math.ceil(epochs) - 1), 1.0)


def entropy_weight(weight: float, entropy: float, *, target: float, delta: float) -> float:
    """The next lambda by entropy: `clip(lambda - D, 0, 1)` if `H < d`, else `clip(lambda + D, 0, 1)`.

    Args:
        weight: Lambda.
        entropy: Mean entropy `H`, nats.
        target: `d`, nats.
        delta: `D`.
    """
    return min(max(weight + (-delta if entropy < target else delta), 0.0), 1.0)


def par(tokens: PolicyTokens, weight: float) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """Multiply the policy loss of the tokens with a positive advantage by lambda (arXiv 2511.05993).

    The paper's finding: it is these tokens that make the entropy fall. With lambda = 0 and a reward by rule the policy
    learns only what not to do. As lambda is at least 0 and has no gradient, exactly the advantage becomes `lambda A`.

    Neither the text of the paper nor the released code was at hand; the formulas are those of published notes on it.
    Whether its mean entropy is that of the rollout or of a mini-batch is not known: here it is the rollout's, before
    its first update, and lambda is one for the rollout and moves before it is used, so that the first is
    `par_initial -+ par_delta`.

    Args:
        tokens: The micro-batch.
        weight: Lambda, in [0, 1].

    Returns:
        The micro-batch with shaped `advantages`, and the metrics.
    """
    positive = tokens.advantages > 0
    shaped = replace(tokens, advantages=torch.where(positive, weight * tokens.advantages, tokens.advantages))
    return shaped, {
        "par/positive_fraction": TokenMean(positive, tokens.mask),
        "par/dropped_fraction": TokenMean(positive & (weight == 0.0), tokens.mask),
    }


def on_rollout(rollout: Rollout, context: Context, loop: EntropyLoop) -> tuple[Mapping[str, Tensor], Metrics]:
    settings = context.settings
    if settings.par_schedule == "entropy" and (entropy := loop.measure(rollout, context)) is not None:
        loop.actuator = entropy_weight(loop.actuator, entropy, target=settings.par_target, delta=settings.par_delta)
    return {}, {}


def scheduled_weight(context: Context, loop: EntropyLoop) -> float:
    """Lambda of the rollout in use."""
    settings = context.settings
    if settings.par_schedule == "stage":
        return stage_weight(context.step, context.total_steps)
    if settings.par_schedule == "epoch":
        return epoch_weight(context.step, context.total_steps, settings.num_train_epochs)
    return loop.actuator


def shape(
    batch: MicroBatch, tokens: PolicyTokens, context: Context, loop: EntropyLoop
) -> tuple[PolicyTokens, Metrics]:
    weight = scheduled_weight(context, loop)
    shaped, metrics = par(tokens, weight)
    trace = constants("par", {"actuator": weight}, tokens.mask)
    if by_entropy(context.settings):
        trace |= loop.trace("par", context.settings.par_target, tokens.mask)
    return shaped, metrics | trace


def by_entropy(config: Any) -> bool:
    """Whether lambda follows the entropy."""
    return config.par_schedule == "entropy"


PAR = Control(
    name="PAR",
    prefix="par",
    summary="Tokens with a positive advantage, which make the entropy fall, count `lambda` times: by the entropy "
    "against a target, or by a schedule (`stage`, `epoch`).",
    published="`entropy`, 0.2, 0.05, 0",
    paper="Revisiting Entropy in Reinforcement Learning for Large Reasoning Models",
    arxiv="2511.05993",
    fields=("par_schedule", "par_target", "par_delta", "par_initial"),
    check=check,
    loss_types=LINEAR_LOSSES,
    loss_reason="whose weights couple the tokens of a sequence",
    steers_entropy=by_entropy,
    target_loop=TargetLoop("par", lambda target: {"par_schedule": "entropy", "par_target": target}),
    needs_old_entropies=by_entropy,
    needs_rollout_pass=by_entropy,
    state=lambda config: EntropyLoop(config.par_initial),
    on_rollout=on_rollout,
    shape=shape,
    metrics=(
        *loop_metrics(
            "`lambda`: what the tokens with a positive advantage count; with every `par_schedule`, the other three "
            "with `entropy`",
            "0 to 1",
            "moves between 0 and 1; at 0 for long, the policy learns only what not to do",
        ),
        Metric("positive_fraction", "share of tokens", "tokens with a positive advantage", "about a half"),
        Metric("dropped_fraction", "share of tokens", "those of them without a gradient, as `lambda` is 0", "0"),
    ),
    figures=(
        loop_figure(
            "par",
            "PAR: entropy and its target",
            "lambda",
            "Healthy: by entropy, it (line) comes to its target (dotted) and stays, and lambda moves between 0 and 1; "
            "else lambda follows its schedule.",
        ),
    ),
    rules=(
        held_at_bound(
            "par",
            "PAR",
            (0.0, 1.0),
            "PAR can lower the entropy no further than the loss does by itself, and raise it no further than negative "
            "advantages do. Try a par_target nearer to the policy's entropy, or EntroPIC (entropic_target).",
        ),
    ),
    remedies=(("entropy_collapse", "par_schedule='entropy' with par_target at the entropy to be held"),),
    drops=(("par/dropped_fraction",), "a lower par_target, or another par_schedule"),
)
