"""AdamW of one critic, in float32 whatever the critic's weights are."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .processes import gathered, sharded_like, unsharded

MOMENTS = ("exp_avg", "exp_avg_sq")


class CriticOptimizer:
    """AdamW on the trainable weights of one critic, with decay on matrices only.

    Weights in bfloat16 have a float32 copy here, and so have their gradients, which are summed in float32 over the
    micro-batches. AdamW updates the copies, and the weights are those rounded: a step smaller than the resolution of
    bfloat16 is not lost. With the moments that is 18 bytes per weight, and 16 for float32 weights, divided by the
    number of processes.

    Args:
        critic: On its device, and sharded already if it is to be.
        learning_rate: Constant.
        weight_decay: Of weights with two dimensions or more.
        max_grad_norm: The gradient is scaled down to this norm; 0 leaves it as it is.
    """

    def __init__(self, critic: nn.Module, *, learning_rate: float, weight_decay: float, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm
        self._weights = {name: value for name, value in critic.named_parameters() if value.requires_grad}
        self._copies = {name: self._float32(value) for name, value in self._weights.items()}
        decayed = [copy for copy in self._copies.values() if copy.dim() > 1]
        others = [copy for copy in self._copies.values() if copy.dim() <= 1]
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=learning_rate,
        )

    @staticmethod
    def _float32(weight: nn.Parameter) -> Tensor:
        """The weight itself, or its float32 copy, to which every backward pass then adds the weight's gradient."""
        if weight.dtype in (torch.float32, torch.float64):
            return weight
        copy = weight.detach().float().requires_grad_()
        weight.register_post_accumulate_grad_hook(partial(_move_gradient, copy))
        return copy

    @torch.no_grad()
    def step(self) -> Tensor:
        """Take one step on the gradients so far and forget them; return their norm before clipping, 0-dim."""
        copies = list(self._copies.values())
        limit = self.max_grad_norm or float("inf")
        norm = unsharded(torch.nn.utils.clip_grad_norm_(copies, limit))
        self._adamw.step()
        self._adamw.zero_grad()
        self._round()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Float32 weights, moments and number of steps by the weight's name, unsharded; on the first process only.

        Every process must call it.
        """
        states = {name: self._adamw.state[copy] for name, copy in self._copies.items() if copy in self._adamw.state}
        return {
            "weights": gathered(self._copies),
            "steps": {name: int(state["step"]) for name, state in states.items()},
            **{moment: gathered({name: state[moment] for name, state in states.items()}) for moment in MOMENTS},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`, which every process gets.

        Raises:
            ValueError: If it is that of another model.
        """
        self._check_names(state["weights"])
        self._adamw.state.clear()
        for name, copy in self._copies.items():
            copy.copy_(sharded_like(state["weights"][name], copy))
            if name in state["steps"]:
                moments = {moment: sharded_like(state[moment][name], copy) for moment in MOMENTS}
                self._adamw.state[copy] = {"step": torch.tensor(float(state["steps"][name])), **moments}
        self._round()

    def _round(self) -> None:
        for name, copy in self._copies.items():
            if copy is not self._weights[name]:
                self._weights[name].copy_(copy)

    def _check_names(self, weights: dict[str, Tensor]) -> None:
        saved, here = ({name: tuple(value.shape) for name, value in of.items()} for of in (weights, self._copies))
        wrong = sorted({name for name, _ in saved.items() ^ here.items()})
        if wrong:
            raise ValueError(
                f"The saved critic is another model: {wrong[0]} has shape {saved.get(wrong[0])} there and "
                f"{here.get(wrong[0])} here. Resume with the critics and critic_peft_config of the run."
            )


def _move_gradient(copy: Tensor, weight: Tensor) -> None:
    gradient = weight.grad.float() if weight.grad is not None else None
    weight.grad = None
    copy.grad = gradient if copy.grad is None or gradient is None else copy.grad + gradient
