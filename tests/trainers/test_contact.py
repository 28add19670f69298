"""What TRL's forward pass and rollout give to the controls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from tests.stubbed import stub_forward


@pytest.fixture
def trainer(make_trainer: Callable[..., Any]) -> Any:
    return make_trainer(steps_per_generation=2, erc_low=0.95, erc_high=1.05)


def test_the_rollout_has_the_old_entropies(trainer: Any) -> None:
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
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
