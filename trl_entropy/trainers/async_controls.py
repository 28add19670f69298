"""Which controls asynchronous GRPO has; apart from the trainer, for which TRL has to have one."""

from ..controls import CONTROLS

REFUSED: dict[str, str] = {
    "qae": "the rollout worker has normalised the rewards of a group before its samples come here one by one, and a "
    "quantile needs all of them",
    "asyppo": "its critics are trained on whole rollouts, and samples come here one by one",
    "coefficient": "TRL's asynchronous loss has no entropy bonus whose coefficient could be adapted",
}
"""Prefixes of the controls that asynchronous training does not have, and why."""
SUPPORTED = frozenset(control.prefix for control in CONTROLS) - REFUSED.keys()
"""Prefixes of those that it has."""
