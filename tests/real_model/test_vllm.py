"""vLLM on CPU with the pretrained model: its weights follow the policy's, and `eval` is that of transformers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed

from tests.trainers.test_grpo import logged
from tests.vllm import observe
from trl_entropy.evaluation.checkpoints import find_checkpoint
from trl_entropy.evaluation.engines import Sampling, TransformersEngine, VLLMEngine

from .conftest import LORA, POLICIES, PRECISIONS, SCHEDULE

pytestmark = [pytest.mark.real_model, pytest.mark.vllm]

NOISE = {"full": 0.02, "lora": 0.05}
SAMPLING = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=12)
ENGINE_SETTINGS = {"max_model_len": 64, "tensor_parallel_size": 1}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_engine_samples_from_the_policy(make_vllm_trainer: Callable[..., Any], policy: str) -> None:
    """In training, where both give the sampled tokens the same log-probs, and greedily after a large change."""
    settings = {**SCHEDULE, **POLICIES[policy], **PRECISIONS["float32"]}
    trainer = make_vllm_trainer(**settings, **observe.ALL_CONTROLS)
    rollouts = observe.keep_rollouts(trainer)
    trainer.train()
    assert len(rollouts) == 2
    for rollout in rollouts:
        sampled, recomputed = observe.sampled_and_recomputed(rollout)
        torch.testing.assert_close(sampled, recomputed, rtol=0, atol=3e-4)
    for key in observe.METRICS:
        assert all(math.isfinite(value) for value in logged(trainer, key)), key

    trainer.vllm_generation.sync_weights()
    assert observe.agreeing(trainer) == len(observe.PROMPTS)
    observe.change_a_lot(trainer, NOISE[policy])
    assert observe.agreeing(trainer) <= len(observe.PROMPTS) // 4  # by chance
    trainer.vllm_generation.sync_weights()
    assert observe.agreeing(trainer) == len(observe.PROMPTS)


@pytest.fixture(scope="module")
def folders(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The model, and an adapter on it."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_path), LORA)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapter.save_pretrained(folder)
    return {"model": tiny_model_path, "adapter": str(folder)}


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_both_engines_of_eval_say_the_same(
    engine: None,
    folders: dict[str, str],
    tiny_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Greedily, in float32, on prompts of different lengths."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a process of its own would compile
    questions = ["Is 7 odd?", "Name a colour that begins with the letter b.", "What is 2 + 2?", "Say hello to Ann."]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tiny_tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    checkpoint, seeds = find_checkpoint(folders[name]), range(len(prompts))
    settings = {"dtype": "float32", "trust_remote_code": False}
    expected = TransformersEngine(checkpoint, SAMPLING, **settings).generate(prompts, seeds)
    assert VLLMEngine(checkpoint, SAMPLING, **settings, **ENGINE_SETTINGS).generate(prompts, seeds) == expected
    if name == "adapter":
        base = TransformersEngine(find_checkpoint(folders["model"]), SAMPLING, **settings)
        assert base.generate(prompts, seeds) != expected
