"""Every field that `trl-entropy train` and `eval` read, and every option of the other commands, changes something.

No model is loaded: what is seen is what the trainer, the engine or the page would get. A new field must be added to
its table, with what shall differ when it does.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from trl import DatasetMixtureConfig, ModelConfig

from tests.commands.conftest import WriteRecipe, write_rows
from trl_entropy.commands import train
from trl_entropy.commands.train_arguments import TrainArguments
from trl_entropy.evaluation import arguments as evaluate_arguments
from trl_entropy.evaluation import measure
from trl_entropy.evaluation.arguments import EvaluateArguments
from trl_entropy.evaluation.engines import Completion, Sampling

Changes = dict[str, tuple[dict[str, Any], dict[str, Any], str]]

HELD_OUT = {"dataset_name": "splits", "eval_strategy": "steps", "dataset_test_split": "test"}
MIXED = {"dataset_name": None, "datasets": [{"path": "json", "data_files": "rows.jsonl"}]}
OF_A_TASK = {"dataset_name": None, "task": "corridor", "reward_funcs": None}
WITH_CRITICS = {"critics": ["policy"], "advantage_mask_fraction": 0.0, "entropy_filter_fraction": 0.0}
LORA = {"use_peft": True, "lora_target_modules": ["q_proj"]}
FOUR_BIT = {"load_in_4bit": True}
TRAIN_CHANGES: Changes = {
    "dataset_name": ({}, {"dataset_name": "solved.jsonl"}, "rows"),
    "dataset_config": ({"dataset_name": "configs", "dataset_config": "one"}, {"dataset_config": "two"}, "rows"),
    "dataset_train_split": ({"dataset_name": "splits"}, {"dataset_train_split": "validation"}, "rows"),
    "dataset_test_split": (HELD_OUT, {"dataset_test_split": "validation"}, "held-out rows"),
    "dataset_streaming": ({}, {"dataset_streaming": True}, "stream"),
    "ignore_bias_buffers": ({}, {"ignore_bias_buffers": True}, "refusal"),
    "reward_funcs": ({}, {"reward_funcs": "tests.commands.test_wiring.no_reward"}, "rewards"),
    "reward_model_name_or_path": ({}, {"reward_model_name_or_path": "copy"}, "rewards"),
    "task": (OF_A_TASK, {"task": "arithmetic"}, "rows"),
    "task_args": (OF_A_TASK, {"task_args": {"size": 100}}, "rows"),
    "environment_args": (OF_A_TASK, {"environment_args": {"max_turns": 15}}, "environment"),
    "critics": ({}, {"critics": ["policy"]}, "trainer"),
    "critic_lora_r": ({**WITH_CRITICS, "critic_lora_r": 2}, {"critic_lora_r": 4}, "critics' adapter"),
    "max_prompt_length": ({}, {"max_prompt_length": 2}, "rows"),
    "model_name_or_path": ({}, {"model_name_or_path": "copy"}, "policy"),
    "model_revision": ({}, {"model_revision": "next"}, "model's arguments"),
    "dtype": ({}, {"dtype": "bfloat16"}, "model's arguments"),
    "attn_implementation": ({}, {"attn_implementation": "sdpa"}, "model's arguments"),
    "use_peft": ({}, LORA, "adapter"),
    "lora_r": (LORA, {"lora_r": 4}, "adapter"),
    "lora_alpha": (LORA, {"lora_alpha": 4}, "adapter"),
    "lora_dropout": (LORA, {"lora_dropout": 0.5}, "adapter"),
    "lora_target_modules": (LORA, {"lora_target_modules": ["k_proj"]}, "adapter"),
    "lora_target_parameters": (LORA, {"lora_target_parameters": ["weight"]}, "adapter"),
    "lora_modules_to_save": (LORA, {"lora_modules_to_save": ["lm_head"]}, "adapter"),
    "lora_task_type": (LORA, {"lora_task_type": "SEQ_CLS"}, "adapter"),
    "use_rslora": (LORA, {"use_rslora": True}, "adapter"),
    "use_dora": (LORA, {"use_dora": True}, "adapter"),
    "load_in_8bit": ({}, {"load_in_8bit": True}, "quantization"),
    "load_in_4bit": ({}, FOUR_BIT, "quantization"),
    "bnb_4bit_quant_type": (FOUR_BIT, {"bnb_4bit_quant_type": "fp4"}, "quantization"),
    "use_bnb_nested_quant": (FOUR_BIT, {"use_bnb_nested_quant": True}, "quantization"),
    "bnb_4bit_quant_storage": (FOUR_BIT, {"bnb_4bit_quant_storage": "float16"}, "quantization"),
    "datasets": (MIXED, {"datasets": [{"path": "json", "data_files": "solved.jsonl"}]}, "rows"),
    "streaming": (MIXED, {"streaming": True}, "stream"),
    "test_split_size": ({}, {"test_split_size": 4}, "rows"),
}
"""Field of `train`: the settings around it, the change, and what it must change."""

SMALL_TASK = {"dataset_file": None, "task": "arithmetic", "task_args": {"size": 2}, "reward_funcs": None}
WITH_VLLM = {"backend": "vllm"}
EVALUATE_CHANGES: Changes = {
    "model": ({}, {"model": "copy"}, "engine"),
    "output_dir": ({}, {"output_dir": "elsewhere"}, "folder"),
    "benchmark": ({"benchmark": "aime24"}, {"benchmark": "aime25"}, "results"),
    "dataset_file": ({}, {"dataset_file": "more.jsonl"}, "prompts"),
    "task": (SMALL_TASK, {"task": "corridor"}, "refusal"),
    "task_args": (SMALL_TASK, {"task_args": {"size": 3}}, "prompts"),
    "split": (SMALL_TASK, {"split": "train"}, "prompts"),
    "reward_funcs": ({}, {"reward_funcs": "tests.commands.test_wiring.full_reward"}, "results"),
    "template": ({}, {"template": "none"}, "prompts"),
    "chat_template_kwargs": ({}, {"chat_template_kwargs": {"enable_thinking": False}}, "prompts"),
    "n": ({}, {"n": 3}, "seeds"),
    "temperature": ({}, {"temperature": 0.5}, "sampling"),
    "top_p": ({}, {"top_p": 0.5}, "sampling"),
    "max_new_tokens": ({}, {"max_new_tokens": 5}, "sampling"),
    "k": ({}, {"k": 2}, "results"),
    "limit": ({}, {"limit": 1}, "prompts"),
    "seed": ({}, {"seed": 1}, "seeds"),
    "batch_size": ({}, {"batch_size": 1}, "batches"),
    "backend": ({}, WITH_VLLM, "engine"),
    "dtype": ({}, {"dtype": "bfloat16"}, "engine"),
    "tensor_parallel_size": (WITH_VLLM, {"tensor_parallel_size": 2}, "engine"),
    "trust_remote_code": ({}, {"trust_remote_code": True}, "engine"),
}
"""Field of `eval`: the settings around it, the change, and what it must change."""


def no_reward(completions: list[Any], **columns: object) -> list[float | None]:
    return [0.0] * len(completions)


def full_reward(completions: list[Any], **columns: object) -> list[float | None]:
    return [1.0] * len(completions)


def names(*kinds: type) -> set[str]:
    return {field.name for kind in kinds for field in fields(kind)}


def test_every_field_of_train_is_in_its_table() -> None:
    known = names(TrainArguments, ModelConfig, DatasetMixtureConfig)
    assert known == TRAIN_CHANGES.keys()


def test_every_field_of_eval_is_in_its_table() -> None:
    assert EVALUATE_CHANGES.keys() == names(EvaluateArguments)


@pytest.fixture
def prepared(recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tiny_model_path: str) -> Callable[..., Any]:
    """`prepared(settings)`: what the trainer would be given, by name; or the refusal."""
    Path("copy").symlink_to(tiny_model_path)
    for name in ("configs", "splits"):
        Path(name).mkdir()
    for path in ("configs/one", "configs/two", "splits/train", "splits/test", "splits/validation"):
        write_rows(f"{path}.jsonl", [{"prompt": path.rpartition("/")[2]}] * 16)
    found = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("one", "two")]
    Path("configs", "README.md").write_text(f"---\nconfigs: {json.dumps(found)}\n---\n", encoding="utf-8")
    for name in ("EntropyGRPOTrainer", "AsyPPOTrainer"):
        monkeypatch.setattr(train, name, lambda name=name, **given: {"trainer": name, **given})

    def prepared(settings: dict[str, Any]) -> dict[str, Any]:
        try:
            plan = train.prepare(recipe(**settings))
        except ValueError as error:
            return {"refusal": str(error)}
        if not plan.model.model_name_or_path:
            raise AssertionError("a policy would be built")
        with train.open_trainer(plan) as given:
            return {
                "refusal": None,
                "rows": list(given["train_dataset"]),
                "held-out rows": given["eval_dataset"] and list(given["eval_dataset"]),
                "stream": isinstance(given["train_dataset"], IterableDataset),
                "rewards": given["reward_funcs"],
                "environment": given["rollout_func"] and vars(given["rollout_func"]).get("max_turns"),
                "trainer": given["trainer"],
                "policy": given["model"],
                "model's arguments": given["args"].model_init_kwargs,
                "adapter": str(given["peft_config"]),
                "quantization": str(given["quantization_config"]),
                "critics' adapter": str(given.get("critic_peft_config")),
            }

    return prepared


@pytest.mark.parametrize("field", TRAIN_CHANGES)
def test_a_field_of_train_changes_what_it_says(
    prepared: Callable[..., Any], bases: dict[str, Any], field: str
) -> None:
    settings, change, what = TRAIN_CHANGES[field]
    key = repr((prepared.__name__, settings))
    if key not in bases:
        bases[key] = prepared(settings)
    assert prepared({**settings, **change})[what] != bases[key][what]


class Engine:
    """Stands for an engine: every completion is a token that its seed decides."""

    def __init__(self, kind: str, made: list[Any], checkpoint: Any, sampling: Sampling, **options: Any) -> None:
        self.is_made_of, self.sampling, self.calls = (kind, checkpoint.name, options), sampling, []
        made.append(self)

    def generate(self, prompts: list[list[int]], seeds: list[int]) -> list[Completion]:
        self.calls.append((prompts, seeds))
        return [Completion([2 + seed % 90], truncated=False) for seed in seeds]


@pytest.fixture
def evaluated(tmp_path: Path, chat_model_path: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`evaluated(settings)`: what the engine was given and what was written, by name; or the refusal."""
    monkeypatch.chdir(tmp_path)
    for name in ("m", "copy"):
        Path(name).symlink_to(chat_model_path)
    for name, count in (("rows", 2), ("more", 3)):
        write_rows(f"{name}.jsonl", [{"problem": f"1+{i}=", "answer": str(i)} for i in range(count)])
    made: list[Engine] = []
    for kind in ("TransformersEngine", "VLLMEngine"):
        monkeypatch.setattr(measure, kind, lambda *given, kind=kind, **options: Engine(kind, made, *given, **options))
    monkeypatch.setattr(evaluate_arguments, "find_spec", lambda name: object())
    usual = {"model": "m", "output_dir": "out", "dataset_file": "rows.jsonl", "n": 2, "k": 1}
    usual |= {"reward_funcs": "tests.commands.test_wiring.no_reward", "backend": "transformers", "max_new_tokens": 4}

    def evaluated(settings: dict[str, Any]) -> dict[str, Any]:
        made.clear()
        before = set(tmp_path.iterdir())
        try:
            asked = EvaluateArguments(**{**usual, **settings})
            results = measure.evaluate(asked, measure.prepare(asked))["results"]
        except ValueError as error:
            return {"refusal": str(error)}
        (engine,), folders = made, set(tmp_path.iterdir()) - before
        for folder in folders:
            shutil.rmtree(folder)
        return {
            "refusal": None,
            "engine": engine.is_made_of,
            "sampling": engine.sampling,
            "prompts": [prompt for prompts, _ in engine.calls for prompt in prompts],
            "seeds": [seed for _, seeds in engine.calls for seed in seeds],
            "batches": [len(seeds) for _, seeds in engine.calls],
            "results": results,
            "folder": {folder.name for folder in folders},
        }

    return evaluated


@pytest.mark.parametrize("field", EVALUATE_CHANGES)
def test_a_field_of_eval_changes_what_it_says(
    evaluated: Callable[..., Any], bases: dict[str, Any], field: str
) -> None:
    settings, change, what = EVALUATE_CHANGES[field]
    key = repr((evaluated.__name__, settings))
    if key not in bases:
        bases[key] = evaluated(settings)
    assert evaluated({**settings, **change})[what] != bases[key][what]
