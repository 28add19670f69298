"""Every field of `EntropyPPOConfig` changes something that can be seen.

Of the fields of a control one is enough, where the trainer reads no more: what the others do is in the table of
`tests/trainers/test_wiring.py`, and it is the same control, given the same configuration.
"""

from dataclasses import fields
from typing import Any

import pytest
import torch

from tests.trainers.test_wiring import CHANGES, CRITIC, EPO, ERC, POLICY
from trl_entropy.controls import CONTROLS

pytest.importorskip("trl.experimental.ppo", reason="trl.experimental.ppo is in TRL 1.12 alone")

from trl_entropy.ppo import trainer as ppo_trainer
from trl_entropy.ppo import vllm
from trl_entropy.ppo.config import PPOControls

CRITICS = {"critic_learning_rate": 1e-2, "entropy_coef": 0.1}
TWO_ROLLOUTS = {"total_episodes": 16}
ENGINE = "engine"
PPO_CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "erc_low": (ERC, {"erc_low": 0.999}, POLICY),
    "ce_gppo_alpha1": ({"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}, {"ce_gppo_alpha1": 0.1}, POLICY),
    "epo_coef": ({**EPO, **TWO_ROLLOUTS}, {"epo_coef": 0.5}, POLICY),
    "epo_schedule": ({**EPO, **TWO_ROLLOUTS}, {"epo_schedule": "grow"}, POLICY),
    "entropy_coef": ({}, {"entropy_coef": 0.1}, POLICY),
    "num_critics": (CRITICS, {"num_critics": 3}, "critics"),
    "critic_learning_rate": (CRITICS, {"critic_learning_rate": 1e-3}, CRITIC),
    "critic_num_epochs": (CRITICS, {"critic_num_epochs": 2}, CRITIC),
    "critic_per_device_train_batch_size": (CRITICS, {"critic_per_device_train_batch_size": 1}, CRITIC),
    "critic_gradient_checkpointing": (CRITICS, {"critic_gradient_checkpointing": True}, "checkpointing"),
    "critic_dtype": (CRITICS, {"critic_dtype": "bfloat16"}, CRITIC),
    "critic_gae_lambda": (CRITICS, {"critic_gae_lambda": 0.5}, CRITIC),
    "advantage_mask_fraction": ({**CRITICS, **TWO_ROLLOUTS}, {"advantage_mask_fraction": 0.5}, POLICY),
    "entropy_filter_fraction": ({**CRITICS, **TWO_ROLLOUTS}, {"entropy_filter_fraction": 0.9}, POLICY),
    "use_vllm": ({}, {"use_vllm": True}, ENGINE),
    "vllm_gpu_memory_utilization": ({"use_vllm": True}, {"vllm_gpu_memory_utilization": 0.5}, ENGINE),
    "vllm_max_model_length": ({"use_vllm": True}, {"vllm_max_model_length": 64}, ENGINE),
    "vllm_enable_sleep_mode": ({"use_vllm": True}, {"vllm_enable_sleep_mode": True}, ENGINE),
}
"""Field: the settings around it, the change, and what it must change."""


def test_every_field_is_in_the_table() -> None:
    own = {field.name for field in fields(PPOControls)}
    reached = {name for control in CONTROLS if PPO_CHANGES.keys() & set(control.fields) for name in control.fields}
    assert PPO_CHANGES.keys() <= own <= PPO_CHANGES.keys() | (reached & CHANGES.keys())


@pytest.fixture
def engines(monkeypatch) -> list[dict[str, Any]]:
    """What each of vLLM's engines was asked for."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(vllm, "VLLMGeneration", lambda **options: asked.append(options))
    monkeypatch.setattr(ppo_trainer, "require_device", lambda: None)
    return asked


@pytest.fixture
def observe(make_ppo, tiny_model_path, engines):
    """`observe(settings, what)`: train a rollout or two with these settings; what is seen."""

    def observe(settings: dict[str, Any], what: str) -> Any:
        engines.clear()
        critics = {"critics": tiny_model_path} if settings.keys() & CRITICS.keys() - {"entropy_coef"} else {}
        trainer = make_ppo(**critics, **{"total_episodes": 8, **settings})
        if what == ENGINE:
            simple = (bool, int, float, str)
            return [{k: v for k, v in asked.items() if v is None or isinstance(v, simple)} for asked in engines]
        if what == "checkpointing":
            return [critic.is_gradient_checkpointing for critic in trainer.critics.critics]
        if what == "critics":
            return len(trainer.critics.critics)
        trainer.train()
        model = trainer.policy_model if what == POLICY else trainer.critics.critics[0]
        return torch.cat([value.flatten() for value in model.state_dict().values()]).tolist()

    return observe


@pytest.mark.parametrize("field", PPO_CHANGES)
def test_a_field_changes_what_it_says(observe, bases, field) -> None:
    settings, change, what = PPO_CHANGES[field]
    key = repr((settings, what))
    if key not in bases:
        bases[key] = observe(settings, what)
    assert observe({**settings, **change}, what) != bases[key]
