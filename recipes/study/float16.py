"""Float16 where it is not made for: on a CPU."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Float16Products(TorchDispatchMode):
    """Within it, float16 matrix products are made in float32 and rounded once, as a GPU makes them.

    So does a CPU without instructions for float16, but ten times slower.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FLOAT16_PRODUCTS and args[0].dtype == torch.float16:
            wide = (arg.float() if isinstance(arg, Tensor) else arg for arg in args)
            return func(*wide, **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))


FLOAT16_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Float16Anywhere:
    """Makes a trainer compute in float16 with scaled gradients where accelerate refuses to: on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = self.accelerator.device.type
        self.accelerator.state._mixed_precision = "fp16"  # on a CPU, in place of bfloat16
        # Accelerate's own, but of a scale with which the first gradients do not overflow
        self.accelerator.scaler = torch.amp.GradScaler(device, init_scale=2.0**10)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with Float16Products() if self.accelerator.device.type == "cpu" else nullcontext():
            return super().train(*args, **kwargs)
