"""The real trainer on handmade tensors: TRL's forward pass is replaced by one that returns given leaves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from tests.reference import Batch, Settings


def trainer_config(s: Settings) -> dict[str, Any]:
    """The settings under the names of `EntropyGRPOConfig`."""
    config = {
        "loss_type": s.loss_type,
        "importance_sampling_level": s.level,
        "epsilon": s.eps_lo,
        "epsilon_high": s.eps_hi,
        "delta": s.dual_clip,
        "beta": s.beta,
        "use_bias_correction_kl": s.kl_times_ratio,
        "top_entropy_quantile": s.top_entropy_fraction,
        "entropy_coef": s.entropy_coef,
        "off_policy_mask_threshold": s.off_policy_threshold,
        "max_completion_length": s.max_completion_length,
        "gradient_accumulation_steps": s.accumulation,
        "steps_per_generation": s.micro_batches_per_rollout,
        "positive_nll_coef": s.nll_coef,
        "positive_nll_min_reward": s.nll_min_reward,
        "sapo_temperature_pos": s.sapo_temperatures[0],
        "sapo_temperature_neg": s.sapo_temperatures[1],
    }
    if s.erc is not None:
        config["erc_low"], config["erc_high"] = s.erc
        config["erc_entropy_floor"] = s.erc_floor
    if s.alphas is not None:
        config["ce_gppo_alpha1"], config["ce_gppo_alpha2"] = s.alphas
    return config


def trainer_inputs(b: Batch, completion_mask: Tensor, tool_mask: Tensor | None = None) -> dict[str, Tensor]:
    """The batch as TRL hands it to `compute_loss`."""
    rows = b.mask.shape[0]
    inputs = {
        "prompt_ids": torch.full((rows, 2), 5),
        "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
        "completion_ids": torch.full(b.mask.shape, 7),
        "completion_mask": completion_mask,
        "advantages": b.advantages,
        "num_items_in_batch": torch.tensor(int(b.num_items)),
        "num_correct_tokens": torch.tensor(int(b.num_correct_tokens)),
    }
    optional = {
        "old_per_token_logps": b.lp_old,
        "old_entropies": b.entropy_old,
        "ref_per_token_logps": b.lp_ref,
        "sampling_per_token_logps": b.lp_sampling,
        "importance_sampling_ratio": b.engine_ratio,
        "rewards": b.rewards,
        "tool_mask": tool_mask,
    }
    return inputs | {name: value for name, value in optional.items() if value is not None}


def stub_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make TRL's forward pass return the log-probs and entropies in `trainer.leaves`."""

    def forward(self: Any, *args: Any, compute_entropy: bool = False, **kwargs: Any) -> tuple[Tensor, Any, None]:
        lp, entropy = self.leaves
        return lp, entropy if compute_entropy else None, None

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", forward)


def stubbed_trainer(make_trainer: Callable[..., Any], s: Settings, **overrides: Any) -> Any:
    """A trainer with these settings, in the middle of an accumulation window."""
    trainer = make_trainer(**trainer_config(s) | overrides)
    trainer.current_gradient_accumulation_steps = s.accumulation
    trainer.model.train(s.training)
    return trainer


def trainer_gradients(trainer: Any, b: Batch, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Loss and its gradients with respect to log-probs and entropies; checks that the inputs are left alone."""
    trainer.leaves = (b.lp, b.entropy)
    before = {name: value.clone() for name, value in inputs.items()}
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0, equal_nan=True)
    return loss.detach(), gradients(loss, b)


def gradients(loss: Tensor, b: Batch) -> tuple[Tensor, Tensor]:
    if not loss.requires_grad:  # every term of the reference is detached
        return torch.zeros_like(b.lp), torch.zeros_like(b.entropy)
    found = torch.autograd.grad(loss, (b.lp, b.entropy), allow_unused=True)
    lp, entropy = (torch.zeros_like(b.lp) if g is None else g for g in found)
    return lp, entropy
