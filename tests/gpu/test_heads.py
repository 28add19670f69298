"""TRL's log-prob and entropy heads on an NVIDIA GPU, against float64 on a CPU from the same hidden states and weights.

`fused` never has the logits in memory (chunks of a matrix product, folded by a Triton kernel on a GPU); `triton` takes
logits, as models without a fused head do; `torch` is the same two numbers by `log_softmax`, for comparison.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

kernels = pytest.importorskip("trl.kernels", reason="TRL's fused heads came with 1.16")
utils = pytest.importorskip("trl.trainer.utils")

pytestmark = pytest.mark.gpu

CHUNK = getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 8192)
"""Of the vocabulary, as TRL cuts it; the smallest shape is cut too."""
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """Tokens, channels, vocabulary."""

    tokens: int
    channels: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(24, 16, 640),  # to try the test
    "smollm2": Shape(512, 576, 49152),
    "r1-distill-1.5b": Shape(256, 1536, 151936),
}
Outputs = tuple[Tensor, Tensor]


def fused(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Outputs:
    found = kernels.ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, temperature, min(CHUNK, len(weight) // 2), None, 1.0, ("log_probs", "entropy")
    )
    return found[0], found[1]


def triton(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Outputs:
    return utils.selective_log_softmax_and_entropy(F.linear(hidden, weight), labels, temperature=temperature)


def by_log_softmax(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Outputs:
    logits = F.linear(hidden, weight)
    distribution = torch.log_softmax((logits if logits.dtype == torch.float64 else logits.float()) / temperature, -1)
    logps = distribution.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logps, -(distribution.exp() * distribution).sum(-1)


HEADS: dict[str, Callable[..., Outputs]] = {"fused": fused, "triton": triton, "torch": by_log_softmax}


@lru_cache(maxsize=1)
def leaves(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weights whose logits have a standard deviation of 3, and labels, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.channels, generator=generator)
    weight = torch.randn(shape.vocabulary, shape.channels, generator=generator) * 3 / math.sqrt(shape.channels)
    labels = torch.randint(shape.vocabulary, (shape.tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels


def outputs_and_gradients(head: Callable[..., Outputs], *inputs: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Log-probs, entropies, and a random sum's gradients of hidden states and weights; in float64, on the CPU."""
    hidden, weight, labels = inputs
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logps, entropies = head(hidden, weight, labels, temperature)
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, len(labels), generator=generator).to(logps.device)
    grads = torch.autograd.grad((logps * first + entropies * second).sum(), (hidden, weight))
    return tuple(value.detach().cpu().double() for value in (logps, entropies, *grads))


@lru_cache(maxsize=1)
def exact(shape: Shape, dtype: torch.dtype, temperature: float) -> tuple[Tensor, ...]:
    """What all heads are compared with."""
    inputs = (value.double() if value.is_floating_point() else value for value in leaves(shape, dtype))
    return outputs_and_gradients(by_log_softmax, *inputs, temperature=temperature)


@pytest.mark.parametrize("head", HEADS)  # varies first: the reference is that of the one before
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SHAPES)
def test_heads(
    record_property: Callable[[str, object], None],
    device: str,
    within: Callable[[float, float], None],
    size: str,
    head: str,
    dtype: str,
    temperature: float,
) -> None:
    """The error is the largest of both outputs in nats, in units of what rounding the largest logit once does."""
    inputs = leaves(SHAPES[size], DTYPES[dtype])
    expected = exact(SHAPES[size], DTYPES[dtype], temperature)
    found = outputs_and_gradients(HEADS[head], *(value.to(device) for value in inputs), temperature=temperature)
    errors = [(got - want).abs() for got, want in zip(found, expected, strict=True)]
    for name, error in zip(("logps", "entropies"), errors, strict=False):
        record_property(f"{name}_max", error.max().item())
        record_property(f"{name}_mean", error.mean().item())
    relative = [e.norm().item() / want.norm().item() for e, want in zip(errors[2:], expected[2:], strict=True)]
    record_property("gradients_relative", max(relative))
    rounding = torch.finfo(DTYPES[dtype]).eps
    largest_logit = F.linear(inputs[0].float(), inputs[1].float()).abs().max().item() / temperature
    # float32 sums up to 1,536 products and 151,936 exponentials, which round one after the other
    units = 32 if dtype == "float32" else 2
    within(max(error.max().item() for error in errors[:2]), units * rounding * largest_logit)
    assert max(relative) < units * rounding * 4
