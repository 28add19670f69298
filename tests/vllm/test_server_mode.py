"""TRL's server mode: vLLM in processes of its own, on the loopback address."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from . import cpu_server
from .observe import (
    ALL_CONTROLS,
    METRICS,
    POLICIES,
    PROMPTS,
    agreeing,
    change_a_lot,
    keep_rollouts,
    logged,
    same,
    sampled_and_recomputed,
    weights,
)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(engine: None, tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", cpu_server.LOOPBACK)
        cpu_server.send_by_file(patch, folder / "weights.safetensors")
        with cpu_server.serve(tiny_model_path, folder) as url:
            yield url


@pytest.fixture
def make_server_trainer(make_vllm_trainer: Callable[..., Any], server: str) -> Callable[..., Any]:
    def make(**overrides: Any) -> Any:
        return make_vllm_trainer(vllm_mode="server", vllm_server_base_url=server, **overrides)

    return make


@pytest.mark.parametrize("policy", POLICIES)
def test_all_controls_train_the_policy(make_server_trainer: Callable[..., Any], policy: str) -> None:
    trainer = make_server_trainer(max_steps=8, **POLICIES[policy], **ALL_CONTROLS)
    start, rollouts = weights(trainer), keep_rollouts(trainer)
    trainer.train()
    assert not same(start, weights(trainer))
    assert all(math.isfinite(value) for key in ("loss", "grad_norm") for value in logged(trainer, key))
    for key in METRICS:
        assert max(logged(trainer, key)) > 0.0, key
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert rollout["old_entropies"].shape == rollout["old_per_token_logps"].shape
        torch.testing.assert_close(*sampled_and_recomputed(rollout), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_large_change_reaches_the_server(make_server_trainer: Callable[..., Any], policy: str) -> None:
    trainer = make_server_trainer(**POLICIES[policy], **ALL_CONTROLS)
    trainer.vllm_generation.sync_weights()
    assert agreeing(trainer) == len(PROMPTS)
    change_a_lot(trainer)
    assert agreeing(trainer) < len(PROMPTS) // 4  # by chance
    trainer.vllm_generation.sync_weights()
    assert agreeing(trainer) == len(PROMPTS)
