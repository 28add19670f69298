"""Every trainer and control trains the pretrained model, and its loss of every step is the papers'.

At each step the loss and its gradients with respect to the model's own log-probs and entropies are compared with
`tests/reference.py` in float64.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.conftest import parity_reward
from tests.reference import Batch, Settings
from tests.stubbed import gradients
from tests.trainers.test_grpo import logged, weights
from trl_entropy import AsyPPOConfig, AsyPPOTrainer

from .conftest import LORA, POLICIES, PRECISIONS, SCHEDULE

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("quick_bfloat16")]

EPO_COEF, EPO_PENALTY, KAPPAS, EPO_BETAS = 0.05, 0.1, (0.8, 1.2), (2.0, 1 + math.exp(-3.0))
ERC = {"erc_low": 0.95, "erc_high": 1.05}
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.1}
ASYPPO = {"entropy_coef": 0.01, "critic_learning_rate": 1e-3}
CONTROLS: dict[str, dict[str, Any]] = {
    "erc": ERC,
    "ce_gppo": CE_GPPO,
    "erc_ce_gppo": ERC | CE_GPPO,
    "epo": {"epo_coef": EPO_COEF},
    "positive_nll": {"positive_nll_coef": 0.1},
    "asyppo": ASYPPO,
    "asyppo_all": ASYPPO | ERC | CE_GPPO | {"epo_coef": EPO_COEF, "positive_nll_coef": 0.1},
}
ACTS = {
    "erc_low": ("erc/clip_fraction",),
    "ce_gppo_alpha1": ("ce_gppo/low_fraction", "ce_gppo/high_fraction"),
    "epo_coef": ("epo/outside_fraction",),
    "positive_nll_coef": ("positive_nll/token_fraction",),
    "critic_learning_rate": ("asyppo/masked_fraction",),
}
"""Metrics of which one is positive where the control of this field has had something to do."""
SHARES = ("_fraction", "/entropy_overlap")
TOLERANCE = 1e-6
"""Of the norm of a micro-batch's gradient; rounding to float32, in which TRL computes both, leaves 1e-7."""


def settings(control: dict[str, Any]) -> Settings:
    """The reference's settings for these config fields."""
    return Settings(
        erc=(0.95, 1.05) if "erc_low" in control else None,
        alphas=(0.75, 1.1) if "ce_gppo_alpha1" in control else None,
        nll_coef=control.get("positive_nll_coef", 0.0),
        entropy_coef=control.get("entropy_coef", 0.0),
        micro_batches_per_rollout=SCHEDULE["steps_per_generation"],
    )


def epo_loss(entropies: Tensor, bonus: Tensor, mask: Tensor, history: float | None, beta: float) -> Tensor:
    """-lambda (L_H - beta L_smooth) of completions of a single turn (arXiv 2509.22576)."""
    rows = []
    for h, with_bonus, valid in zip(entropies, bonus, mask.bool(), strict=True):
        row = with_bonus[valid].mean()
        if history is not None:
            low, high = KAPPAS[0] * history, KAPPAS[1] * history
            row = row - beta * EPO_PENALTY * (torch.relu(low - h[valid]) + torch.relu(h[valid] - high)).mean()
        rows.append(row)
    return -EPO_COEF * torch.stack(rows).mean()


