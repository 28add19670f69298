"""The processes that train the critics together, and the critics' shards on them."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def num_processes() -> int:
    """Number of processes in `torch.distributed`, 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """This process's rank in `torch.distributed`, 0 without it."""
    return dist.get_rank() if num_processes() > 1 else 0


def summed(values: Tensor) -> Tensor:
    """Sum of a tensor over the processes; a new tensor."""
    total = values.clone()
    if num_processes() > 1:
        dist.all_reduce(total)
    return total


def maximum(number: int, device: torch.device) -> int:
    """Largest of the processes' numbers."""
    if num_processes() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if num_processes() > 1:
        dist.barrier()


def shard(critic: nn.Module, device: torch.device) -> nn.Module:
    """Move a critic to the device; with several processes, shard it over them with FSDP2.

    Each transformer block is a unit of its own. The critics do not depend on how the policy is sharded. All processes
    start from the weights of the first.
    """
    if num_processes() == 1:
        return critic.to(device)
    _broadcast(critic, device)
    mesh = init_device_mesh(device.type, (num_processes(),))
    # gradients are summed over the processes in float32 even where the weights are not
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in [*_blocks(critic), critic]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return critic


def unsharded(value: Tensor) -> Tensor:
    """The unsharded tensor; every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Unsharded copies on the first process's CPU, nothing on the others; every process must call it."""
    # `torch.distributed.checkpoint.state_dict` does this for a module's own weights alone: its
    # `get_optimizer_state_dict` ends with a KeyError at the float32 copies of bfloat16 weights, which are no
    # parameters of the module, and where no step was taken it takes one to make moments of zeros
    result = {}
    for name, value in values.items():
        # each in turn, so that a device holds one unsharded tensor at a time
        complete = unsharded(value.detach())
        if process_rank() == 0:
            result[name] = complete.cpu()
    return result


def sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """An unsharded tensor on the device of `target`, with its dtype and sharded as it is."""
    value = value.to(device=target.device, dtype=target.dtype)
    if isinstance(target, DTensor):
        return distribute_tensor(value, target.device_mesh, target.placements)
    return value


def without_adapter(critic: Any) -> Any:
    """The transformers model inside a PEFT model, or the critic itself."""
    return critic.get_base_model() if hasattr(critic, "get_base_model") else critic


def _blocks(critic: nn.Module) -> Iterable[nn.Module]:
    """The transformer blocks, by the class names that transformers keeps for this purpose."""
    model = without_adapter(critic)
    names = getattr(model, "_no_split_modules", None)
    blocks = [module for module in critic.modules() if type(module).__name__ in (names or ())]
    if not blocks:
        warnings.warn(
            f"The critic {type(model).__name__} does not say which of its modules are transformer blocks "
            f"(_no_split_modules={names}): it is sharded as one unit, and takes the memory of a whole critic on every "
            "device.",
            UserWarning,
            stacklevel=2,
        )
    return blocks


@torch.no_grad()
def _broadcast(critic: nn.Module, device: torch.device) -> None:
    for value in critic.state_dict().values():
        moved = value.to(device)
        dist.broadcast(moved, src=0)
        value.copy_(moved)
