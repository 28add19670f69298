"""Which weights a critic should be trained in: bytes a weight, time of a step, and how far the weights have moved.

Three ways of computing in bfloat16: weights in it, of which the optimizer keeps float32 copies (`critic_dtype:
bfloat16`), float32 weights under autocast (`critic_dtype: float32` with `bf16: true`), and float32 weights that the
mixed precision of FSDP2 casts as it gathers them. Arms take a step in turn: they share what else the machine does.
`update` is the distance of the weights from float32's after all steps, over what float32's have moved.

    torchrun --nproc_per_node 2 tests/benchmarks/critic_weights.py          # CPU, gloo
    torchrun --nproc_per_node 2 tests/benchmarks/critic_weights.py --hidden 896 --layers 24   # GPUs: 0.4B
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from step_overhead import machine
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForTokenClassification, Qwen2Config, set_seed

from trl_entropy.critics.optimizer import CriticOptimizer

ARMS = {
    "float32": (torch.float32, False, None),
    "bfloat16, float32 copies": (torch.bfloat16, True, None),
    "float32, autocast": (torch.float32, True, None),
    "float32, FSDP2 casts": (torch.float32, False, torch.bfloat16),
}
"""Dtype of the weights, autocast, and what FSDP2 casts to."""


class Arm:
    """A critic, sharded over the processes, and its optimizer."""

    def __init__(self, name: str, config: Qwen2Config, device: str) -> None:
        dtype, self.autocast, cast = ARMS[name]
        set_seed(0)
        self.critic = AutoModelForTokenClassification.from_config(config, dtype=torch.float32).to(device, dtype)
        self.size = sum(weight.numel() for weight in self.critic.parameters())
        policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32)
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for module in [*self.critic.model.layers, self.critic]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self.optimizer = CriticOptimizer(self.critic, learning_rate=1e-4, weight_decay=0.0, max_grad_norm=1.0)
        self.device, self.seconds, self.bytes = device, [], 0

    def step(self, ids: Tensor, targets: Tensor) -> None:
        started = time.perf_counter()
        context = torch.autocast(self.device, dtype=torch.bfloat16) if self.autocast else nullcontext()
        with context:
            values = self.critic(input_ids=ids).logits.squeeze(-1)
        (values.float() - targets).square().mean().backward()
        copies = self.optimizer._copies
        held = [*self.critic.parameters(), *copies.values(), *(copy.grad for copy in copies.values())]
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        held += [value for state in self.optimizer._adamw.state.values() for value in state.values()]
        self.bytes = num_bytes(held)

    def weights(self) -> Tensor:
        copies = self.optimizer._copies.values()
        return torch.cat([copy.detach().full_tensor().flatten() for copy in copies])


def num_bytes(tensors: list[Any]) -> int:
    """Of the shards on this process, each counted once."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in tensors if value is not None]
    return sum({value.data_ptr(): value.numel() * value.element_size() for value in local if value.dim()}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden,
        num_labels=1,
    )
    arms = {name: Arm(name, config, device) for name in ARMS}
    start = arms["float32"].weights()
    generator = torch.Generator().manual_seed(dist.get_rank())
    for index in range(options.rounds):
        ids = torch.randint(4096, (4, 256), generator=generator).to(device)
        targets = (ids % 2).float()
        for name in list(ARMS)[:: 1 if index % 2 else -1]:
            arms[name].step(ids, targets)
    report(arms, start, device)
    dist.destroy_process_group()


def report(arms: dict[str, Arm], start: Tensor, device: str) -> None:
    moved = {name: arm.weights() - start for name, arm in arms.items()}
    if dist.get_rank():
        return
    exact = moved["float32"]
    print(f"{arms['float32'].size / 1e6:.1f}M weights over {dist.get_world_size()} processes; {machine(device)}")
    print(f"{'':26}{'bytes a weight':>15}{'time / float32':>16}{'quartiles':>16}{'update':>9}")
    for name, arm in arms.items():
        ratios = [own / other for own, other in zip(arm.seconds[2:], arms["float32"].seconds[2:], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        per_weight = arm.bytes * dist.get_world_size() / arm.size
        distance = ((moved[name] - exact).norm() / exact.norm()).item()
        print(f"{name:26}{per_weight:15.1f}{median:16.2f}{f'{low:.2f} to {high:.2f}':>16}{distance:9.3f}")


if __name__ == "__main__":
    main()
