"""The accuracy of a policy in memory on the held-out problems of a task."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig

from trl_entropy.evaluation.estimates import estimate_proportion
from trl_entropy.tasks import Task


@dataclass(frozen=True)
class Measure:
    """Measures policies on held-out problems.

    Attributes:
        task: The task.
        problems: Its held-out problems.
        tokenizer: The policies'.
        seed: Of the sampling.
        length: Longest completion, in tokens.
    """

    task: Task
    problems: Dataset
    tokenizer: Any
    seed: int
    length: int

    def __call__(self, model: Any, when: str) -> dict[str, Any]:
        """Accuracy of one sampled completion a problem, its 95 % interval, and that of the greedy completion."""
        sampled = self._num_correct(model, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        greedy = self._num_correct(model, do_sample=False)
        accuracy = estimate_proportion(sampled, len(self.problems))
        return {
            f"accuracy_{when}": accuracy.value,
            f"accuracy_{when}_ci95": (accuracy.low, accuracy.high),
            f"greedy_accuracy_{when}": greedy / len(self.problems),
        }

    @torch.no_grad()
    def _num_correct(self, model: Any, **generation: Any) -> int:
        columns = {key: list(self.problems[key]) for key in self.problems.column_names}
        prompts = columns.pop("prompt")
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        model.eval()
        gpus = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), _without_own_settings(model):
            torch.manual_seed(self.seed)
            ids = model.generate(**encoded, max_new_tokens=self.length, **generation)
        completions = self.tokenizer.batch_decode(ids[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)
        rewards = [reward(prompts=prompts, completions=completions, **columns) for reward in self.task.reward_funcs]
        return sum(sum(of_problem) >= 1.0 for of_problem in zip(*rewards, strict=True))


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Have a model generate without the sampling settings that it came with, which training does not use either.

    `generate` falls back on them for all that it is not told, such as a repetition penalty. PEFT hands the adapter's
    on to the model below it.
    """
    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    before = [holder.generation_config for holder in holders]
    tokens = {name: getattr(before[-1], name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    for holder in holders:
        holder.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own
