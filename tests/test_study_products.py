"""The study's products of bfloat16 matrices where the processor has no instructions for them."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_entropy.recipes import recipes_dir

sys.path.append(str(recipes_dir() / "study"))
from products import PRODUCTS, Float32Products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_summed_in_float32_and_rounded_once(dtype):
    torch.manual_seed(0)
    a, b, c = (torch.randn(7, 7).to(dtype) for _ in range(3))
    out = torch.empty(7, 7, dtype=dtype)
    exact = (a.double() @ b.double()).to(dtype)
    with Float32Products():
        found = [a @ b, torch.mm(a, b, out=out), out, torch.bmm(a[None], b[None])[0], torch.addmm(0 * c, a, b)]
        biased = torch.nn.functional.linear(a, b, c[0])
    for made in found:
        torch.testing.assert_close(made, exact)
        assert made.dtype == dtype
    torch.testing.assert_close(biased, (a.double() @ b.double().T + c[0].double()).to(dtype))


def test_products_do_not_change_those_of_float32():
    torch.manual_seed(0)
    a, b = torch.randn(2, 40, 40)
    with Float32Products():
        found = a @ b
    assert torch.equal(found, a @ b)


def test_what_is_computed_is_float32_and_its_gradients_too():
    computed = []

    class Computed(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in PRODUCTS:
                computed.append(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    a, b = (torch.randn(3, 3, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with Computed(), Float32Products():
        (a @ b).sum().backward()
    assert computed == [torch.float32] * 3
    assert a.grad.dtype == torch.bfloat16
