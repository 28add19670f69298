"""Fixtures of the tests with a real vLLM engine, on CPU and inside the trainer's process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

from tests.conftest import VOCABULARY

from . import cpu_engine


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    """vLLM, trainable on CPU; skips the test where vLLM is not installed, or not for CPU."""
    pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm-env makes an environment that has it")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this vLLM is not the CPU build: .ci/vllm-env makes an environment that has it")
    with pytest.MonkeyPatch.context() as patch:
        cpu_engine.share_engines(patch)
        yield


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    """As in the tests above this folder, but with heads of 32 channels: vLLM's CPU attention has no smaller ones."""
    set_seed(0)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        bos_token_id=None,
    )
    path = tmp_path_factory.mktemp("tiny_qwen2_vllm")
    Qwen2ForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def make_vllm_trainer(make_trainer: Callable[..., Any], engine: None) -> Callable[..., Any]:
    """`make_trainer` with vLLM generating, and every trainer starting from the same random numbers."""

    def make(*args: Any, **overrides: Any) -> Any:
        trainer = make_trainer(*args, **{**cpu_engine.ENGINE, **overrides})
        cpu_engine.forget_launcher()
        # starting an engine seeds all generators, and only the first trainer starts one
        set_seed(trainer.args.seed)
        return trainer

    return make
