"""Other gates than ERC's, and how well each tells the policy's change from rounding."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_entropy.controls import ENTROPY_FLOOR, entropy_ratio, inside_bounds
from trl_entropy.telemetry.rounding import Measurement, Pass, Updated, agreement

Gate = Callable[[Pass, Pass, Tensor], Tensor]


def _floor(floor: float) -> Gate:
    return lambda new, old, mask: _outside(new.entropies, old.entropies, floor)


def _change(least: float) -> Gate:
    return lambda new, old, mask: (
        _outside(new.entropies, old.entropies) & ((new.entropies - old.entropies).abs() >= least)
    )


def _window(width: int) -> Gate:
    def mean(entropies: Tensor, mask: Tensor) -> Tensor:
        kernel = torch.ones(1, 1, width)
        sums, counts = (
            F.conv1d(F.pad(values[:, None], ((width - 1) // 2, width // 2)), kernel)[:, 0]
            for values in (entropies * mask, mask.float())
        )
        return sums / counts.clamp(min=1)

    return lambda new, old, mask: _outside(mean(new.entropies, mask), mean(old.entropies, mask))


def _outside(entropies: Tensor, old_entropies: Tensor, floor: float = ENTROPY_FLOOR) -> Tensor:
    return ~inside_bounds(entropy_ratio(entropies, old_entropies, floor), low=0.95, high=1.05)


REMEDIES: dict[str, Gate] = {
    "published": _floor(ENTROPY_FLOOR),
    **{f"floor {floor:g}": _floor(floor) for floor in (1e-3, 1e-2, 5e-2, 1e-1)},
    **{f"and a change of {least:g} nats": _change(least) for least in (1e-3, 1e-2, 5e-2)},
    **{f"window of {width}": _window(width) for width in (4, 16)},
}
"""Gates that tell rounding from the policy's change, by what differs from ERC's published one."""
HINDSIGHT = "best floor and bounds"
HINDSIGHT_FLOORS, HINDSIGHT_RECALL = (ENTROPY_FLOOR, 1e-3, 1e-2, 5e-2, 1e-1, 3e-1, 1.0), 0.8


def remedies(measured: Measurement, update: Updated) -> dict[str, dict[str, float | None]]:
    """What each gate finds, against what the published one finds in float32."""
    assert measured.float32 is not None
    assert update.float32 is not None
    mask, old, new = measured.mask, measured.rollout, update.trained
    true = REMEDIES["published"](update.float32, measured.float32, mask) & mask
    gates = {name: gate(new, old, mask) & mask for name, gate in REMEDIES.items()}
    gates[HINDSIGHT] = in_hindsight(new, old, true, mask)
    return {name: agreement(found, true, mask) for name, found in gates.items()}


def in_hindsight(new: Pass, old: Pass, true: Tensor, mask: Tensor) -> Tensor:
    """What a gate finds whose floor and bounds (as far from 1 on either side) are chosen by looking at the answer.

    Of all that find `HINDSIGHT_RECALL` of the true tokens, the most precise: no choice of both does better.
    """
    best, precision = torch.zeros_like(mask), 0.0
    for floor in HINDSIGHT_FLOORS:
        change = torch.where(mask, entropy_ratio(new.entropies, old.entropies, floor).log().abs(), -1.0)
        for bound in change[true].unique():
            found = change >= bound
            hits = int((found & true).sum())
            if hits >= HINDSIGHT_RECALL * int(true.sum()) and hits / int(found.sum()) > precision:
                best, precision = found, hits / int(found.sum())
    return best
