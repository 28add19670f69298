"""What rounding alone does to the decisions of ERC, PPO-clip and CE-GPPO: counted from forward passes of one rollout.

Two passes with the same weights should agree; where they do not, a control takes rounding for a change of the policy.
And after an optimizer step, a control should drop the tokens that it would drop had both passes been in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from ..controls import ENTROPY_FLOOR, entropy_ratio, inside_bounds, log_importance_weight
from ..controls.importance import clipped_by_ppo, ratio_of

BAND_EDGES = (0.0, 1e-4, 1e-2, 0.1, 1.0, float("inf"))
"""Nats."""
ALL = "all"
NOISE_SHARE = 0.25
"""From which share of a control's tokens on, being there by rounding, the advice is to change something."""


@dataclass(frozen=True)
class Pass:
    """One forward pass over a rollout's completions, as the trainer makes it.

    Attributes:
        logps: Log-probs of the sampled tokens, float32 `(B, T)`.
        entropies: Nats, float32 `(B, T)`.
    """

    logps: Tensor
    entropies: Tensor


@dataclass(frozen=True)
class Updated:
    """The rollout's tokens after some optimizer steps on it.

    Attributes:
        step: How many.
        trained: The pass in the precision of training.
        float32: The same weights, computed in float32; `None` where that was left out.
    """

    step: int
    trained: Pass
    float32: Pass | None


@dataclass(frozen=True)
class Measurement:
    """The passes of one probe.

    Attributes:
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        advantages: `(B, T)`.
        rollout: With the rollout's weights and the batch shape of training.
        layouts: With the same weights, but in batches of another shape or padding, by what is different.
        float32: The same weights, computed in float32; `None` where that was left out.
        updates: After optimizer steps.
    """

    mask: Tensor
    advantages: Tensor
    rollout: Pass
    layouts: Mapping[str, Pass]
    float32: Pass | None
    updates: tuple[Updated, ...]


@dataclass(frozen=True)
class Gates:
    """The bounds of the controls that are measured.

    Attributes:
        erc_low: Lower bound of ERC's entropy ratio.
        erc_high: Upper bound.
        eps_low: Half-width of the clip range `[1 - eps_low, 1 + eps_high]` below 1.
        eps_high: Half-width of the clip range above 1.
        level: `"token"` or `"sequence"`: which importance ratio PPO-clip and CE-GPPO read.
        erc_floor: What ERC adds to both entropies of its ratio, nats.
    """

    erc_low: float = 0.95
    erc_high: float = 1.05
    eps_low: float = 0.2
    eps_high: float = 0.2
    level: str = "token"
    erc_floor: float = ENTROPY_FLOOR

    def outside(self, new: Pass, old: Pass, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The tokens that each control acts on, bool `(B, T)`.

        Returns:
            `erc`: outside the entropy ratio's bounds; `ppo_clip`: outside the clip range, whatever the advantage;
            `ce_gppo_low`, `ce_gppo_high`: CE-GPPO's two classes, which are what PPO-clip drops.
        """
        rho = entropy_ratio(new.entropies, old.entropies, self.erc_floor)
        ratio = ratio_of(log_importance_weight(new.logps, old.logps, mask, self.level)).expand_as(advantages)
        low, high = clipped_by_ppo(ratio, advantages, self.eps_low, self.eps_high)
        found = {
            "erc": ~inside_bounds(rho, self.erc_low, self.erc_high),
            "ppo_clip": (ratio < 1 - self.eps_low) | (ratio > 1 + self.eps_high),
            "ce_gppo_low": low,
            "ce_gppo_high": high,
        }
        return {name: tokens & mask for name, tokens in found.items()}


def entropy_bands(entropies: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The tokens of every band of entropy, by its name; first `ALL` of them."""
    bands = {ALL: mask}
    for low, high in pairwise(BAND_EDGES):
        name = f"< {high:g}" if not low else f">= {low:g}" if high == BAND_EDGES[-1] else f"{low:g} to {high:g}"
        above = entropies >= low if low else entropies < high  # rounding makes entropies near 0 negative
        bands[name] = mask & above & (entropies < high)
    return bands


def summarise(measured: Measurement, gates: Gates) -> dict[str, Any]:
    """The probe's numbers, as JSON holds them.

    Returns:
        `tokens`: how many, in `ALL` and in each band of the rollout's entropy (that in float32 where it is known).
        `rounding`: by what was different (a key of `layouts`, or `float32`), control and band, the share of the tokens
        on which the control acts although the weights are the same; `None` for a band without tokens.
        `updates`: a list; each entry has its `step`, and by control and band what `agreement` returns.
    """
    reference = measured.float32 or measured.rollout
    bands = entropy_bands(reference.entropies, measured.mask)
    same_weights = dict(measured.layouts) | ({"float32": measured.float32} if measured.float32 else {})
    return {
        "tokens": {name: int(band.sum()) for name, band in bands.items()},
        "rounding": {
            name: {
                gate: {band: _share(tokens, of) for band, of in bands.items()}
                for gate, tokens in _outside(gates, measured, measured.rollout, other).items()
            }
            for name, other in same_weights.items()
        },
        "updates": [_update(measured, update, gates, bands) for update in measured.updates],
    }


def agreement(found: Tensor, true: Tensor | None, band: Tensor) -> dict[str, float | None]:
    """How a control's tokens compare with those in float32.

    Args:
        found: The tokens it acts on, bool.
        true: Those it would act on in float32; `None` if that is not known.
        band: The tokens to look at.

    Returns:
        `share` of the tokens found, `share_float32` of the true ones, `precision` (share of the found that are true)
        and `recall` (share of the true that are found); `None` where there are no such tokens, or nothing is known.
    """
    known = {} if true is None else {
        "share_float32": _share(true, band),
        "precision": _share(true, band & found),
        "recall": _share(found, band & true),
    }  # fmt: skip
    return {"share": _share(found, band), "share_float32": None, "precision": None, "recall": None} | known


def _update(measured: Measurement, update: Updated, gates: Gates, bands: Mapping[str, Tensor]) -> dict[str, Any]:
    found = _outside(gates, measured, update.trained, measured.rollout)
    true: Mapping[str, Tensor] = {}
    if measured.float32 and update.float32:
        true = _outside(gates, measured, update.float32, measured.float32)
    by_gate = {
        gate: {band: agreement(tokens, true.get(gate), of) for band, of in bands.items()}
        for gate, tokens in found.items()
    }
    return {"step": update.step, **by_gate}


def _outside(gates: Gates, measured: Measurement, new: Pass, old: Pass) -> dict[str, Tensor]:
    return gates.outside(new, old, measured.advantages, measured.mask)


def _share(tokens: Tensor, of: Tensor) -> float | None:
    count = int(of.sum())
    return int((tokens & of).sum()) / count if count else None
