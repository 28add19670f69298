"""vLLM's CPU build made fit for training. With vLLM on a GPU nothing of this happens.

It takes three things:

- vLLM's CPU backend packs every linear layer's weights into a private copy when it loads a model, and goes on
  computing with that copy. TRL writes new weights into the layers, which fails where vLLM has emptied them; elsewhere
  vLLM would sample from the initial policy for ever. With `plain_linear` the layers compute with what TRL writes.
- vLLM turns a float32 checkpoint into bfloat16. Here it computes in float32, so that the log-probs of vLLM and of the
  trainer agree to rounding.
- vLLM compiles its sampler, which takes 40 seconds and a C++ compiler. Here it runs as it is written.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
import trl
from trl.generation import vllm_generation

# Not in the table of `trainers.contact_table`, which is a layer above and could not see whether the function of that
# name still does the packing: the engine shows that, once it has been started.
PACKING = ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm")
"""Module and name of vLLM's function that packs a layer's weights away."""
MODEL = "llm_engine.model_executor.driver_worker.model_runner.model"
"""Where a `vllm.LLM` has its model."""


@contextmanager
def trainable_engines() -> Iterator[None]:
    """Have an engine that TRL starts in this process meanwhile follow the policy's weights on a CPU too."""
    start = getattr(vllm_generation, "LLM", None)  # TRL imports it only where vLLM is installed
    if start is None:
        yield
        return
    vllm_generation.LLM = partial(start_engine, start)
    try:
        yield
    finally:
        vllm_generation.LLM = start


def start_engine(start: Callable[..., Any], **settings: Any) -> Any:
    """The `vllm.LLM` that `start(**settings)` makes, trainable on a CPU.

    Raises:
        RuntimeError: If this vLLM has another way of packing weights away.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return start(**settings)
    _stop_packing()
    eager = torch.compiler.set_stance("force_eager")
    with eager:
        engine = start(**{**settings, "dtype": "float32", "enforce_eager": True})
    _require_plain_linear(engine)
    engine.generate = eager(engine.generate)
    return engine


def plain_linear(layer: Any, remove_weight: bool) -> None:
    """Stands in for vLLM's `dispatch_cpu_unquantized_gemm`: no packing, the layer computes with `layer.weight`."""
    layer.cpu_linear = torch.nn.functional.linear


def _stop_packing() -> None:
    module, name = PACKING
    try:
        utils = import_module(module)
        getattr(utils, name)
    except (ImportError, AttributeError) as error:
        raise _unfit(f"{module}.{name} is not there") from error
    setattr(utils, name, plain_linear)  # for good: vLLM may pack again when it gets new weights


def _require_plain_linear(engine: Any) -> None:
    try:
        model = attrgetter(MODEL)(engine)
    except AttributeError as error:
        raise _unfit(f"LLM.{MODEL} is not there") from error
    used = [layer.cpu_linear for layer in model.modules() if hasattr(layer, "cpu_linear")]
    if not used or any(linear is not torch.nn.functional.linear for linear in used):
        raise _unfit("it computes with weights of its own making")


def _unfit(why: str) -> RuntimeError:
    import vllm

    return RuntimeError(
        f"The CPU build of vLLM {vllm.__version__} cannot follow the policy's weights: {why}. Set use_vllm=False, or "
        f"install a vLLM that TRL {trl.__version__} asks for: pip install 'trl[vllm]=={trl.__version__}'"
    )


def require_device() -> None:
    """Raise before a model is loaded where vLLM can run on nothing.

    Raises:
        ValueError: If the vLLM that is installed finds no GPU and is not the CPU build.
    """
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        raise ValueError("use_vllm=True: the vLLM installed here finds no GPU to run on. Set use_vllm=False.")
