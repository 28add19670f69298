"""Sampling with a stream per sample, against the distribution it must have and the model it must ask."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_entropy.evaluation.checkpoints import find_checkpoint
from trl_entropy.evaluation.engines import Completion, NucleusSampler, Sampling, TransformersEngine

SCORES = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
PROMPTS = [[5, 6], [7], [8, 9, 10, 11], [12], [13, 14, 15]]


def engine(path: str, temperature: float = 1.0, top_p: float = 1.0, max_new_tokens: int = 12) -> TransformersEngine:
    sampling = Sampling(temperature, top_p, max_new_tokens)
    return TransformersEngine(find_checkpoint(path), sampling, dtype="float32", trust_remote_code=False)


def draws(scores: torch.Tensor, count: int, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """How often each token is drawn."""
    seeds = Random(0)
    sampler = NucleusSampler([seeds.getrandbits(63) for _ in range(count)], temperature, top_p)
    out = sampler(torch.zeros(count, 1, dtype=torch.long), scores.expand(count, -1))
    assert (out.isfinite().sum(-1) == 1).all()
    return out.argmax(-1).bincount(minlength=len(scores)) / count


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        # 0.5 + 0.3 reaches 0.8, so the other two are out: 5/8 and 3/8
        (1.0, 0.8, [0.625, 0.375, 0.0, 0.0]),
        (1.0, 0.81, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]),
        (1.0, 0.01, [1.0, 0.0, 0.0, 0.0]),
        # squared: 0.25, 0.09, 0.0225, 0.0025 of 0.365
        (0.5, 1.0, [0.685, 0.247, 0.062, 0.007]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(temperature: float, top_p: float, expected: list[float]) -> None:
    # the standard error of a frequency over 20,000 draws is at most 0.0035
    found = draws(SCORES, 20_000, temperature, top_p)
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.012, rtol=0)
    assert (found[torch.tensor(expected) == 0] == 0).all()


def test_a_row_draws_the_same_in_any_place() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(3, 1, dtype=torch.long)
    together = NucleusSampler([11, 22, 33], 1.0, 0.9)(ids, scores).argmax(-1)
    alone = [
        NucleusSampler([seed], 1.0, 0.9)(ids[:1], scores[i : i + 1]).argmax().item()
        for i, seed in enumerate((11, 22, 33))
    ]
    assert together.tolist() == alone


def test_infinite_scores_and_ties() -> None:
    scores = torch.tensor([-torch.inf, 2.0, 2.0, -torch.inf])
    found = draws(scores, 4000, top_p=0.95)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 0.5, 0.0]), atol=0.03, rtol=0)


def test_completions_do_not_depend_on_their_batch(tiny_model_path: str) -> None:
    model, seeds = engine(tiny_model_path, temperature=0.8, top_p=0.95), list(range(100, 105))
    together = model.generate(PROMPTS, seeds)
    alone = [model.generate([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert together == alone
    assert together != model.generate(PROMPTS, [seed + 1 for seed in seeds])


def test_greedy_is_the_models_own(tiny_model_path: str, tiny_model: Any) -> None:
    (found,) = engine(tiny_model_path, temperature=0.0, max_new_tokens=6).generate([[5, 6, 7]], [0])
    ids = torch.tensor([[5, 6, 7]])
    for _ in found.token_ids:
        ids = torch.cat([ids, tiny_model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert ids[0, 3:].tolist() == found.token_ids


def test_a_completion_ends_at_any_end_token_or_is_cut_off(tiny_model_path: str) -> None:
    model = engine(tiny_model_path, max_new_tokens=4)
    assert model.ends == [1]
    model.ends = [1, 9]
    assert model._completion([5, 9, 1, 0]) == Completion([5, 9], truncated=False)
    assert model._completion([5, 6, 7, 8]) == Completion([5, 6, 7, 8], truncated=True)


def test_the_models_own_sampling_settings_are_not_used(tiny_model_path: str, tmp_path: Path) -> None:
    """Qwen2.5 ships with top_k 20 and a repetition penalty, which `generate` would apply."""
    shutil.copytree(tiny_model_path, tmp_path / "m")
    own = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 9.0, "eos_token_id": [1, 4]}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(own))
    changed = engine(str(tmp_path / "m"))
    assert changed.ends == [1, 4]
    changed.model.generation_config.eos_token_id = changed.ends = [1]
    plain = engine(tiny_model_path)
    assert changed.generate(PROMPTS, range(5)) == plain.generate(PROMPTS, range(5))


def test_weights_are_loaded_as_safetensors_only(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    load = AutoModelForCausalLM.from_pretrained

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.update(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    engine(tiny_model_path)
    assert asked["use_safetensors"] is True
    assert asked["trust_remote_code"] is False
