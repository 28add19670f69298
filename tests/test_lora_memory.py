"""The memory that the LoRA recipes take, computed from the architectures and the recipes' own numbers.

The activations are the peak over a forward and a backward pass of the real shapes on fake tensors, which allocate
nothing. It is a calculation: no GPU is measured here.
"""

import re
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import peft
import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_entropy.recipes import recipe_names, recipe_path

GIB = 2**30
CARDS = {"24gb": 22.0, "80gb": 79.0}
"""GiB that the smallest cards sold under that name leave to PyTorch (L4 and A10G; A100)."""
ARCHITECTURES = {
    # config.json of deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B and -7B
    "1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
ONE_GPU = {"gradient_accumulation_steps": 128, "steps_per_generation": 1024}
"""What the header's last lines set, to run a recipe of several GPUs on one: the same batch and the same rollout."""
IN_HEADERS = {
    "1.5b-lora-24gb": (3.31, 0.55, 2.88, 0.50, 1.42, 11.00, 19.66, 18),
    "1.5b-lora": (3.31, 0.55, 6.34, 1.00, 1.82, 23.70, 36.72, 32),
    "7b-lora": (14.19, 1.20, 12.68, 1.00, 3.61, 31.60, 64.28, 13),
}
"""GiB of weights, adapter, activations, rollout, spare, vLLM's share and in all; sequences that the KV cache holds."""
NAMES = [name for name in recipe_names() if re.match(r"(erc|ce-gppo)-r1-distill-qwen-.*-lora", name)]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self._seen = 0, 0, WeakIdKeyDictionary()

    def ignore(self, tensor: torch.Tensor) -> None:
        self._seen[tensor.untyped_storage()] = True

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out


def lora_model(size: str, rank: int, **changes: int) -> Any:
    """The policy as a recipe builds it, without memory: weights of 2 bytes, a float32 adapter on all linear layers."""
    shape = {**ARCHITECTURES[size], **changes}
    config = Qwen2Config(**shape, tie_word_embeddings=False, attn_implementation="sdpa")
    lora = peft.LoraConfig(r=rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        return peft.get_peft_model(Qwen2ForCausalLM(config).to(torch.bfloat16), lora)


@cache
def parameters(size: str, rank: int) -> tuple[int, int]:
    """How many are frozen, and how many are trained."""
    values = list(lora_model(size, rank).parameters())
    assert {value.dtype for value in values if value.requires_grad} == {torch.float32}
    frozen, trained = (sum(value.numel() for value in values if value.requires_grad is on) for on in (False, True))
    return frozen, trained


def checkpoint_bytes(size: str, tokens: int) -> int:
    """What gradient checkpointing keeps of one layer: its input, 2 bytes a number."""
    return 2 * tokens * ARCHITECTURES[size]["hidden_size"]


@cache
def activation_bytes(size: str, rank: int, tokens: int, layers: int = 1) -> int:
    """Peak bytes beside the parameters over one sequence's forward and backward pass.

    Traced through `layers` layers; each further one only adds what gradient checkpointing keeps of it.
    """
    model = lora_model(size, rank, num_hidden_layers=layers)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with FakeTensorMode():
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                setattr(module, name, torch.nn.Parameter(fake, requires_grad=value.requires_grad))
            for name, value in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype, device="cpu"))
        counter = LiveBytes()
        for value in model.parameters():
            counter.ignore(value)
        ids, mask = torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens, dtype=torch.long)
        with counter, torch.autocast("cpu", torch.bfloat16):
            backbone = model.base_model.model.model
            backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
    return counter.peak + (ARCHITECTURES[size]["num_hidden_layers"] - layers) * checkpoint_bytes(size, tokens)


@dataclass(frozen=True)
class Memory:
    """What a recipe takes of a GPU, in GiB but for the last two."""

    weights: float
    adapter: float
    activations: float
    inputs: float  # of the activations, what gradient checkpointing keeps
    rollout: float
    spare: float
    share: float  # vLLM's, of which the next two are working space and KV cache, beside its copy of the weights
    work: float
    cache: float
    per_token: int  # bytes of the KV cache
    sequences: int  # whole ones that the KV cache has room for

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.activations + self.rollout + self.spare + self.share


def card_of(name: str) -> str:
    return "24gb" if name.endswith("24gb") else "80gb"


def size_of(name: str) -> str:
    return "7b" if "7b" in name else "1.5b"


def fields_of(name: str) -> dict[str, Any]:
    """A recipe, to be run on one GPU."""
    recipe: dict[str, Any] = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))
    return recipe | (ONE_GPU if card_of(name) == "80gb" else {})


