"""TRL's PPOTrainer with every control trains the pretrained model, on TRL 1.12."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.trainers.test_grpo import logged

from .conftest import KINDS, LORA, check_entries

pytest.importorskip("trl.experimental.ppo", reason="trl.experimental.ppo is in TRL 1.12 alone")

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("quick_bfloat16")]

CONTROLS = {
    "erc_low": 0.95,
    "erc_high": 1.05,
    "ce_gppo_alpha1": 0.75,
    "ce_gppo_alpha2": 1.0,
    "epo_coef": 0.1,
    "entropy_coef": 0.01,
}
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 2e-5},
    "lora": {"learning_rate": 2e-3, "peft_config": LORA},
}
SCHEDULE = {"total_episodes": 8, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "response_length": 4}
"""Two rollouts of four completions, and two epochs of two optimizer steps on each."""


@pytest.mark.parametrize(("policy", "precision"), KINDS)
def test_every_control_trains_the_policy(make_ppo: Callable[..., Any], policy: str, precision: str) -> None:
    settings = {"bf16": precision == "bfloat16", "dtype": getattr(torch, precision)}
    trainer = make_ppo(**SCHEDULE, **POLICIES[policy], **CONTROLS, **settings)
    assert {value.dtype for name, value in trainer.policy_model.named_parameters() if "lora_" not in name} == {
        settings["dtype"]
    }
    start = {name: value.clone() for name, value in trainer.policy_model.state_dict().items()}
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "erc/clip_fraction" in entry]
    assert len(entries) == 2
    check_entries(entries)
    assert min(logged(trainer, "erc/clip_fraction")) > 0
    moved = {name for name, value in trainer.policy_model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved
    if policy == "lora":
        assert all("lora_" in name for name in moved)
