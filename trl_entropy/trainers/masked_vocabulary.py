"""Vocabularies in which some entries are masked with logits of minus infinity.

TRL's entropies are `-sum p log p` (up to 1.14) or `log Z - sum p z` (from then on), and 0 times minus infinity is NaN,
in the value or in the gradient. Read as a very low number, such a logit has probability 0 as before and a gradient of
exactly 0, and every other entry keeps its log-prob to the last bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..critics.processes import unsharded

LOWEST = -1e4
"""Of logits over the temperature: `exp` of it is 0 in every dtype, and so it fits into each."""


@contextmanager
def finite_logits(model: nn.Module, temperature: float) -> Iterator[None]:
    """Within this context a forward pass of `model` has no logit of minus infinity.

    TRL up to 1.14 reads the logits that the model returns. Later releases, and Liger's path of 1.14, project the
    hidden states themselves, so there minus infinity can only come from the bias of the head.

    Args:
        model: The policy, in any wrapper.
        temperature: What TRL divides the logits by.
    """
    lowest = LOWEST * temperature

    def replace(module: nn.Module, args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None and logits.numel() and logits.detach().amin() == -torch.inf:
            output.logits = _finite(logits, lowest)

    hook = model.register_forward_hook(replace)
    try:
        with _finite_bias(model, lowest):
            yield
    finally:
        hook.remove()


@contextmanager
def _finite_bias(model: nn.Module, lowest: float) -> Iterator[None]:
    owner = _head_with_bias(model)
    if owner is None or not unsharded(owner.bias.detach()).isneginf().any():
        yield
        return
    bias = owner._parameters.pop("bias")
    owner.bias = _finite(bias, lowest)  # keeps the graph to the parameter
    try:
        yield
    finally:
        del owner.bias
        owner._parameters["bias"] = bias


def _head_with_bias(model: Any) -> Any:
    """The module that owns the bias of the output embeddings; `None` where there is none."""
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    bias = getattr(head, "bias", None)
    if not isinstance(bias, nn.Parameter):
        return None
    return next((module for module in head.modules() if module._parameters.get("bias") is bias), None)


def _finite(values: Tensor, lowest: float) -> Tensor:
    return values.masked_fill(values == -torch.inf, max(lowest, torch.finfo(values.dtype).min))
