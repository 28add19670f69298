"""One call of a loss: what it reads, and the forward pass that it makes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..controls import MicroBatch, TokenMean

TOKEN_LEVEL = "token_level"
"""Key of a rollout whose advantages this package has made `(B, T)`: True per completion, `(B,)`."""


class LossInputs(dict[str, Any]):
    """A micro-batch that knows which of its keys have been read."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        super().__init__(inputs)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # so that a copy, such as `{**inputs}`, reads each key by `__getitem__`

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


RESHAPES = (
    *(torch.unsqueeze, Tensor.unsqueeze, Tensor.unsqueeze_),
    *(torch.reshape, Tensor.reshape, Tensor.view),
)
"""What makes a column of advantages, as a new axis in an index does."""


class TokenAdvantages(Tensor):
    """Advantages `(B, T)` for a loss that is not TRL's: an error where it takes them for one per completion.

    `(B, T)` with a new axis multiplies a tensor `(B, T)` without complaint wherever one of `B` and `T` is 1 or both
    are equal.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        index = args[1] if func is Tensor.__getitem__ else ()
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(args[0].shape) if func in RESHAPES else ()
            result = func(*args, **(kwargs or {}))
        reshaped = func in RESHAPES and result.dim() > 1 and tuple(result.shape) != shape
        if reshaped or any(one is None for one in _as_tuple(index)):
            raise ValueError(
                f"The controls' advantages are one per token, of shape {shape or tuple(args[0].shape)}, and the loss "
                "gives them a new axis as if they were one per completion. Do so only `if advantages.dim() == 1`."
            )
        return result


def _as_tuple(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


@dataclass
class LossCall:
    """One call of TRL's loss: the inputs it reads and the forward pass it made.

    Attributes:
        inputs: Shallow copy of the micro-batch; what is written here is what TRL's loss reads.
        given: The same before anything is written there.
        early: The inputs that were read before the forward pass.
        reached: Whether the next forward pass is the loss's.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        with_graph: Whether the loss is computed with its graph.
        forward_done: Whether the forward pass has been made; only then are there the two below.
        logps: Log-probs of the sampled tokens, with their graph, `(B, T)`.
        loss_logps: The same values as TRL's loss reads them: without a graph where a token is a constant to it.
        entropies: Entropies of the policy being trained, nats, `(B, T)`.
        bonus_entropies: The same values as entropy bonuses read them: without a graph where a token gets no bonus.
        batch: What the controls read of it, where one is on.
        frozen: Tokens that are constants of their sequence's ratio, bool `(B, T)`; `None` for none.
        shaped: The inputs that the controls have written.
        metrics: What the controls counted.
    """

    inputs: LossInputs
    mask: Tensor
    given: dict[str, Any] = field(default_factory=dict)
    early: frozenset[str] = frozenset()
    reached: bool = False
    with_graph: bool = field(default_factory=torch.is_grad_enabled)
    forward_done: bool = False
    logps: Tensor = field(init=False)
    loss_logps: Tensor = field(init=False)
    entropies: Tensor = field(init=False)
    bonus_entropies: Tensor = field(init=False)
    batch: MicroBatch = field(init=False)
    frozen: Tensor | None = None
    shaped: tuple[str, ...] = ()
    metrics: dict[str, TokenMean] = field(default_factory=dict)

    def hand_over(self, *, to_trl: bool) -> None:
        """Let the loss read the inputs; one that is not TRL's gets advantages that watch how it takes them."""
        advantages = self.inputs.get("advantages")
        made = "advantages" in self.shaped or TOKEN_LEVEL in self.inputs
        if not to_trl and made and advantages is not None and advantages.dim() == 2:
            self.inputs["advantages"] = advantages.as_subclass(TokenAdvantages)
        self.inputs.read.clear()

    def unread(self, *, sets_advantages: bool) -> list[str]:
        """What a control has changed of the inputs, and the loss has not read; a rollout's at any time."""
        found = [name for name in self.shaped if name not in self.inputs.read and self._differs(name)]
        unread = "advantages" not in self.inputs.read | self.early
        return ["advantages", *found] if sets_advantages and unread and "advantages" not in found else found

    def _differs(self, name: str) -> bool:
        """Whether an input is another than was given; every control that shapes tokens needs the advantages read."""
        if name == "advantages":
            return True
        given = self.given.get(name)
        return not torch.equal(self.logps.detach() if given is None else given, self.inputs[name])


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """True for the tokens that the model wrote and that count, bool `(B, T)`."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask
