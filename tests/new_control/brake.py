"""Brake: halves the advantage of every token once it has been seen in enough rollouts. Made up for a test."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_not_negative
from .control import Context, Control, Figure, Mark, Metric, Metrics, MicroBatch, Panel, Rollout, TokenView
from .health import Finding, LogHistory, enough
from .tokens import PolicyTokens, TokenMean


@dataclass
class BrakeFields:
    """The fields of Brake.

    Args:
        brake_rollouts (`float`, *optional*, defaults to `0.0`):
            Rollouts until it acts; 0 is off.
    """

    brake_rollouts: float = field(default=0.0, metadata={"help": "Brake: rollouts until it acts; 0 is off."})

    @property
    def brake_enabled(self) -> bool:
        return self.brake_rollouts != 0.0


def check(config: Any) -> None:
    check_not_negative(config, "brake_rollouts", "1; 0 is off")


class Odometer:
    """Counts rollouts."""

    def __init__(self) -> None:
        self.rollouts = 0

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state: dict[str, Any], *, own: bool = True) -> None:
        self.rollouts = state["rollouts"]


def on_rollout(rollout: Rollout, context: Context, state: Odometer) -> tuple[Mapping[str, Tensor], Metrics]:
    state.rollouts += context.training
    braked = rollout.mask & (state.rollouts > context.settings.brake_rollouts)
    return {"brake_tokens": braked}, {"brake/rollouts": TokenMean(torch.full((), state.rollouts), rollout.mask)}


def shape(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: Odometer) -> tuple[PolicyTokens, Metrics]:
    braked = batch.columns["brake_tokens"]
    shaped = replace(tokens, advantages=torch.where(braked, 0.5, 1.0) * tokens.advantages)
    return shaped, {"brake/fraction": TokenMean(braked, tokens.mask)}


def brakes_all(log_history: LogHistory) -> Finding | None:
    fractions = enough(log_history, "brake/fraction")
    if not fractions or fractions[-1] < 1.0:
        return None
    return Finding("brakes_all", "The brake is on for every token.", "Set brake_rollouts=0.")


BRAKE = Control(
    name="Brake",
    prefix="brake",
    summary="Halves the advantage of every token after some rollouts.",
    published="1",
    paper="On Brakes",
    arxiv="0000.00000",
    fields=("brake_rollouts",),
    check=check,
    levels=("token",),
    level_reason="which Brake was not made for",
    state=lambda config: Odometer(),
    on_rollout=on_rollout,
    shape=shape,
    metrics=(
        Metric("rollouts", "rollouts", "rollouts seen", "grows"),
        Metric("fraction", "share of tokens", "tokens with half their advantage", "0, then 1"),
    ),
    marks=(
        Mark("braked", "Z", "braked", "half its advantage, by Brake", ("#eee", "1px solid", "#123"), "brake/fraction"),
    ),
    figures=(Figure("brake", "Tokens braked", (Panel("share", ("brake/fraction",)),), "Healthy: 0, then 1."),),
    token_views=(
        TokenView("token_brake", "What Brake halves", "split", "H", "Healthy: all.", flags=(("braked", "braked"),)),
    ),
    rules=(brakes_all,),
    remedies=(("entropy_collapse", "brake_rollouts=1"),),
    counts=("brake/fraction",),
)
