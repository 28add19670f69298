"""Matrix products in bfloat16 on processors that have no instructions for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.mm.out,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
}


class Float32Products(TorchDispatchMode):
    """Has products of bfloat16 matrices added up in float32 and rounded once, as bfloat16 instructions do it.

    PyTorch's own products do the same to the order of the sums, at a ninth of the speed where there are none.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[-1].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        out: Tensor | None = kwargs.pop("out", None)
        product = func.overloadpacket(*(argument.float() for argument in args), **kwargs).to(torch.bfloat16)
        return product if out is None else out.copy_(product)


def has_bfloat16_products() -> bool:
    """Whether PyTorch has a quick way to compute them on this processor (on x86-64, with AVX-512)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
