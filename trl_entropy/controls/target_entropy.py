"""An entropy target as one field, and which loop serves it.

A control that can hold a target says so in its row (`target_loop`): which of its fields to set for it. TRL's own
adaptive coefficient (Skywork-OR1, arXiv 2505.22312) is a row here, which adds nothing to it but the trace.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from .checks import check_positive
from .control import Context, Control, Figure, Metric, Metrics, Panel, Rollout, TargetLoop
from .steering import constants

DEFAULT_LOOP = "entropic"


@dataclass
class TargetEntropyFields:
    """The fields of an entropy target.

    Args:
        target_entropy (`float`, *optional*):
            Mean entropy to hold, nats per token, above 0. It is written into the fields of the loop that serves it.
        target_entropy_by (`str`, *optional*, defaults to `"entropic"`):
            That loop. `"entropic"`: EntroPIC, from both sides. `"par"`: positive advantages count less while the
            entropy is below the target. `"stare"`: surprising tokens count more then.
            `"ce_gppo"`: CE-GPPO's weights, from both sides. `"coefficient"`: TRL's `use_adaptive_entropy`, whose
            coefficient can only raise the entropy.
    """

    target_entropy: float | None = field(
        default=None, metadata={"help": "Mean entropy to hold, nats per token, by the loop target_entropy_by."}
    )
    target_entropy_by: str = field(
        default=DEFAULT_LOOP,
        metadata={"help": "What holds target_entropy: entropic, par, stare, ce_gppo or coefficient."},
    )

    @property
    def coefficient_enabled(self) -> bool:
        return self.target_entropy is not None and self.target_entropy_by == "coefficient"


def serve_target_entropy(config: Any, controls: Sequence[Control]) -> None:
    """Write `target_entropy` into the fields of the loop that serves it.

    Args:
        config: A configuration; without the field, or with the field not set, it is left as it is.
        controls: Among them those with a `target_loop`.

    Raises:
        ValueError: If there is no such loop, if the loop's own fields are set to something else, or if the installed
            TRL does not have them.
    """
    target, by = getattr(config, "target_entropy", None), getattr(config, "target_entropy_by", DEFAULT_LOOP)
    if target is None and by == DEFAULT_LOOP:
        return
    loops = {one.target_loop.name: one.target_loop for one in controls if one.target_loop is not None}
    if by not in loops:
        raise ValueError(f"target_entropy_by={by!r} is unknown. Choose one of {', '.join(loops)}.")
    if target is None:
        raise ValueError(f"target_entropy_by={by!r} serves target_entropy, which is not set. Set it, in nats.")
    check_positive(config, "target_entropy", "0.1 to 0.3")
    defaults = {one.name: one.default for one in fields(config)}
    for name, value in loops[by].settings(target).items():
        if name not in defaults:
            raise ValueError(
                f"target_entropy={target} with target_entropy_by={by!r} sets {name}, which the installed TRL does not "
                "have. Install TRL 1.12 or newer, or choose another loop."
            )
        if getattr(config, name) not in (defaults[name], value):
            raise ValueError(
                f"target_entropy={target} with target_entropy_by={by!r} sets {name}={value!r}, and {name}="
                f"{getattr(config, name)!r} is set. Leave one of the two out."
            )
        setattr(config, name, value)


def on_rollout(rollout: Rollout, context: Context, state: None) -> tuple[Mapping[str, Tensor], Metrics]:
    return {}, constants("coefficient", {"set_point": context.settings.target_entropy}, rollout.mask)


COEFFICIENT = Control(
    name="TRL's adaptive coefficient",
    prefix="coefficient",
    summary="One field for the loop that shall hold the mean entropy: `entropic`, `par`, `stare`, `ce_gppo`, or, "
    "this row, TRL's adaptive `coefficient`.",
    published="0.2 with `coefficient`",
    paper="Skywork Open Reasoner 1 Technical Report",
    arxiv="2505.22312",
    fields=("target_entropy", "target_entropy_by"),
    target_loop=TargetLoop(
        "coefficient", lambda target: {"use_adaptive_entropy": True, "entropy_target": target}
    ),  # `steers_entropy` is left to `use_adaptive_entropy`, which excludes the other loops by itself
    on_rollout=on_rollout,
    metrics=(
        Metric(
            "set_point",
            "nats",
            "the mean entropy that is asked for, at the first step of a rollout; `entropy` and `entropy_coef` (TRL) "
            "are its entropy and actuator",
            "constant",
        ),
    ),
    figures=(
        Figure(
            "coefficient",
            "Entropy bonus: entropy, its target and TRL's coefficient",
            (
                Panel("entropy (nats per token)", ("entropy",), guides=("coefficient/set_point",)),
                Panel("coefficient", ("entropy_coef",)),
            ),
            "Healthy: the entropy (line) stays at its target (dotted) or above, and the coefficient moves between its "
            "bounds or stays as set.",
        ),
    ),
    remedies=(("entropy_collapse", "target_entropy with target_entropy_by='coefficient'"),),
)
