"""Every control of asynchronous training, and each field that it reads itself, changes something that can be seen.

What the further fields of a control do is in the table of `test_wiring.py`: it is the same control, given the same
configuration.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_entropy.controls import CONTROLS
from trl_entropy.telemetry.record import read_record

from . import async_parts
from .test_wiring import (
    CE_GPPO,
    CLIP_COV,
    DPPO,
    ENTROPIC,
    ENTROPY_ADVANTAGE,
    EPO,
    ERC,
    FIPO,
    KL_COV,
    LOOP,
    NLL,
    PAR,
    POLICY,
    RECORD,
    STARE,
    names,
)
from .test_wiring import CHANGES as SYNCHRONOUS

EntropyAsyncGRPOConfig = async_parts.require("async_config").EntropyAsyncGRPOConfig
from trl_entropy.trainers.async_contact import AsyncGRPOConfig  # noqa: E402
from trl_entropy.trainers.async_controls import REFUSED, SUPPORTED  # noqa: E402

LATER = {"max_steps": 3}
"""For what compares with an update before."""
LIKELY = 0.01
"""Probability of the made-up tokens that EntroPIC weighs."""
TO_TARGET = {**ENTROPIC, **LATER, "entropic_probability": LIKELY}
BY_ENTROPIC = {"target_entropy": 3.0, "target_entropy_by": "entropic", "entropic_probability": LIKELY}
ANY_COVARIANCE = {"clip_cov_low": -100.0, "clip_cov_high": 100.0}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "erc_low": ({**ERC, **LATER}, {"erc_low": 0.5}, POLICY),
    "ce_gppo_alpha1": (CE_GPPO, {"ce_gppo_alpha1": 0.1}, POLICY),
    "entropy_advantage_alpha": (ENTROPY_ADVANTAGE, {"entropy_advantage_alpha": 0.1}, POLICY),
    "dppo_delta_low": (DPPO, {"dppo_delta_low": 0.5}, POLICY),
    "stare_fraction": (STARE, {"stare_fraction": 0.5}, POLICY),
    "epo_coef": (EPO, {"epo_coef": 0.5}, POLICY),
    "epo_schedule": ({**EPO, **LATER}, {"epo_schedule": "grow"}, POLICY),
    "ce_gppo_loop_kp": (LOOP, {"ce_gppo_loop_kp": 0.0}, POLICY),
    "target_entropy": ({**BY_ENTROPIC, **LATER}, {"target_entropy": 0.5}, POLICY),
    "target_entropy_by": (BY_ENTROPIC, {"target_entropy_by": "par"}, POLICY),
    "par_initial": (PAR, {"par_initial": 0.1}, POLICY),
    "fipo_clip_range": (FIPO, {"fipo_clip_range": 0.02}, POLICY),
    "entropic_kp": (TO_TARGET, {"entropic_kp": 0.0}, POLICY),
    "positive_nll_coef": (NLL, {"positive_nll_coef": 0.5}, POLICY),
    "kl_cov_coef": (KL_COV, {"kl_cov_coef": 0.1}, POLICY),
    "clip_cov_fraction": ({**CLIP_COV, **ANY_COVARIANCE}, {"clip_cov_fraction": 0.5}, POLICY),
    "steer_min_weight": ({"steer_min_weight": 0.5}, {"steer_min_weight": 0.9}, POLICY),
    "record_tokens": ({}, {"record_tokens": 4}, RECORD),
}
"""A field of each control, and those that the trainer or its configuration reads."""


def test_every_control_is_in_the_table() -> None:
    own = names(EntropyAsyncGRPOConfig) - names(AsyncGRPOConfig)
    assert CHANGES.keys() < own
    tested = {control.prefix for control in CONTROLS if CHANGES.keys() & set(control.fields)}
    assert tested == SUPPORTED | {"coefficient"}  # whose fields set those of others
    refused = {name for control in CONTROLS if control.prefix in REFUSED for name in control.fields}
    assert own - SYNCHRONOUS.keys() <= refused


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_changes_what_it_says(
    make_async: Callable[..., Any], bases: dict[str, Any], tmp_path: Path, field: str
) -> None:
    def seen(settings: dict[str, Any]) -> Any:
        trainer = make_async(tmp_path / "run", **{"max_steps": 1, **settings})
        trainer.train()
        if what == RECORD:
            return read_record(tmp_path / "run") is None
        return torch.cat([value.detach().flatten() for value in trainer.model.parameters()]).tolist()

    settings, change, what = CHANGES[field]
    key = repr((settings, what))
    if key not in bases:
        bases[key] = seen(settings)
    assert seen({**settings, **change}) != bases[key]
