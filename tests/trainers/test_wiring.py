"""Every field of the trainers' configurations changes something that can be seen.

A new field must be added to `CHANGES`, with what shall differ when it does: a field that nothing reads fails the test.
The other configurations have their tables in `test_async_wiring.py`, `tests/ppo/test_wiring.py` and
`tests/commands/test_wiring.py`.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from trl import GRPOConfig, RLOOConfig

from tests.tasks.test_multi_turn_training import multi_turn_trainer
from tests.trainers.test_grpo import logged, weights
from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyRLOOConfig, EntropyRLOOTrainer
from trl_entropy.controls import CONTROLS
from trl_entropy.telemetry.record import read_record
from trl_entropy.trainers.rloo import ENTROPIES_WITH_GRADIENTS

ERC = {"erc_low": 0.95, "erc_high": 1.05}
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0, "epsilon": 0.01}
ENTROPY_ADVANTAGE = {"entropy_advantage_alpha": 0.4}
DPPO = {"dppo_divergence": "tv", "dppo_delta_low": 1e-3, "dppo_delta_high": 1e-3}
STARE = {"stare_target_entropy": 9.0, "stare_variant": "C2"}
ADAPTIVE_STARE = {**STARE, "stare_adaptive_step": 0.5}
EPO = {"epo_coef": 1.0, "epo_penalty": 1.0, "epo_kappa_low": 1.0, "epo_kappa_high": 1.001}
NLL = {"positive_nll_coef": 1.0}
PAR = {"par_schedule": "entropy", "par_initial": 0.5}
LOOP = {**CE_GPPO, "ce_gppo_loop_target": 1.0, "ce_gppo_loop_kp": 0.3, "ce_gppo_loop_ki": 0.3}
FIPO = {"fipo_half_life": 4.0, "fipo_raise_only": False}
ENTROPIC = {"entropic_target": 0.5, "entropic_kp": 0.3, "entropic_ki": 0.3, "entropic_probability": 0.3}
KL_COV = {"kl_cov_coef": 1.0, "kl_cov_fraction": 0.2, "epsilon": 0.01}
CLIP_COV = {"clip_cov_fraction": 0.1, "clip_cov_low": 0.05, "clip_cov_high": 0.8}
CRITICS = {"critic_learning_rate": 1e-2, "entropy_coef": 0.01}

POLICY, CRITIC, RECORD = "policy", "critic", "record"
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "erc_low": (ERC, {"erc_low": 0.999}, POLICY),
    "erc_high": (ERC, {"erc_high": 1.001}, POLICY),
    "erc_entropy_floor": (ERC, {"erc_entropy_floor": 10.0}, POLICY),
    "erc_side": (ERC, {"erc_side": "outward"}, POLICY),
    "erc_target_fraction": ({**ERC, "max_steps": 6}, {"erc_target_fraction": 0.9}, POLICY),
    "ce_gppo_alpha1": (CE_GPPO, {"ce_gppo_alpha1": 0.1}, POLICY),
    "ce_gppo_alpha2": (CE_GPPO, {"ce_gppo_alpha2": 0.1}, POLICY),
    "entropy_advantage_alpha": (ENTROPY_ADVANTAGE, {"entropy_advantage_alpha": 0.0}, POLICY),
    "entropy_advantage_kappa": (ENTROPY_ADVANTAGE, {"entropy_advantage_kappa": 4.0}, POLICY),
    "dppo_divergence": (DPPO, {"dppo_divergence": "kl"}, POLICY),
    "dppo_delta_low": (DPPO, {"dppo_delta_low": 0.1}, POLICY),
    "dppo_delta_high": (DPPO, {"dppo_delta_high": 0.1}, POLICY),
    "dppo_truncation": ({**DPPO, "dppo_delta_high": 1.0}, {"dppo_truncation": 1.0}, POLICY),
    "stare_target_entropy": (STARE, {"stare_target_entropy": 0.01}, POLICY),
    "stare_variant": (STARE, {"stare_variant": "O1"}, POLICY),
    "stare_fraction": (STARE, {"stare_fraction": 0.5}, POLICY),
    "stare_positive_weight": (STARE, {"stare_positive_weight": 1.4}, POLICY),
    "stare_negative_weight": (STARE, {"stare_negative_weight": 0.6}, POLICY),
    "stare_adaptive_step": (STARE, {"stare_adaptive_step": 0.2}, POLICY),
    "stare_positive_max": (ADAPTIVE_STARE, {"stare_positive_max": 1.2}, POLICY),
    "stare_negative_min": (ADAPTIVE_STARE, {"stare_negative_min": 0.8}, POLICY),
    "epo_coef": (EPO, {"epo_coef": 0.0}, POLICY),
    "epo_kappa_low": (EPO, {"epo_kappa_low": 0.5}, POLICY),
    "epo_kappa_high": (EPO, {"epo_kappa_high": 2.0}, POLICY),
    "epo_penalty": (EPO, {"epo_penalty": 0.1}, POLICY),
    "epo_gamma": (EPO, {"epo_gamma": 30.0}, POLICY),
    "epo_schedule": (EPO, {"epo_schedule": "grow"}, POLICY),
    "epo_form": (EPO, {"epo_form": "indicator"}, POLICY),
    "epo_history": ({**EPO, "episodes": True}, {"epo_history": "per_turn"}, "metric epo/history"),
    "ce_gppo_loop_target": (LOOP, {"ce_gppo_loop_target": 3.0}, POLICY),
    "ce_gppo_loop_kp": (LOOP, {"ce_gppo_loop_kp": 0.0}, POLICY),
    "ce_gppo_loop_ki": (LOOP, {"ce_gppo_loop_ki": 0.0}, POLICY),
    "target_entropy": ({}, {"target_entropy": 0.5}, POLICY),
    "target_entropy_by": ({"target_entropy": 3.0}, {"target_entropy_by": "par"}, POLICY),
    "par_schedule": (PAR, {"par_schedule": "stage"}, POLICY),
    "par_target": (PAR, {"par_target": 9.0}, POLICY),
    "par_delta": (PAR, {"par_delta": 0.5}, POLICY),
    "par_initial": (PAR, {"par_initial": 0.1}, POLICY),
    "fipo_half_life": (FIPO, {"fipo_half_life": 1.0}, POLICY),
    "fipo_clip_range": (FIPO, {"fipo_clip_range": 0.02}, POLICY),
    "fipo_raise_only": (FIPO, {"fipo_raise_only": True}, POLICY),
    "fipo_max_ratio": (FIPO, {"fipo_max_ratio": 1.01}, POLICY),
    "fipo_safe_ratio": (FIPO, {"fipo_safe_ratio": 1.001}, POLICY),
    "entropic_target": (ENTROPIC, {"entropic_target": 3.0}, POLICY),
    "entropic_kp": (ENTROPIC, {"entropic_kp": 0.0}, POLICY),
    "entropic_ki": (ENTROPIC, {"entropic_ki": 0.0}, POLICY),
    "entropic_probability": (ENTROPIC, {"entropic_probability": 0.6}, POLICY),
    "positive_nll_coef": (NLL, {"positive_nll_coef": 0.0}, POLICY),
    "positive_nll_min_reward": (NLL, {"positive_nll_min_reward": 2.0}, POLICY),
    "kl_cov_coef": (KL_COV, {"kl_cov_coef": 0.1}, POLICY),
    "kl_cov_fraction": (KL_COV, {"kl_cov_fraction": 0.5}, POLICY),
    "kl_cov_selection": (KL_COV, {"kl_cov_selection": "micro_batch"}, POLICY),
    "kl_cov_ppo_clip": (KL_COV, {"kl_cov_ppo_clip": True}, POLICY),
    "clip_cov_fraction": (CLIP_COV, {"clip_cov_fraction": 0.01}, POLICY),
    "clip_cov_low": (CLIP_COV, {"clip_cov_low": 0.5}, POLICY),
    "clip_cov_high": (CLIP_COV, {"clip_cov_high": 0.1}, POLICY),
    "clip_cov_selection": (CLIP_COV, {"clip_cov_selection": "micro_batch"}, POLICY),
    "qae_quantile": ({"qae_quantile": 0.4}, {"qae_quantile": 0.8}, POLICY),
    "steer_min_weight": ({"steer_min_weight": 0.5}, {"steer_min_weight": 0.9}, POLICY),
    "record_tokens": ({}, {"record_tokens": 4}, RECORD),
    "num_critics": (CRITICS, {"num_critics": 3}, "metric asyppo/critic_2/loss"),
    "critic_learning_rate": (CRITICS, {"critic_learning_rate": 1e-3}, CRITIC),
    "critic_num_epochs": (CRITICS, {"critic_num_epochs": 2}, CRITIC),
    "critic_per_device_train_batch_size": (CRITICS, {"critic_per_device_train_batch_size": 1}, CRITIC),
    "critic_warmup_rollouts": (CRITICS, {"critic_warmup_rollouts": 1}, CRITIC),
    "critic_gradient_checkpointing": (CRITICS, {"critic_gradient_checkpointing": True}, "checkpointing"),
    "critic_dtype": (CRITICS, {"critic_dtype": "bfloat16"}, CRITIC),
    "gae_gamma": (CRITICS, {"gae_gamma": 0.5}, POLICY),
    "gae_lambda": (CRITICS, {"gae_lambda": 0.5}, POLICY),
    "critic_gae_lambda": (CRITICS, {"critic_gae_lambda": 0.5}, CRITIC),
    "bootstrap_truncated": (CRITICS, {"bootstrap_truncated": True}, CRITIC),
    "whiten_advantages": (CRITICS, {"whiten_advantages": False}, POLICY),
    "advantage_mask_fraction": (CRITICS, {"advantage_mask_fraction": 0.5}, POLICY),
    "entropy_filter_fraction": (CRITICS, {"entropy_filter_fraction": 0.9}, POLICY),
}
"""Field: the settings around it, the change, and what it must change."""

RLOO = {"trainer_class": EntropyRLOOTrainer, "config_class": EntropyRLOOConfig, "max_steps": 2}
RLOO_CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "qae_quantile": ({**RLOO, "qae_quantile": 0.4}, {"qae_quantile": 0.8}, POLICY),
    "positive_nll_coef": ({**RLOO, **NLL}, {"positive_nll_coef": 0.5}, POLICY),
    "epo_coef": ({**RLOO, **EPO}, {"epo_coef": 0.5}, POLICY),
}
"""A field of each control of RLOO, whose way to the loss is RLOO's own. What the others do there is the control's."""


def names(config_class: type) -> set[str]:
    return {field.name for field in fields(config_class)}


def test_every_field_is_in_the_table():
    assert set(CHANGES) == names(AsyPPOConfig) - names(GRPOConfig)
    assert names(EntropyGRPOConfig) < names(AsyPPOConfig)


def test_every_control_of_rloo_is_in_its_table():
    own = names(EntropyRLOOConfig) - names(RLOOConfig)
    assert own < CHANGES.keys()
    controls = [control for control in CONTROLS if own & set(control.fields)]
    assert [len(RLOO_CHANGES.keys() & set(control.fields)) for control in controls] == [1] * len(RLOO_CHANGES)


@pytest.fixture
def observe(make_trainer: Callable[..., Any], tiny_model_path: str, tmp_path: Path) -> Callable[..., Any]:
    """`observe(run, settings, what)`: train two rollouts of two steps each with these settings; what is seen."""

    def observe(run: str, settings: dict[str, Any], what: str) -> Any:
        # a rate at which two updates leave ERC's bounds and a narrow trust region
        settings = {"max_steps": 4, "steps_per_generation": 2, "learning_rate": 3e-2, **settings}
        make = multi_turn_trainer if settings.pop("episodes", False) else type(make_trainer).__call__
        if settings.keys() & (names(AsyPPOConfig) - names(EntropyGRPOConfig)):
            settings["config_class"] = AsyPPOConfig
            settings["trainer_class"] = lambda **kwargs: AsyPPOTrainer(**kwargs, critics=tiny_model_path)
        trainer = make(make_trainer, output_dir=tmp_path / run, **settings)
        trainer.train()
        match what.split():
            case ["policy"]:
                return torch.cat([value.flatten() for value in weights(trainer).values()]).tolist()
            case ["critic"]:
                return [value.flatten().tolist() for value in trainer.critics.critics[0].state_dict().values()]
            case ["record"]:
                return read_record(Path(trainer.args.output_dir)) is None
            case ["checkpointing"]:
                return [critic.is_gradient_checkpointing for critic in trainer.critics.critics]
            case ["metric", key]:
                return logged(trainer, key)
        raise ValueError(what)

    return observe


@pytest.fixture
def differs(observe: Callable[..., Any], bases: dict[str, Any]) -> Callable[..., bool]:
    """`differs(settings, change, what)`: whether the change makes what is seen another."""

    def differs(settings: dict[str, Any], change: dict[str, Any], what: str) -> bool:
        key = repr((settings, what))
        if key not in bases:
            bases[key] = observe("base", settings, what)
        return observe("changed", {**settings, **change}, what) != bases[key]

    return differs


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_changes_what_it_says(differs, field):
    assert differs(*CHANGES[field])


@pytest.mark.parametrize("field", RLOO_CHANGES)
def test_a_field_of_rloo_changes_what_it_says(differs, field):
    if field.startswith("epo") and Version(trl.__version__) < Version(ENTROPIES_WITH_GRADIENTS):
        pytest.skip(f"RLOO takes EPO from TRL {ENTROPIES_WITH_GRADIENTS} on")
    assert differs(*RLOO_CHANGES[field])
