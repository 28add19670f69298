"""Every further control of the table trains the pretrained model: it acts, and what it says of itself is sound."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.trainers.test_grpo import logged, weights
from trl_entropy.controls import CONTROLS

from .conftest import KINDS, check_entries

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("quick_bfloat16")]

ELSEWHERE = {"erc", "ce_gppo", "asyppo", "epo", "positive_nll"}
"""Prefixes of the controls of `test_training.py`."""
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}
FAMILY: dict[str, tuple[dict[str, Any], str]] = {
    "qae": ({"qae_quantile": 0.4}, "qae/zero_fraction"),
    "entropy_advantage": ({"entropy_advantage_alpha": 0.4}, "entropy_advantage/added"),
    "dppo": ({"dppo_divergence": "tv", "dppo_delta_low": 0.01, "dppo_delta_high": 0.01}, "dppo/dropped_fraction"),
    "ce_gppo_loop": ({**CE_GPPO, "ce_gppo_loop_target": 0.3}, "ce_gppo_loop/actuator"),
    "par": ({"par_schedule": "entropy", "par_target": 9.0}, "par/dropped_fraction"),
    "entropic": ({"entropic_target": 0.1, "entropic_probability": 0.3}, "entropic/weighted_fraction"),
    "stare": ({"stare_target_entropy": 9.0}, "stare/raised_fraction"),
    "steer": ({"steer_min_weight": 0.7}, "steer/scale"),
    "fipo": ({"fipo_half_life": 2.0}, "fipo/weight"),
    "clip_cov": ({"clip_cov_fraction": 0.1, "clip_cov_low": 0.0, "clip_cov_high": 50.0}, "clip_cov/clip_fraction"),
    "kl_cov": ({"kl_cov_coef": 1.0, "kl_cov_fraction": 0.2}, "kl_cov/penalised_fraction"),
    "coefficient": ({"target_entropy": 9.0, "target_entropy_by": "coefficient"}, "coefficient/set_point"),
    "erc_target": (
        {"erc_low": 0.95, "erc_high": 1.05, "erc_target_fraction": 0.5, "erc_side": "outward"},
        "erc/clip_fraction",
    ),
}
"""Settings, and a metric that is not 0 throughout where the control acts."""
GROUPS = (
    ("qae", "dppo", "entropic", "steer"),
    ("entropy_advantage", "ce_gppo_loop", "fipo", "clip_cov"),
    ("par", "kl_cov"),
    ("stare", "erc_target"),
    ("coefficient",),
)
"""Controls that are on at once: each closed loop on the entropy needs a run of its own."""


def test_every_control_is_in_a_group() -> None:
    trained = {name for group in GROUPS for name in group}
    assert {control.prefix for control in CONTROLS} - ELSEWHERE == trained - {"erc_target"}


@pytest.mark.parametrize(("policy", "precision"), KINDS)
@pytest.mark.parametrize("group", GROUPS, ids="+".join)
def test_they_train_and_act(
    make_real_trainer: Callable[..., Any], group: tuple[str, ...], policy: str, precision: str
) -> None:
    settings = {name: value for one in group for name, value in FAMILY[one][0].items()}
    trainer = make_real_trainer(policy, precision, **settings)
    start = weights(trainer)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    check_entries(steps)
    for name in group:
        assert any(value != 0.0 for value in logged(trainer, FAMILY[name][1])), name
    moved = {key for key, value in weights(trainer).items() if not torch.equal(value, start[key])}
    assert moved
    assert policy == "full" or all("lora_" in key for key in moved)
