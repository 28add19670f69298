"""What the controls read and write, by name."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_shapes


def in_float32(values: Tensor) -> Tensor:
    """In float32 at least: sums, means and counts of many tokens do not fit 16 bits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class PolicyTokens:
    """The tensors of one micro-batch that decide a token's policy gradient.

    Attributes:
        logps: Log-probability of each sampled token under the policy being trained, `(B, T)`.
        old_logps: The same under the policy that produced the rollout, `(B, T)`.
        advantages: Advantage of each token, `(B, T)`.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        frozen: True for tokens whose log-prob enters the sequence's importance ratio as a constant, bool `(B, T)`;
            `None` for none.
        without_bonus: True for tokens that get no entropy bonus, bool `(B, T)`; `None` for none.

    Raises:
        ValueError: If the shapes differ, or `mask` is not bool.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    mask: Tensor
    frozen: Tensor | None = None
    without_bonus: Tensor | None = None

    def __post_init__(self) -> None:
        check_shapes(**{name: (value, "B T") for name, value in vars(self).items()})


@dataclass(frozen=True)
class TokenMean:
    """A metric as data: the mean of `value` over the tokens where `mask` is True, of the global batch.

    Attributes:
        value: Any dtype, `(B, T)` or broadcastable to it.
        mask: Bool, `(B, T)`.
    """

    value: Tensor
    mask: Tensor

    def totals(self) -> Tensor:
        """The numerator and the denominator of the mean on this device, float32 `(2,)`."""
        weighted = torch.where(self.mask, self.value.float(), 0.0)
        return torch.stack([weighted.sum(), self.mask.sum().float()])
