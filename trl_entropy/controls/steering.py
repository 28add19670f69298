"""What the loops that steer the mean entropy to a target have in common: the measurement, the state and the trace."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .control import Context, Figure, Metric, Panel, Rollout
from .health import Finding, LogHistory, Rule, enough, window
from .tokens import TokenMean

AT_BOUND = 1e-3
"""An actuator this near to its bound for a whole window is held there."""


def rollout_entropy(rollout: Rollout, context: Context) -> float | None:
    """Mean entropy of the tokens of a rollout under the policy that is about to be trained, over all processes.

    An entropy that is not a finite number is left out.

    Returns:
        Nats, the same on all processes; `None` if there is no token.

    Raises:
        ValueError: If the rollout has no entropies.
    """
    entropies = rollout.old_entropies
    if entropies is None:
        raise ValueError(
            "A loop on the mean entropy needs the rollout's entropies, which it does not have. Let the trainer make "
            "the rollout."
        )
    mask = rollout.mask & entropies.isfinite()
    dtype = torch.float32 if mask.device.type == "mps" else torch.float64
    total = torch.where(mask, entropies.detach(), 0.0).sum(dtype=dtype)
    total, count = context.sum_over_processes(torch.stack([total, mask.sum().to(dtype)])).tolist()
    return total / count if count else None


def proportional_integral(error: float, integral: float, *, kp: float, ki: float) -> tuple[float, float]:
    """One step of a proportional-integral controller, `a_k = clip(K_p e_k + K_i sum_{j<k} e_j, -1, 1)`.

    The sum stands still while `a` is at a bound and the error pushes on, so that it need not be undone first when the
    error turns.

    Args:
        error: `e_k`.
        integral: Sum of the errors before it.
        kp: Gain `K_p`, at least 0, in units of the actuator per unit of the error.
        ki: Gain `K_i`, at least 0.

    Returns:
        `a_k` in [-1, 1], and the sum for the next step.
    """
    wanted = kp * error + ki * integral
    pushes_outward = abs(wanted) >= 1.0 and wanted * error > 0.0
    return min(max(wanted, -1.0), 1.0), integral if pushes_outward else integral + error


class EntropyLoop:
    """What a loop on the mean entropy remembers, the same on all processes.

    Attributes:
        entropy: Mean entropy of the last rollout, nats; `None` before the first.
        actuator: What the loop has set for it.
        integral: Sum of the errors, nats.
    """

    def __init__(self, actuator: float = 0.0) -> None:
        self.entropy: float | None = None
        self.actuator = actuator
        self.integral = 0.0

    def measure(self, rollout: Rollout, context: Context) -> float | None:
        """Take the mean entropy of a rollout of the training; `None` if there is nothing to act on."""
        entropy = rollout_entropy(rollout, context) if context.training else None
        self.entropy = self.entropy if entropy is None else entropy
        return entropy

    def step(self, error: float, *, kp: float, ki: float) -> None:
        """Set the actuator by `proportional_integral`."""
        self.actuator, self.integral = proportional_integral(error, self.integral, kp=kp, ki=ki)

    def trace(self, prefix: str, set_point: float, mask: Tensor) -> dict[str, TokenMean]:
        """The metrics of `loop_metrics`, as constants over a micro-batch's tokens; none before the first rollout."""
        if self.entropy is None:
            return {}
        values = {
            "set_point": set_point,
            "entropy": self.entropy,
            "error": self.entropy - set_point,
            "actuator": self.actuator,
        }
        return constants(prefix, values, mask)

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": self.entropy, "actuator": self.actuator, "integral": self.integral}

    def load_state_dict(self, state: dict[str, Any], *, own: bool = True) -> None:
        self.entropy, self.actuator, self.integral = state["entropy"], state["actuator"], state["integral"]


def constants(prefix: str, values: Mapping[str, float], mask: Tensor) -> dict[str, TokenMean]:
    """Metrics that have one value for all tokens of a micro-batch."""
    return {
        f"{prefix}/{name}": TokenMean(torch.full((), value, dtype=torch.float32, device=mask.device), mask)
        for name, value in values.items()
    }


INTEGRAL = Metric(
    "integral",
    "nats",
    "sum of the errors of the rollouts so far, but for those that would push `a` past its bound",
    "levels off",
)
"""Of a proportional-integral loop."""


def loop_metrics(actuator: str, unit: str, healthy: str) -> tuple[Metric, ...]:
    """What `EntropyLoop.trace` logs; the actuator's unit, meaning and healthy range are the loop's."""
    return (
        Metric("set_point", "nats", "the mean entropy that is asked for", "constant"),
        Metric("entropy", "nats", "mean entropy of the rollout before its first update", "near `set_point`"),
        Metric("error", "nats", "the second less the first", "around 0 after a while"),
        Metric("actuator", unit, actuator, healthy),
    )


def loop_figure(prefix: str, title: str, actuator: str, reading: str) -> Figure:
    """Set-point and entropy in one panel, the actuator in another."""
    entropy = Panel("entropy (nats per token)", (f"{prefix}/entropy",), guides=(f"{prefix}/set_point",))
    return Figure(prefix, title, (entropy, Panel(actuator, (f"{prefix}/actuator",))), reading)


def held_at_bound(prefix: str, name: str, bounds: tuple[float, float], remedy: str) -> Rule:
    """A rule: the actuator stays at one of its bounds, and the entropy is not at its target.

    Args:
        prefix: Of the loop's metrics; the finding's name is `<prefix>_at_bound`.
        name: Of the loop.
        bounds: Of the actuator: where it lets the entropy rise the most, and where it lets it fall the most.
        remedy: A sentence.
    """

    def rule(log_history: LogHistory) -> Finding | None:
        actuators, errors = enough(log_history, f"{prefix}/actuator"), enough(log_history, f"{prefix}/error")
        if not actuators or not errors:
            return None
        size = window(actuators, log_history)
        last, error = actuators[-size:], fmean(errors[-size:])
        bound = bounds[0] if error < 0.0 else bounds[1]
        if not all(math.isclose(actuator, bound, abs_tol=AT_BOUND) for actuator in last):
            return None
        return Finding(
            f"{prefix}_at_bound",
            f"{name} cannot hold the entropy: it is {abs(error):.3g} nats {'below' if error < 0.0 else 'above'} its "
            f"target, and the actuator stays at its bound of {bound:g}.",
            remedy,
        )

    rule.__name__ = f"{prefix}_at_bound"
    return rule
