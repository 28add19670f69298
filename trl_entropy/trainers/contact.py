"""Where the controls touch TRL's internals (`resume` has what checkpoints need of them).

TRL's `GRPOTrainer._compute_loss` calls the policy's forward pass first and reads the advantages and the old log-probs
afterwards. `compute_loss` hands it a shallow copy of the inputs, and the override of the forward pass writes what the
controls decide into that copy, so TRL's loss does the rest. No line of that loss is repeated here.

A subclass of TRL's trainer may stand in between. `GRPOContact` comes before it and `GRPOLoss` after it, so what the
subclass makes of the inputs is what the controls act on, and its forward passes beside that of TRL's loss are left
alone. Where its `_compute_loss` takes the place of TRL's, the first forward pass of the policy in it is the loss's.
"""

from functools import cached_property
from typing import Any

import torch
import trl
from torch import Tensor
from trl import GRPOTrainer

from .contact_table import ATTRIBUTES, check_installed, check_trainer
from .loss_call import TOKEN_LEVEL, LossCall, LossInputs, TokenAdvantages, loss_mask
from .overrides import described, own_loss
from .rollout_contact import RolloutContact, RolloutForward


class GRPOContact(RolloutContact):
    """Before a GRPO trainer of TRL or a subclass of it: places for a subclass of both to act.

    A subclass acts in `on_rollout`, `on_forward`, `added_loss`, `on_loss` and `control_metrics`. Where `hooks_active`
    is False none of them is called and every step is TRL's own.
    """

    _loss_call: LossCall | None = None
    _entropy_bonus_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_installed(self.base_class)
        super().__init__(*args, **kwargs)
        check_trainer(self, self.checked(ATTRIBUTES))

    @property
    def must_act(self) -> bool:
        """Whether a loss that the controls do not reach is an error."""
        return self.hooks_active

    @property
    def sets_advantages(self) -> bool:
        """Whether the advantages of a rollout are made anew."""
        return False

    @property
    def wants_entropy_gradients(self) -> bool:
        """Whether the entropies of the loss's forward pass shall carry their graph."""
        return False

    def on_forward(self, call: LossCall) -> None:
        """Shape `call.inputs`, `call.loss_logps` and `call.bonus_entropies` before TRL's loss reads them."""

    def added_loss(self, call: LossCall) -> Tensor | None:
        """A scalar to add to TRL's loss, or `None`."""
        return None

    def on_loss(self, call: LossCall, inputs: dict[str, Any]) -> None:
        """Look at a finished loss; `inputs` is the micro-batch as it was before `on_forward`."""

    def control_metrics(self) -> dict[str, float]:
        """The controls' metrics since they were last logged, in the current `mode`."""
        return {}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.hooks_active:
            if self.own_loss and TOKEN_LEVEL in inputs:
                inputs = LossInputs({**inputs, "advantages": inputs["advantages"].as_subclass(TokenAdvantages)})
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if isinstance(inputs, LossInputs) and "advantages" not in inputs.read:
                raise RuntimeError(
                    f"{self.own_loss} does not read advantages from its inputs, so what functions say of single "
                    "tokens would do nothing. Read them there, or call `super()._compute_loss`."
                )
            return loss
        self._loss_call = call = LossCall(LossInputs(inputs), loss_mask(inputs), reached=bool(self.own_loss))
        try:
            loss = super().compute_loss(model, call.inputs, *args, **kwargs)
        finally:
            self._loss_call = None
        if self.must_act:
            self._check_reached(call)
        if not call.forward_done:
            return loss
        added = self.added_loss(call)
        self.on_loss(call, call.given)
        if added is None:
            return loss
        return (loss[0] + added, *loss[1:]) if isinstance(loss, tuple) else loss + added

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if self.must_act and self._loss_call is None:
            where = described(type(self), "training_step", "prediction_step") or "A caller"
            raise RuntimeError(
                f"{where} calls `self._compute_loss` without `self.compute_loss`, so the entropy controls cannot act. "
                "Call `self.compute_loss(model, inputs)` instead."
            )
        return super()._compute_loss(model, inputs)

    @cached_property
    def own_loss(self) -> str | None:
        """The method of a subclass that takes the place of TRL's loss, as `Class.method`; `None` for none."""
        return own_loss(type(self))

    def reach_loss(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What TRL's loss is to read of the inputs that it was called with."""
        call = self._loss_call
        if call is None:
            return inputs
        if call.forward_done and self.own_loss:
            raise RuntimeError(
                f"{self.own_loss} makes a forward pass before it goes on to TRL's loss, and the controls took it for "
                "the loss's. Call `super()._compute_loss` in that method itself."
            )
        if call.forward_done:
            raise RuntimeError(
                f"{self._loss_override or 'The loss'} calls TRL's loss twice in one micro-batch, and the controls can "
                "act in it once. Call `super()._compute_loss` once, or leave the controls off."
            )
        call.reached = True
        # a copy: the override that called may read its inputs afterwards
        call.inputs, call.mask = LossInputs(inputs), loss_mask(inputs)
        return call.inputs

    def _check_reached(self, call: LossCall) -> None:
        """Refuse a loss that does not read what the controls decide.

        Raises:
            RuntimeError: Names the method that takes the place of TRL's, and what it leaves out.
        """
        where = self._loss_override
        if not call.forward_done and self.own_loss:
            raise RuntimeError(
                f"{where} computes a loss without `self._get_per_token_logps_and_entropies` and without TRL's loss, "
                "so the entropy controls cannot act. Call `super()._compute_loss` in it, or leave the controls off."
            )
        if not call.reached and where:
            raise RuntimeError(
                f"{where} does not reach TRL's loss through `super()._compute_loss`, so the entropy controls cannot "
                "act. Call that, with `super()` in place of a class's name, or leave the controls off."
            )
        if not call.forward_done:
            raise RuntimeError(
                f"TRL {trl.__version__} computes its loss without `_get_per_token_logps_and_entropies`, so the "
                "entropy controls cannot act. Install a supported version of TRL."
            )
        if unread := call.unread(sets_advantages=self.sets_advantages or TOKEN_LEVEL in call.given):
            raise RuntimeError(
                f"{where or 'The loss'} does not read {' and '.join(unread)} from its inputs after "
                "`self._get_per_token_logps_and_entropies`, so the entropy controls would do nothing. Read it there, "
                "or call `super()._compute_loss`."
            )

    @property
    def _loss_override(self) -> str | None:
        """What a subclass does about the loss, in words; `None` for nothing."""
        return self.own_loss or described(type(self), "_compute_loss", "compute_loss")

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        forwards = None if model is self.ref_model else self._rollout_forwards
        if forwards is not None:
            kwargs["compute_entropy"] = True
        call, bonus_enabled = self._loss_call, self._entropy_bonus_enabled
        if call is not None and self.wants_entropy_gradients:
            self._entropy_bonus_enabled = True  # TRL below 1.16 detaches the entropies otherwise
        try:
            result = self._forward(model, *args, **kwargs)
        finally:
            self._entropy_bonus_enabled = bonus_enabled
        logps, entropies = result[:2]
        if forwards is not None:
            # TRL's first is that of the policy; with LoRA the reference's comes later and is the same module
            repeated = None if forwards else self._repeat_rows(model, *args, **kwargs)
            forwards.append(RolloutForward(logps, entropies, repeated))
        if call is not None and self._is_the_loss_s(call, model, entropies):
            call.early = frozenset(call.inputs.read)
            call.given = dict(call.inputs)
            call.forward_done, call.logps, call.loss_logps = True, logps, logps
            call.entropies = call.bonus_entropies = entropies
            self.on_forward(call)
            call.hand_over(to_trl=self.own_loss is None)
            result = (call.loss_logps, call.bonus_entropies, *result[2:])
        return result

    def _is_the_loss_s(self, call: LossCall, model: Any, entropies: Tensor | None) -> bool:
        """Whether a forward pass is that of the loss: the first of the policy, with a graph where the loss has one.

        Raises:
            RuntimeError: If it is, and a control has no entropies or no advantages to act on.
        """
        if not call.reached or call.forward_done or model is self.ref_model:
            return False
        if call.with_graph and not torch.is_grad_enabled():
            return False
        if self.must_act and "advantages" not in call.inputs:
            raise RuntimeError(
                f"{self._loss_override or 'The loss'} has inputs without `advantages`, on which the entropy controls "
                "act. Keep the trainer's under that name, or leave the controls off."
            )
        if entropies is None and self.must_act:
            raise RuntimeError(
                f"{self._loss_override or 'The loss'} calls `self._get_per_token_logps_and_entropies` without "
                "`compute_entropy=True`, and the entropy controls need the entropies. Add it there."
            )
        return entropies is not None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.hooks_active:
            for name, value in self.control_metrics().items():
                self._metrics[self.mode][name].append(value)
        super().log(logs, start_time)


class GRPOLoss(GRPOTrainer):
    """After a subclass of `trl.GRPOTrainer`: shows the contact TRL's calls of the loss and the functions."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        advantages = inputs.get("advantages")
        if advantages is not None and advantages.dim() > 2:
            raise ValueError(
                f"TRL's loss is given advantages of shape {tuple(advantages.shape)}, and can read (B,) or (B, T): an "
                "override takes advantages of tokens for one per completion."
            )
        return super()._compute_loss(model, self.reach_loss(inputs))

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        with self.watched_functions(inputs):
            return super()._calculate_rewards(inputs, *args, **kwargs)
