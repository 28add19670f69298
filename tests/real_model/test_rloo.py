"""RLOO with every control that it has a place for trains the pretrained model, by the formula of its loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainers.test_grpo import weights
from tests.trainers.test_rloo import CONTROLLED, OURS, WITH_EPO

from .conftest import KINDS, SCHEDULE, check_entries
from .test_training import TOLERANCE, Observer

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("quick_bfloat16")]

EPSILONS = {"epsilon": 0.1, "epsilon_high": 0.2}
ROLLOUT = SCHEDULE["steps_per_generation"]


class RLOOObserver(Observer):
    """Compares with RLOO's loss of whole completions, in float64; EPO's at the first rollout, which has no history."""

    def compare(self, model: torch.nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
        loss = self.compute_loss(model, inputs, **kwargs)
        found = torch.autograd.grad(loss, (self.call.logps, self.call.entropies), retain_graph=True)
        lp, entropy = (v.detach().double().requires_grad_() for v in (self.call.logps, self.call.entropies))
        wanted = torch.autograd.grad(self.expected(lp, entropy, inputs), (lp, entropy))
        scale = torch.cat([gradient.flatten() for gradient in wanted]).norm().item()
        self.gradient_errors.append(max((g - w).norm().item() / scale for g, w in zip(found, wanted, strict=True)))
        return loss

    def expected(self, lp: Tensor, entropy: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        mask, advantages = inputs["completion_mask"], inputs["advantages"].double()
        ratio = ((lp * mask).sum(1) - inputs["old_logps"].double()).exp()
        clipped = ratio.clamp(1 - EPSILONS["epsilon"], 1 + EPSILONS["epsilon_high"])
        loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        of_rollout = [(one, self.rewards(one) >= 1.0) for one in self.trainer._buffered_inputs]
        tokens = sum(one["completion_mask"][correct].sum().item() for one, correct in of_rollout) / ROLLOUT
        log_likelihood = (lp * mask)[self.rewards(inputs) >= 1.0].sum() / tokens
        bonus = ((entropy * mask).sum(1) / mask.sum(1)).mean()
        return loss - CONTROLLED["positive_nll_coef"] * log_likelihood - CONTROLLED["epo_coef"] * bonus


@pytest.mark.skipif(not WITH_EPO, reason="RLOO of this TRL has no gradients of entropies")
@pytest.mark.parametrize(("policy", "precision"), KINDS)
def test_every_step_is_the_formula(make_real_trainer: Callable[..., Any], policy: str, precision: str) -> None:
    """Two steps on one rollout."""
    trainer = make_real_trainer(policy, precision, **OURS, **CONTROLLED, **EPSILONS, max_steps=ROLLOUT)
    start, observer = weights(trainer), RLOOObserver(trainer, CONTROLLED)
    trainer.train()
    assert len(observer.gradient_errors) == ROLLOUT
    assert max(observer.gradient_errors) < TOLERANCE, observer.gradient_errors
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    check_entries(steps)
    for key in ("qae/zero_fraction", "positive_nll/token_fraction", "epo/beta"):
        assert max(entry.get(key, 0.0) for entry in steps) > 0, (key, steps)
    moved = {key for key, value in weights(trainer).items() if not torch.equal(value, start[key])}
    assert moved
    assert policy == "full" or all("lora_" in key for key in moved)
