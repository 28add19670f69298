"""`erc/rounding_fraction`: a second forward pass over a few rows of a rollout, which nothing else notices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2Config, LlamaConfig, Qwen2Config, set_seed

from tests.trainers.test_grpo import assert_same_weights, count_forwards, logged, weights
from trl_entropy import EntropyGRPOTrainer
from trl_entropy.controls import TokenMean
from trl_entropy.trainers.grpo import has_rotary_positions

ERC = {"erc_low": 0.95, "erc_high": 1.05}
KEY = "erc/rounding_fraction"


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"peft_config": lora()}, {"peft_config": lora(), "beta": 0.1}],
    ids=["weights", "checkpointing", "lora", "lora_with_reference"],
)
def test_float32_has_none(make_trainer: Callable[..., Any], settings: dict[str, Any]) -> None:
    """With LoRA the reference is the same module without its adapter, which would be outside almost everywhere."""
    set_seed(0)
    trainer = make_trainer(**ERC, **settings, max_steps=5)
    trainer.train()
    assert logged(trainer, KEY) == [0.0, 0.0]  # once for each of the two rollouts, with its first step
    assert [entry["step"] for entry in trainer.state.log_history if KEY in entry] == [1, 5]


@pytest.fixture
def large_rollout(tiny_dataset: Dataset) -> dict[str, Any]:
    """Settings of a rollout of 320 completions, of which 10 are repeated."""
    return {"train_dataset": tiny_dataset.select([*range(16)] * 5), "steps_per_generation": 40, "max_steps": 1}


def test_bfloat16_has_some(make_trainer: Callable[..., Any], large_rollout: dict[str, Any]) -> None:
    trainer = make_trainer(**ERC, **large_rollout, bf16=True, temperature=0.3)
    trainer.train()
    assert 0.05 < logged(trainer, KEY)[0] < 0.9
    assert logged(trainer, "erc/clip_fraction") == [0.0]  # the pass of the first step has the rollout's bits


def test_a_wide_floor_measures_its_own_gate(make_trainer: Callable[..., Any], large_rollout: dict[str, Any]) -> None:
    trainer = make_trainer(**ERC, **large_rollout, bf16=True, erc_entropy_floor=100.0)
    trainer.train()
    assert logged(trainer, KEY) == [0.0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_bit_for_bit_the_same(
    make_trainer: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    def trained(name: str) -> Any:
        set_seed(0)
        trainer = make_trainer(tmp_path / name, **ERC, max_steps=5, peft_config=lora(lora_dropout=dropout))
        trainer.train()
        return trainer

    repeated = trained("repeated")
    assert len(logged(repeated, KEY)) == 2
    monkeypatch.setattr(EntropyGRPOTrainer, "rows_to_repeat", lambda self, num_rows: None)
    plain = trained("plain")
    assert logged(plain, KEY) == []
    assert_same_weights(weights(repeated), weights(plain))


@pytest.mark.parametrize("settings", [{}, {"peft_config": lora(), "beta": 0.1}], ids=["weights", "lora_and_reference"])
def test_one_pass_a_rollout_without_a_graph(
    make_trainer: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    plain = count_forwards(make_trainer(tmp_path / "plain", **settings), monkeypatch)
    controlled = count_forwards(make_trainer(tmp_path / "erc", **ERC, **settings), monkeypatch)
    assert controlled.count(False) == plain.count(False) + 1
    assert controlled.count(True) == plain.count(True)


def test_which_rows_of_which_rollouts(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(**ERC, num_iterations=2)
    trainer.model.train()
    chosen = {rows: trainer.rows_to_repeat(rows) for rows in (32, 63, 128, 160)}
    assert {rows: indices.tolist() for rows, indices in chosen.items()} == {
        32: [0],
        63: [0],
        128: [0, 32, 64, 96],
        160: [0, 32, 64, 96, 128],
    }
    # of 8 rows one in every fourth rollout; a rollout lasts 4 x 2 micro-batches
    taken = []
    for rollout in range(9):
        trainer._step = 8 * rollout
        taken.append(trainer.rows_to_repeat(8) is not None)
    assert [index for index, repeats in enumerate(taken) if repeats] == [0, 4, 8]
    trainer.model.eval()
    assert trainer.rows_to_repeat(128) is None
    assert make_trainer(ce_gppo_alpha1=1.0, ce_gppo_alpha2=1.0).rows_to_repeat(128) is None


def test_the_gate_is_that_of_the_loss(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(erc_low=0.9, erc_high=1.2, erc_entropy_floor=1.0)
    found: dict[str, TokenMean] = {}
    trainer._token_means["train"].add = found.update
    trainer.model.train()
    output = {
        "old_entropies": torch.tensor([[9.0, 9.0, 9.0], [1.0, 1.0, 1.0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    # (1.5 + 1) / 2 = 1.25 is outside, 2.3 / 2 = 1.15 inside, the third is padding
    trainer.on_repeat(output, torch.tensor([1]), torch.tensor([[1.5, 1.3, 9.0]]))
    assert found[KEY].totals().tolist() == [1.0, 2.0]


def test_learned_positions_are_left_out() -> None:
    assert has_rotary_positions(Qwen2Config())
    assert has_rotary_positions(LlamaConfig())
    assert not has_rotary_positions(GPT2Config())
