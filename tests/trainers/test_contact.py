"""Every name of TRL's and transformers' internals that this package builds on; one that is gone is named."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import trl
from trl import GRPOTrainer

from tests.stubbed import stub_forward

METHODS = {
    "_calculate_rewards": [],
    "_compute_loss": ["model", "inputs"],
    "_generate_and_score_completions": ["inputs"],
    "_generate_single_turn": [],
    "_get_per_token_logps_and_entropies": [],  # a decorated method in some releases, hence tested by calling it
    "_get_train_sampler": [],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_prepare_inputs": ["generation_batch"],
    "_save_checkpoint": ["model", "trial"],
    "_save_rng_state": ["output_dir"],
    "compute_loss": ["model", "inputs"],
    "create_model_card": [],
    "log": ["logs", "start_time"],
}
"""Methods that are overridden or called, and those of their arguments that must be there."""
ATTRIBUTES = [
    "_buffered_inputs",
    "_entropy_bonus_enabled",
    "_metrics",
    "_step",
    "_tokenizer",
    "epsilon_high",
    "epsilon_low",
    "importance_sampling_level",
    "max_completion_length",
    "num_generations",
    "num_iterations",
    "off_policy_mask_threshold",
    "ref_model",
    "reward_weights",
    "rollout_func",
    "temperature",
]
ROLLOUT = [
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "num_items_in_batch",
    "old_per_token_logps",
]
"""What the controls read from TRL's scored rollout."""


def missing(trainer: GRPOTrainer) -> list[str]:
    """The names that TRL no longer has, each as it would be looked up."""
    found = [f"GRPOTrainer.{name}" for name in METHODS if not callable(getattr(GRPOTrainer, name, None))]
    for name, arguments in METHODS.items():
        if method := getattr(GRPOTrainer, name, None):
            parameters = set(inspect.signature(method).parameters)
            found += [f"GRPOTrainer.{name}({argument})" for argument in arguments if argument not in parameters]
    return found + [f"trainer.{name}" for name in ATTRIBUTES if not hasattr(trainer, name)]


@pytest.fixture
def trainer(make_trainer: Callable[..., Any]) -> Any:
    return make_trainer(steps_per_generation=2, erc_low=0.95, erc_high=1.05)


def test_trl_has_what_is_built_on(trainer: Any) -> None:
    assert missing(trainer) == [], f"TRL {trl.__version__} lacks these"


def test_the_rollout_has_what_is_read(trainer: Any) -> None:
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    assert [name for name in ROLLOUT if name not in output] == [], f"TRL {trl.__version__}'s rollout lacks these"
    assert output["old_entropies"].shape == output["old_per_token_logps"].shape == output["completion_ids"].shape


def test_the_forward_pass_returns_log_probs_first_and_entropies_second(trainer: Any) -> None:
    ids = torch.arange(2, 12).reshape(2, 5)
    logps, entropies, *_ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, trainer.model, ids, torch.ones_like(ids), 3, compute_entropy=True
    )
    logits = trainer.model(ids).logits[:, 1:-1].detach() / trainer.temperature
    expected = torch.log_softmax(logits, -1)
    torch.testing.assert_close(logps, expected.gather(-1, ids[:, 2:, None]).squeeze(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("controls", [{}, {"erc_low": 0.95, "erc_high": 1.05, "delta": 10.0}], ids=["none", "erc"])
def test_16_bits_from_the_model_are_read_in_float32_by_the_controls(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, controls: dict[str, float]
) -> None:
    """FSDP casts what a model returns. A ratio of e^14 is infinite in float16, and its gradient no number."""
    stub_forward(monkeypatch)
    trainer = make_trainer(**controls)
    logps, entropies = (torch.tensor([[-1.0, -0.5]], dtype=torch.float16, requires_grad=True) for _ in range(2))
    trainer.leaves = (logps, entropies)
    found = trainer._get_per_token_logps_and_entropies(trainer.model, None, None, 2, compute_entropy=True)
    if not controls:
        assert found[0] is logps
        assert found[1] is entropies
        return
    assert [value.dtype for value in found[:2]] == [torch.float32] * 2
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    mask = torch.ones(1, 2, dtype=torch.long)
    inputs = {"prompt_ids": mask, "prompt_mask": mask, "completion_ids": mask, "completion_mask": mask}
    inputs |= {"old_per_token_logps": torch.tensor([[-15.0, -0.5]]), "old_entropies": torch.tensor([[-1.0, -0.5]])}
    inputs |= {"advantages": torch.tensor([-1.0]), "num_items_in_batch": torch.tensor(2)}
    trainer.compute_loss(trainer.model, inputs).backward()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_a_renamed_method_is_named(trainer: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner = next(cls for cls in GRPOTrainer.__mro__ if name in vars(cls))
    monkeypatch.setattr(owner, f"{name}_renamed", getattr(owner, name), raising=False)
    monkeypatch.delattr(owner, name)
    for cls in GRPOTrainer.__mro__[1:]:  # overridden there, too
        if name in vars(cls) and cls is not owner:
            monkeypatch.delattr(cls, name)
    assert missing(trainer) == [f"GRPOTrainer.{name}"]


def test_a_renamed_attribute_is_named(trainer: Any) -> None:
    del trainer._buffered_inputs
    assert missing(trainer) == ["trainer._buffered_inputs"]
