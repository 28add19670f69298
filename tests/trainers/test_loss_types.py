"""Every control under each of TRL's loss types that it allows, through the trainer's loss on random micro-batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.controls.acting import CASES, row, values_of
from tests.controls.micro_batches import Batch, batches, padded, quick
from tests.controls.test_table import NOT_PERMUTED, NOT_SPLIT, by_place
from tests.reference import Batch as LossBatch
from tests.stubbed import stub_forward, trainer_gradients, trainer_inputs
from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.controls import ActiveControls
from trl_entropy.controls.control import LINEAR_LOSSES
from trl_entropy.trainers.critics import disagreement

few = settings(quick, max_examples=4)
LOSS_TYPES = (*LINEAR_LOSSES, "vespo")
LEVELS = ("token", "sequence")
OF_TOKENS = ("dapo", "cispo", "vespo")
"""Sums over tokens, divided by a number of the whole accumulation window: cut into micro-batches, they add up."""
WITH_BONUS = ("asyppo", "coefficient")
"""With TRL's entropy bonus, a mean over the tokens of each micro-batch."""


def allowed(case: str) -> list[tuple[str, str]]:
    control = row(case)
    return [(loss, level) for loss in control.loss_types or LOSS_TYPES for level in control.levels]


class Losses:
    """A trainer with a control on, whose loss is asked for under one loss type after the other."""

    def __init__(self, make_trainer: Callable[..., Any], case: str, critic: str) -> None:
        fields = {**CASES[case], "max_completion_length": 7, "gradient_accumulation_steps": 1}
        if case == "asyppo":
            fields["config_class"] = AsyPPOConfig
            fields["trainer_class"] = lambda **given: AsyPPOTrainer(critics=critic, **given)
        self.trainer = make_trainer(**fields)
        self.with_critics = case == "asyppo"
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()

    def under(self, loss_type: str, level: str) -> "Losses":
        for owner in (self.trainer, self.trainer.args):
            owner.loss_type, owner.importance_sampling_level = loss_type, level
        return self

    def gradients(self, batch: Batch, parts: list[Any] | None = None) -> tuple[Tensor, Tensor]:
        """Loss, and its gradients with respect to log-probs and entropies, `(2, B, T)`; of parts, added up."""
        trainer, rows = self.trainer, len(batch.mask)
        trainer.active = ActiveControls.of(trainer.args, critics=self.with_critics)
        trainer.num_generations = rows
        inputs = self._rollout(batch)
        found = []
        for part in parts or [slice(None)]:
            # TRL's adaptive coefficient, which would move from call to call
            trainer._last_world_entropy, trainer.entropy_coef = 0.0, 0.01
            of_part = {name: value[part] if value.dim() else value for name, value in inputs.items()}
            leaves = LossBatch(
                lp=batch.logps[part].clone().requires_grad_(),
                entropy=batch.entropies[part].clone().requires_grad_(),
                mask=of_part["completion_mask"],
                advantages=of_part["advantages"],
                num_items=0.0,
            )
            loss, gradients = trainer_gradients(trainer, leaves, of_part)
            found.append((loss, torch.stack(gradients)))
        losses, gradients = zip(*found, strict=True)
        return torch.stack(losses).sum(), torch.cat(gradients, 1)

    def _rollout(self, batch: Batch) -> dict[str, Tensor]:
        """The batch as a scored rollout with the control's columns."""
        completion = batch.mask.flip(1).cummax(1).values.flip(1)
        of_completions = any(control.sets_advantages for control in self.trainer.active.controls)
        given = LossBatch(
            lp=batch.logps,
            entropy=batch.entropies,
            mask=completion.long(),
            advantages=batch.advantages[:, 0] if of_completions else batch.advantages,
            num_items=2.0 * batch.mask.sum().item(),
            lp_old=batch.old_logps,
            entropy_old=batch.old_entropies,
        )
        inputs = trainer_inputs(given, completion.long(), batch.mask.long() | ~completion)
        if self.with_critics:
            inputs |= disagreement(values_of(batch)[:, :, :-1], batch.mask, self.trainer.args, lambda flat: flat)
        EntropyGRPOTrainer.on_rollout(self.trainer, inputs, batch.rewards)  # the critics' values are given
        return inputs


@pytest.fixture
def losses(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tiny_model_path: str, case: str
) -> Losses:
    stub_forward(monkeypatch)
    return Losses(make_trainer, case, critic=tiny_model_path)


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
@few
@given(data=st.data())
def test_finite_and_independent_of_order_padding_and_micro_batches(
    losses: Losses, case: str, data: st.DataObject
) -> None:
    batch = data.draw(batches(advantages=(-3.0, -0.5, 0.0, 0.5, 3.0)))
    order = data.draw(st.permutations(range(len(batch.mask))))
    cut, mask = data.draw(st.integers(0, len(order))), batch.mask
    parts = [part for part in (slice(0, cut), slice(cut, None)) if len(mask[part])]
    for loss_type, level in allowed(case):
        under = losses.under(loss_type, level)
        for value in under.gradients(batch.to(torch.float32)):
            assert value.isfinite().all(), (loss_type, level)
        loss, gradients = under.gradients(batch)
        assert (gradients[:, ~mask] == 0.0).all()
        if not (case in NOT_PERMUTED or by_place(case, batch)):
            found, moved = under.gradients(padded(batch[order], 2))
            assert_close((found, moved[:, :, :-2]), (loss, gradients[:, order]))
        if loss_type in OF_TOKENS and case not in (*NOT_SPLIT, *WITH_BONUS):
            assert_close(under.gradients(batch, parts), (loss, gradients))


@pytest.mark.parametrize("case", CASES)
def test_every_other_loss_type_is_refused(case: str) -> None:
    config_class = AsyPPOConfig if case == "asyppo" else EntropyGRPOConfig
    others = [(loss, level) for loss in LOSS_TYPES for level in LEVELS if (loss, level) not in allowed(case)]
    for loss_type, level in others:
        with pytest.raises(ValueError, match=r"cannot be used with (loss_type|importance_sampling_level)="):
            config_class(
                output_dir="unused", use_cpu=True, loss_type=loss_type, importance_sampling_level=level, **CASES[case]
            )
