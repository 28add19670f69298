"""DPPO measures from what vLLM sampled by, where a rollout is used for one optimizer step too."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from .observe import change_a_lot, keep_rollouts, logged

pytestmark = pytest.mark.vllm

ON_POLICY = {
    "max_steps": 2,
    "steps_per_generation": 1,
    "per_device_train_batch_size": 32,
    "dppo_divergence": "tv",
    "vllm_importance_sampling_correction": False,
}


@pytest.fixture
def make_dppo_trainer(make_vllm_trainer: Callable[..., Any]) -> Callable[..., Any]:
    def make(**settings: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*will do nothing")
            return make_vllm_trainer(**ON_POLICY | settings)

    return make


def test_the_distance_is_the_gap_between_engine_and_trainer(make_dppo_trainer: Callable[..., Any]) -> None:
    trainer = make_dppo_trainer()
    rollouts = keep_rollouts(trainer)
    trainer.train()
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert "old_per_token_logps" not in rollout
        assert "importance_sampling_ratio" not in rollout
    assert all(0.0 < distance < 1e-4 for distance in logged(trainer, "dppo/divergence"))
    assert logged(trainer, "dppo/dropped_fraction") == [0.0] * 2


def test_an_engine_of_other_weights_is_seen(make_dppo_trainer: Callable[..., Any]) -> None:
    trainer = make_dppo_trainer(dppo_delta_low=0.01, dppo_delta_high=0.01, max_steps=1)
    change_a_lot(trainer)
    trainer.vllm_generation.sync_weights = lambda: None
    rollouts = keep_rollouts(trainer)
    trainer.train()
    assert max(logged(trainer, "dppo/dropped_fraction")) > 0.0
    assert max(logged(trainer, "dppo/divergence")) > 0.01
    assert "old_per_token_logps" not in rollouts[0]
