"""Asynchronous training without a server: rollouts that were made before, and attention without a GPU's kernel."""

import queue
import random
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import trl
from packaging.version import Version
from torch import Tensor

SINCE = Version("1.16")
"""TRL whose asynchronous trainer the controls fit. Without any other package it can be imported."""
OFF = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
TRAINING = {
    **OFF,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "token_budget": 0,
    "max_staleness": 4,
    "seed": 0,
}
"""Fields of the configuration."""


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """What FlashAttention's `flash_attn_varlen_func` computes: each segment attends to its own keys, the last of which
    are at the segment's own positions."""
    assert causal
    assert window_size == (-1, -1)
    outputs = []
    groups = query.shape[1] // key.shape[1]
    for first, last, k_first, k_last in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        q = query[first:last].transpose(0, 1)
        k, v = (x[k_first:k_last].transpose(0, 1).repeat_interleave(groups, 0) for x in (key, value))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = (q @ k.transpose(1, 2) * softmax_scale).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def skip(error: ImportError) -> NoReturn:
    """Skip a test, or the module that calls this, of asynchronous training on a TRL that is too old for it.

    Raises:
        ImportError: On any other, where it is the fault of this package or a change of TRL's.
    """
    if Version(trl.__version__) >= SINCE:
        raise error
    pytest.skip(str(error), allow_module_level=True)


def require(name: str) -> Any:
    """A module of `trl_entropy.trainers`; skips a test module where TRL is too old for it."""
    try:
        from trl_entropy.trainers.async_contact import AsyncGRPOTrainer
        from trl_entropy.trainers.contact_table import check_async_type

        check_async_type(AsyncGRPOTrainer)
    except ImportError as error:
        skip(error)
    return import_module(f"trl_entropy.trainers.{name}")


def run_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let TRL's asynchronous trainer run on the CPU: it asks CUDA for its peak, and FlashAttention has no kernel."""
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    patch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    patch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention))


class MadeRollouts:
    """A rollout worker whose samples are made up in groups, with ages drawn from `ages` as far as there are versions.

    A second worker with the same seed makes the same samples. With few letters, samples of a group often begin alike,
    and TRL packs what they share once.
    """

    def __init__(self, seed: int = 0, ages: Sequence[int] = (0, 1, 2), group_size: int = 4, letters: int = 3) -> None:
        self.random = random.Random(seed)
        self.ages, self.group_size, self.letters = ages, group_size, range(2, 2 + letters)
        self.version, self.groups = 0, 0
        self.taken: list[Any] = []
        self.rollout_buffer: Any = self
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        self._waiting: list[Any] = []

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def check_health(self, stale_after_s: float) -> None: ...

    def update_model_version(self, model_version: int) -> None:
        self.version = model_version

    def qsize(self) -> int:
        return len(self._waiting)

    def get(self, timeout: float | None = None) -> Any:
        if not self._waiting:
            self._waiting = list(self._group())
        self.taken.append(self._waiting.pop(0))
        return self.taken[-1]

    def _group(self) -> Iterator[Any]:
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        draw, self.groups = self.random, self.groups + 1
        prompt = [draw.choice(self.letters) for _ in range(draw.randint(1, 4))]
        for index in range(self.group_size):
            # turns of an episode: written, read, written
            lengths = [draw.randint(1, 4), draw.randint(0, 2), draw.randint(0, 2)]
            written = [1] * lengths[0] + [0] * lengths[1] + [1] * lengths[2]
            ids = prompt + [draw.choice(self.letters) for _ in written]
            logps = [0.0] * len(prompt) + [draw.uniform(-5.0, -1.0) for _ in written]
            reward = float(index % 2)
            yield RolloutSample(
                prompt=[],
                completion=[],
                input_ids=np.array(ids),
                completion_mask=np.array([0] * len(prompt) + written),
                old_log_probs=np.array(logps, dtype=np.float32),
                advantage=draw.choice([-1.5, 0.8, 1.3, -0.4]),
                model_version=max(self.version - draw.choice(self.ages), min(self.version, 1)),
                group_id=self.groups,
                metrics={"reward": reward},
            )


class NoTransfer:
    """A hand-over of weights to nobody."""

    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        for _ in iterator:
            pass

    def resume(self) -> None: ...

    def destroy(self) -> None: ...


def make_async_trainer(
    output_dir: str,
    model: str,
    dataset: Any,
    *,
    trainer_class: Callable[..., Any] | None = None,
    config_class: Callable[..., Any] | None = None,
    rollout_worker: Any = None,
    weight_transfer: Any = None,
    peft_config: Any = None,
    **fields: Any,
) -> Any:
    """A trainer whose rollouts are made up."""
    from trl_entropy import EntropyAsyncGRPOConfig, EntropyAsyncGRPOTrainer

    args = (config_class or EntropyAsyncGRPOConfig)(output_dir=output_dir, **{**TRAINING, **fields})
    return (trainer_class or EntropyAsyncGRPOTrainer)(
        model=model,
        args=args,
        train_dataset=dataset,
        peft_config=peft_config,
        rollout_worker=rollout_worker or MadeRollouts(),
        weight_transfer=weight_transfer or NoTransfer(),
    )
