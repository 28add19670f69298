"""TRL's asynchronous trainer with vLLM's server on the loopback address, some twenty updates."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from datasets import Dataset

from tests.trainers import async_parts
from trl_entropy.telemetry.staleness import AGES

from . import cpu_engine, cpu_server
from .async_server import FileTransfer, conversational_tokenizer, reward
from .observe import ALL_CONTROLS, METRICS, logged

pytestmark = pytest.mark.vllm

UPDATES = 20
TRAINING = {
    **async_parts.OFF,
    "save_strategy": "no",
    "max_steps": UPDATES,
    "learning_rate": 0.01,
    "epsilon": 0.05,  # some tokens are to leave the range
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_inflight_tasks": 16,
    "max_staleness": 3,
    "token_budget": 0,
    "seed": 0,
}
PROMPTS = [f"{i}+{7 * i % 32}="[: 2 + i % 5] for i in range(16)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """The path of a model, the URL of its server, and a folder."""
    cpu_engine.require()
    folder = tmp_path_factory.mktemp("async")
    model = cpu_engine.save_tiny_model(folder / "model", conversational_tokenizer(), pad_token_id=0)
    (folder / "server").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", cpu_server.LOOPBACK)
        for name, value in cpu_engine.VLLM_SETTINGS.items():
            patch.setenv(name, value)
        async_parts.run_on_cpu(patch)
        with cpu_server.serve(model, folder / "server") as url:
            yield model, url, folder


def train(served: tuple[str, str, Path], **fields: Any) -> Any:
    from trl_entropy import EntropyAsyncGRPOConfig, EntropyAsyncGRPOTrainer

    model, url, folder = served
    settings = {**TRAINING, "vllm_server_base_url": url, **fields}
    trainer = EntropyAsyncGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=EntropyAsyncGRPOConfig(output_dir=str(folder / "run"), **settings),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]}),
        processing_class=conversational_tokenizer(),
        weight_transfer=FileTransfer(url, folder / "weights.safetensors"),
    )
    trainer.train()
    return trainer


def log_probs_by_server(url: str, model: str, ids: list[int]) -> torch.Tensor:
    request = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
    answer = requests.post(f"{url}/v1/completions", json=request, timeout=60).json()
    found = answer["choices"][0]["prompt_logprobs"]
    return torch.tensor([next(iter(one.values()))["logprob"] for one in found[1:]])


def check_ages(entry: dict[str, float]) -> None:
    """What a log entry says of the tokens of each age, against each other and against all tokens together."""
    shares = {name: entry[f"staleness/tokens_{name}"] for name in AGES}
    assert sum(shares.values()) == pytest.approx(1.0)
    clipped = {name: entry[f"staleness/clipped_{name}"] for name in AGES if f"staleness/clipped_{name}" in entry}
    assert clipped.keys() == {name for name, share in shares.items() if share > 0.0}
    assert all(0.0 <= share <= 1.0 for share in clipped.values())
    of_all = sum(shares[name] * clipped[name] for name in clipped)
    assert of_all == pytest.approx(entry["ppo_clip/low_fraction"] + entry["ppo_clip/high_fraction"], abs=1e-6)
    youngest, oldest = (sum(shares[name] * AGES[name][i] for name in clipped) for i in (0, 1))
    assert youngest - 1e-5 <= entry["staleness/age"] <= oldest + 1e-5


def test_twenty_updates(served: tuple[str, str, Path]) -> None:
    model, url, _ = served
    trainer = train(served, **ALL_CONTROLS, record_tokens=64)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == UPDATES
    assert all(math.isfinite(entry[key]) for entry in losses for key in ("loss", "grad_norm"))
    for key in METRICS:
        assert max(logged(trainer, key)) > 0.0, key
    # versions are counted from the hand-over before the training
    assert trainer.model_version == trainer.synced == UPDATES + 1
    for entry in losses:
        shown = [key for key in sorted(entry) if key.startswith(("stal", "ppo", "ce_gppo", "erc/c", "rew"))]
        print({key: round(entry[key], 4) for key in ("step", "loss", *shown)})
        check_ages(entry)
        for side in ("low", "high"):  # CE-GPPO gives back exactly what PPO-clip would drop
            assert entry[f"ce_gppo/{side}_fraction"] == entry[f"ppo_clip/{side}_fraction"]
    assert max(logged(trainer, "staleness/age")) > 0.0
    stale = [name for name, (youngest, _) in AGES.items() if youngest > 0]
    assert max(share for name in stale for share in logged(trainer, f"staleness/clipped_{name}")) > 0.0
    # the server has the last weights
    ids = trainer.processing_class("".join(PROMPTS)[:40])["input_ids"]
    with torch.no_grad():
        trainer.model.set_attn_implementation("eager")
        expected = trainer.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = expected.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(log_probs_by_server(url, model, ids), expected, rtol=1e-3, atol=1e-3)