def memory(name: str) -> Memory:
    recipe, size = fields_of(name), size_of(name)
    shape = ARCHITECTURES[size]
    frozen, trained = parameters(size, recipe["lora_r"])
    completion, tokens = recipe["max_completion_length"], recipe["max_prompt_length"] + recipe["max_completion_length"]
    rows = recipe["per_device_train_batch_size"] * recipe["steps_per_generation"]
    weights, adapter = 2 * frozen / GIB, 16 * trained / GIB
    activations = activation_bytes(size, recipe["lora_r"], tokens) / GIB
    # a token's id and mask, 8 bytes each; a completion's also old and sampling log-prob and old entropy, 4 bytes each
    rollout = 2 * rows * (16 * tokens + 12 * completion) / GIB
    share = recipe["vllm_gpu_memory_utilization"] * CARDS[card_of(name)]
    work = 3 * 4 * rows * shape["vocab_size"] / GIB + 1
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    per_token = 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim
    return Memory(
        weights=weights,
        adapter=adapter,
        activations=activations,
        inputs=shape["num_hidden_layers"] * checkpoint_bytes(size, tokens) / GIB,
        rollout=rollout,
        spare=0.1 * (weights + adapter + activations + rollout) + 0.7,
        share=share,
        work=work,
        cache=share - weights - work,
        per_token=per_token,
        sequences=int((share - weights - work) * GIB / per_token / tokens),
    )


def header(name: str) -> str:
    """A recipe's lines about memory."""
    recipe, size, card, m = fields_of(name), size_of(name), card_of(name), memory(name)
    frozen, trained = parameters(size, recipe["lora_r"])
    rows = recipe["per_device_train_batch_size"] * recipe["steps_per_generation"]
    tokens = recipe["max_prompt_length"] + recipe["max_completion_length"]
    where = (
        " on one GPU alone (--num_processes 1 --gradient_accumulation_steps 128 --steps_per_generation 1024),\n#"
        if card == "80gb"
        else ","
    )
    lines = f"""\
# Memory in GiB{where} calculated from the architecture and not measured (tests/test_lora_memory.py):
#   {m.weights:6.2f}  weights: {frozen:,} in {recipe["dtype"]}
#   {m.adapter:6.2f}  adapter: {trained:,} x 16 bytes, its gradient and AdamW's two moments included, all float32
#   {m.activations:6.2f}  activations, at {tokens} tokens: {m.inputs:.2f} of checkpoints, \
the rest of the one layer in work; the LM
#           head's tile of 4096 x 32768 logits, 0.25, is gone before that peak
#   {m.rollout:6.2f}  rollout: {rows} completions, padded to {tokens} tokens, twice while it is shuffled
#   {m.spare:6.2f}  spare: a tenth of the above for fragmentation, 0.7 for the CUDA context
#   {m.share:6.2f}  vLLM, {recipe["vllm_gpu_memory_utilization"]} of the GPU: {m.weights:.2f} weights, \
{m.work:.2f} working space (1, and 3 x {rows} rows of float32
#           logits), {m.cache:.2f} KV cache for {m.sequences} whole sequences of {m.per_token:,} bytes a token
#   {m.total:6.2f}  in all, of {CARDS[card]:.0f} that a GPU sold as {card[:2]} GB has at least
"""
    if size == "7b":
        lines += f"# Not on 24 GB: the policy's weights and vLLM's copy of them are {2 * m.weights:.2f}.\n"
    return lines


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_card(name: str) -> None:
    """With the numbers of its header, which `python -m tests.test_lora_memory` prints anew where this is red."""
    found = memory(name)
    assert found.total < CARDS[card_of(name)]
    assert found.sequences >= 8
    # versions of transformers differ in a few temporary tensors
    parts = (found.weights, found.adapter, found.activations, found.rollout, found.spare, found.share)
    expected = IN_HEADERS[name.split("-r1-distill-qwen-")[1]]
    assert (*parts, found.total, found.sequences) == pytest.approx(expected, rel=0.02)


def test_the_published_parameter_counts() -> None:
    """1.78 and 7.62 billion; LoRA of rank 32 on every linear layer but the head."""
    # 28 layers x 32 x (in + out of q, k, v, o, gate, up, down)
    assert parameters("1.5b", 32) == (1_777_088_000, 28 * 32 * (3072 + 2 * 1792 + 3072 + 3 * 10496))
    assert parameters("7b", 32) == (7_615_616_512, 28 * 32 * (7168 + 2 * 4096 + 7168 + 3 * 22528))


def test_a_further_layer_adds_its_checkpoint() -> None:
    """And the gradients of its adapter, which are counted with the adapter."""
    more = activation_bytes("1.5b", 32, 10240, layers=3) - activation_bytes("1.5b", 32, 10240)
    assert 0 <= more <= 2 * 4 * parameters("1.5b", 32)[1] / 28


def test_the_trace_counts_what_is_alive() -> None:
    with FakeTensorMode():
        counter = LiveBytes()
        with counter:
            kept = torch.empty(1000, dtype=torch.float32)
            torch.empty(500, dtype=torch.float32)
            assert kept.view(10, 100).shape == (10, 100)  # a view is no storage of its own
            assert (counter.live, counter.peak) == (4000, 6000)
            del kept
            assert (counter.live, counter.peak) == (0, 6000)


if __name__ == "__main__":
    for each in NAMES:
        print(f"{each}\n{header(each)}")
