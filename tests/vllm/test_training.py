"""Training on vLLM's rollouts: with every control, and with none."""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from tests.reference import Batch, Settings
from tests.stubbed import trainer_config
from tests.trainers.test_model_gradients import TEMPERATURE, Observer, float64_copy, logps_and_entropies
from trl_entropy import AsyPPOConfig, AsyPPOTrainer

from .observe import ALL_CONTROLS, METRICS, keep_rollouts, logged, same, sampled_and_recomputed, weights

pytestmark = pytest.mark.vllm

MAX_ENGINE_RATIO = 1.2


def test_all_controls_train_the_policy(make_vllm_trainer: Callable[..., Any]) -> None:
    trainer = make_vllm_trainer(max_steps=8, learning_rate=0.01, **ALL_CONTROLS)
    start, rollouts = weights(trainer), keep_rollouts(trainer)
    trainer.train()
    assert not same(start, weights(trainer))
    assert len(logged(trainer, "loss")) == 8
    assert all(math.isfinite(value) for key in ("loss", "grad_norm") for value in logged(trainer, key))
    for key in METRICS:
        assert all(math.isfinite(value) for value in logged(trainer, key))
        assert max(logged(trainer, key)) > 0.0, key
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert rollout["old_entropies"].shape == rollout["old_per_token_logps"].shape


def test_asyppo_trains_the_policy(make_vllm_trainer: Callable[..., Any], tiny_model_path: str) -> None:
    """With a rollout for the critics alone before the first update."""
    trainer = make_vllm_trainer(
        trainer_class=functools.partial(AsyPPOTrainer, critics=tiny_model_path),
        config_class=AsyPPOConfig,
        max_steps=8,
        learning_rate=0.01,
        critic_learning_rate=0.01,
        critic_warmup_rollouts=1,
        entropy_coef=0.01,
        **ALL_CONTROLS,
    )
    start, rollouts = weights(trainer), keep_rollouts(trainer)
    critics = copy.deepcopy(trainer.critics.critics)
    trainer.train()
    assert not same(start, weights(trainer))
    for before, after in zip(critics, trainer.critics.critics, strict=True):
        assert not same(before.state_dict(), after.state_dict())
    assert all(math.isfinite(value) for key in ("loss", "grad_norm") for value in logged(trainer, key))
    for key in (*METRICS, "asyppo/masked_fraction"):
        assert max(logged(trainer, key)) > 0.0, key
    assert len(rollouts) == 3
    for rollout in rollouts:
        torch.testing.assert_close(*sampled_and_recomputed(rollout), rtol=1e-5, atol=1e-4)


def test_log_probs_of_engine_and_trainer_agree(make_vllm_trainer: Callable[..., Any]) -> None:
    """Both in float32, before the first update and after the fourth."""
    trainer = make_vllm_trainer(max_steps=8, learning_rate=0.01, **ALL_CONTROLS)
    rollouts = keep_rollouts(trainer)
    trainer.train()
    assert len(rollouts) == 2
    for rollout in rollouts:
        torch.testing.assert_close(*sampled_and_recomputed(rollout), rtol=1e-5, atol=1e-4)
        ratio = rollout["importance_sampling_ratio"]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)


def test_an_on_policy_schedule_leaves_the_controls_nothing_to_do(make_vllm_trainer: Callable[..., Any]) -> None:
    """With vLLM, TRL keeps the old log-probs even where each rollout serves one update."""
    with pytest.warns(UserWarning, match="every rollout is used for one optimizer step"):
        trainer = make_vllm_trainer(
            max_steps=3, steps_per_generation=1, per_device_train_batch_size=32, **ALL_CONTROLS
        )
    rollouts = keep_rollouts(trainer)
    trainer.train()
    assert all("old_entropies" in rollout for rollout in rollouts)
    assert logged(trainer, "erc/clip_fraction") == [0.0] * 3


@pytest.mark.parametrize("correction", [True, False])
def test_no_control_is_bit_for_bit_trl(
    make_vllm_trainer: Callable[..., Any], tmp_path: Path, correction: bool
) -> None:
    """vLLM in the trainer's process draws from torch's generator, so equal seeds give equal rollouts."""
    settings = {"max_steps": 8, "vllm_importance_sampling_correction": correction}
    ours = make_vllm_trainer(tmp_path / "ours", **settings)
    trls = make_vllm_trainer(tmp_path / "trl", trainer_class=GRPOTrainer, config_class=GRPOConfig, **settings)
    start, finals = weights(ours), []
    for trainer in (ours, trls):
        set_seed(5)
        trainer.train()
        finals.append(weights(trainer))
    assert same(*finals)
    assert not same(start, finals[0])
    assert logged(ours, "reward") == logged(trls, "reward")


class MismatchedEngine(Observer):
    """An engine that samples from weights a little off the policy's, as one in bfloat16 or a stale one does.

    The importance weight of that mismatch is computed here from both policies' logits in float64.
    """

    def __init__(self, trainer: Any, s: Settings, mode: str) -> None:
        super().__init__(trainer, s)
        self.mode = mode
        self.sampler = float64_copy(trainer.model)
        with torch.no_grad():
            for parameter in self.sampler.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.engine_ratios: list[Tensor] = []
        trainer.vllm_generation.sync_weights = self.sync_weights

    def sync_weights(self) -> None:
        model = self.trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
        model.load_weights((name, value.float()) for name, value in self.sampler.named_parameters())

    def batch(self, policy: torch.nn.Module, inputs: dict[str, Tensor]) -> Batch:
        b = super().batch(policy, inputs)
        with torch.no_grad():
            lp_sampling, _ = logps_and_entropies(self.sampler, inputs)
        assert b.lp_old is not None
        difference = (b.lp_old - lp_sampling) * b.mask
        if self.mode == "sequence_mask":
            ratio = torch.exp(difference.sum(-1, keepdim=True))
            b.engine_ratio = torch.where(ratio > MAX_ENGINE_RATIO, 0.0, ratio)
        else:
            b.engine_ratio = torch.exp(difference).clamp(max=MAX_ENGINE_RATIO)
        self.engine_ratios.append(b.engine_ratio.flatten())
        return b


@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_the_correction_composes_with_all_controls(make_vllm_trainer: Callable[..., Any], mode: str) -> None:
    """The papers' loss of each token, times the importance weight of the engine's mismatch, at every update."""
    s = Settings(
        erc=(0.95, 1.05),
        alphas=(0.75, 1.1),
        nll_coef=0.1,
        eps_hi=0.28,
        max_completion_length=6,
        micro_batches_per_rollout=4,
    )
    trainer = make_vllm_trainer(
        **trainer_config(s),
        temperature=TEMPERATURE,
        num_iterations=2,
        max_steps=8,
        learning_rate=0.005,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=MAX_ENGINE_RATIO,
    )
    observer = MismatchedEngine(trainer, s, mode)
    trainer.train()
    assert len(observer.gradient_errors) == 8
    assert max(observer.entropy_errors) < 3e-5, observer.entropy_errors
    assert max(observer.gradient_errors) < 1e-4, observer.gradient_errors
    assert len(observer.fates) == 6, observer.fates  # low, high and inside, each gated or not
    ratios = torch.cat(observer.engine_ratios)
    bound = 0.0 if mode == "sequence_mask" else MAX_ENGINE_RATIO
    assert (ratios == bound).any()
    assert ratios[ratios != bound].std() > 0.01
