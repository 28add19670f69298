"""The vLLM engine against the transformers engine, with vLLM itself, on CPU."""

import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

from tests.conftest import VOCABULARY
from trl_entropy.evaluation.checkpoints import find_checkpoint
from trl_entropy.evaluation.engines import Sampling, TransformersEngine, VLLMEngine

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: .ci/vllm-env makes an environment that has it", allow_module_level=True)

pytestmark = pytest.mark.vllm
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
PROMPTS = [[5, 6], [7], [8, 9, 10, 11], [12], [13, 14, 15]]
LENGTH = 16

Make = Callable[[str, float], VLLMEngine]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """A tiny model, with heads of 32 channels (vLLM's CPU attention has no smaller ones), and an adapter on it."""
    set_seed(0)
    path = tmp_path_factory.mktemp("vllm")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    ids = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **ids, tie_word_embeddings=False))
    model.save_pretrained(path / "model")
    tiny_tokenizer.save_pretrained(path / "model")
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = str(path / "model")
    adapter.save_pretrained(path / "adapter")
    return {name: str(path / name) for name in ("model", "adapter")}


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    """Engines that vLLM neither compiles nor starts a process for."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setitem(os.environ, name, value)
        torch.compiler.set_stance("force_eager")

        def make(folder: str, temperature: float) -> VLLMEngine:
            options = {"dtype": "float32", "trust_remote_code": False}
            lengths = {"max_model_len": 64, "tensor_parallel_size": 1}
            return VLLMEngine(find_checkpoint(folder), Sampling(temperature, 0.95, LENGTH), **options, **lengths)

        yield make
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_greedy_is_that_of_transformers(name: str, make: Make, folders: dict[str, str]) -> None:
    checkpoint = find_checkpoint(folders[name])
    plain = TransformersEngine(checkpoint, Sampling(0.0, 0.95, LENGTH), dtype="float32", trust_remote_code=False)
    expected = plain.generate(PROMPTS, range(5))
    assert make(folders[name], 0.0).generate(PROMPTS, range(5)) == expected
    assert any(completion.truncated for completion in expected)
    if name == "adapter":
        model = find_checkpoint(folders["model"])
        base = TransformersEngine(model, plain.sampling, dtype="float32", trust_remote_code=False)
        assert base.generate(PROMPTS, range(5)) != expected


def test_a_sample_depends_on_its_seed_and_not_on_its_place(make: Make, folders: dict[str, str]) -> None:
    engine, seeds = make(folders["model"], 1.0), [3, 1, 4, 15, 92]
    together = engine.generate(PROMPTS, seeds)
    alone = [engine.generate([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert together == alone
    assert together != engine.generate(PROMPTS, [seed + 1 for seed in seeds])
    for completion in together:
        assert completion.truncated == (completion.token_ids[-1] != 1) == (len(completion.token_ids) == LENGTH)