class Observer:
    """Stands in for `trainer.on_loss` and `trainer.compute_loss`: compares every loss with the reference."""

    def __init__(self, trainer: Any, control: dict[str, Any]) -> None:
        self.trainer, self.control = trainer, control
        self.compute_loss, self.on_loss = trainer.compute_loss, trainer.on_loss
        self.gradient_errors: list[float] = []
        self.old_entropies: list[Tensor] = []
        trainer.compute_loss, trainer.on_loss = self.compare, self.keep_call

    def keep_call(self, call: Any, inputs: dict[str, Tensor]) -> None:
        self.call = call
        self.on_loss(call, inputs)

    def compare(self, model: torch.nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
        loss = self.compute_loss(model, inputs, **kwargs)
        leaves = [value for value in (self.call.logps, self.call.entropies) if value.requires_grad]
        got = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        got = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, got, strict=True)]

        lp, entropy = (v.detach().double().requires_grad_() for v in (self.call.logps, self.call.entropies))
        b = self.batch(lp, entropy, inputs)
        expected = reference.loss(b, settings(self.control))
        if "epo_coef" in self.control:
            rollout = self.trainer.state.global_step // SCHEDULE["steps_per_generation"]
            expected = expected + epo_loss(entropy, b.entropy, b.mask, self.history(rollout), EPO_BETAS[rollout])
        b.entropy = entropy
        want = gradients(expected, b)
        if len(leaves) == 1:
            assert not want[1].any()
        scale = torch.cat([g.flatten() for g in want]).norm().clamp(min=1e-3).item()
        self.gradient_errors.append(max((g - w).norm().item() / scale for g, w in zip(got, want, strict=False)))
        return loss

    def history(self, rollout: int) -> float | None:
        """Mean entropy of the tokens of the rollout before."""
        batches = self.trainer._buffered_inputs
        if self.trainer.state.global_step % SCHEDULE["steps_per_generation"] == 0:
            found = [m["old_entropies"].double()[m["completion_mask"].bool()] for m in batches]
            self.old_entropies.append(torch.cat(found))
        return self.old_entropies[rollout - 1].mean().item() if rollout else None

    def batch(self, lp: Tensor, entropy: Tensor, inputs: dict[str, Tensor]) -> Batch:
        rollout = self.trainer._buffered_inputs
        correct = [self.rewards(micro_batch) >= 1.0 for micro_batch in rollout]
        correct_tokens = [m["completion_mask"][rows].sum().item() for m, rows in zip(rollout, correct, strict=True)]
        advantages, bonus_entropy = inputs["advantages"].double(), entropy
        if "advantage_masked" in inputs:
            advantages = torch.where(inputs["advantage_masked"], 0.0, advantages)
            bonus_entropy = torch.where(inputs["entropy_filtered"], entropy.detach(), entropy)
        old_entropies = inputs.get("old_entropies")
        return Batch(
            lp=lp,
            entropy=bonus_entropy,
            mask=inputs["completion_mask"],
            advantages=advantages,
            num_items=sum(micro_batch["completion_mask"].sum().item() for micro_batch in rollout),
            lp_old=inputs["old_per_token_logps"].double(),
            entropy_old=None if old_entropies is None else old_entropies.double(),
            rewards=self.rewards(inputs),
            num_correct_tokens=sum(correct_tokens),
        )

    def rewards(self, inputs: dict[str, Tensor]) -> Tensor:
        texts = self.trainer.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
        return torch.tensor(parity_reward(texts))


def trainer_classes(control: dict[str, Any], critics: str) -> dict[str, Any]:
    """AsyPPO with LoRA critics of the policy's own size where the control has critics."""
    if "critic_learning_rate" not in control:
        return {}
    trainer_class = functools.partial(AsyPPOTrainer, critics=critics, critic_peft_config=LORA)
    return {"trainer_class": trainer_class, "config_class": AsyPPOConfig}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CONTROLS)
def test_every_step_is_the_papers(
    make_real_trainer: Callable[..., Any], tiny_model_path: str, name: str, policy: str, precision: str
) -> None:
    control = CONTROLS[name]
    trainer = make_real_trainer(policy, precision, **control, **trainer_classes(control, tiny_model_path))
    start, observer = weights(trainer), Observer(trainer, control)
    critics = trained_weights(trainer.critics.critics) if "critic_learning_rate" in control else []
    trainer.train()
    assert len(observer.gradient_errors) == SCHEDULE["max_steps"]
    assert max(observer.gradient_errors) < TOLERANCE, observer.gradient_errors
    check_metrics(trainer, control, precision)
    moved = {key for key, value in weights(trainer).items() if not torch.equal(value, start[key])}
    assert moved
    if policy == "lora":
        assert all("lora_" in key for key in moved)
    if critics:
        assert not any(map(torch.equal, critics, trained_weights(trainer.critics.critics)))


def trained_weights(critics: list[torch.nn.Module]) -> list[Tensor]:
    """One vector per critic."""
    return [torch.cat([p.detach().flatten() for p in critic.parameters() if p.requires_grad]) for critic in critics]


def check_metrics(trainer: Any, control: dict[str, Any], precision: str) -> None:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    for entry in steps:
        assert all(math.isfinite(value) for value in entry.values()), entry
        assert all(0 <= value <= 1 for key, value in entry.items() if key.endswith(SHARES)), entry
        assert 0 <= entry["entropy"] < math.log(49_152)
    for field in control.keys() & ACTS.keys():
        assert max(value for key in ACTS[field] for value in logged(trainer, key)) > 0.0, field
    if precision == "float32" and "erc_low" in control:  # the first step of a rollout has the rollout's policy
        assert [entry["erc/clip_fraction"] for entry in steps[::2]] == [0.0, 0.0]
