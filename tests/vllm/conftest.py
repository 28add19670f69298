"""Fixtures of the tests with a real vLLM engine, on CPU and inside the trainer's process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, set_seed

from . import cpu_engine


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    """vLLM, trainable on CPU; skips the test where vLLM is not installed, or not for CPU."""
    cpu_engine.require()
    with pytest.MonkeyPatch.context() as patch:
        cpu_engine.share_engines(patch)
        yield


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    """As in the tests above this folder, but of a size that vLLM runs."""
    return cpu_engine.save_tiny_model(
        tmp_path_factory.mktemp("tiny_qwen2_vllm"), tiny_tokenizer, pad_token_id=tiny_tokenizer.pad_token_id
    )


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
