"""The fields of `trl-entropy eval`: defaults and refusals."""

from typing import Any

import pytest

from trl_entropy.commands.evaluate import parse
from trl_entropy.evaluation import arguments as evaluate_arguments
from trl_entropy.evaluation.arguments import EvaluateArguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": []}, "model and output_dir are needed"),
        ({"model": ["a", "a"]}, "twice"),
        ({"benchmark": []}, "Set one of benchmark, task and dataset_file"),
        ({"task": "maths"}, "Set one of"),
        ({"benchmark": ["aime24", "aime25"], "dataset_file": "f.jsonl"}, "one benchmark"),
        ({"benchmark": [], "task": "maths", "dataset_file": "f.jsonl"}, "dataset_file goes with"),
        ({"task_args": {"size": 2}}, "needs a task"),
        ({"task_args": "{size: 2}"}, "is not JSON"),
        ({"chat_template_kwargs": "[1]"}, "is not a mapping"),
        ({"template": "llama"}, "template='llama' is unknown"),
        ({"backend": "sglang"}, "backend='sglang' is unknown"),
        ({"n": 0}, "n=0"),
        ({"limit": 0}, "limit=0"),
        ({"k": [1, 64]}, r"k=\[1, 64\] must be in 1\.\.n=32"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"temperature": -0.1}, r"temperature=-0\.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 0.0}, "Set n=1"),
    ],
)
def test_bad_fields_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"model": ["m"], "output_dir": "out", "benchmark": ["aime24"], "backend": "transformers", **changes}
    with pytest.raises(ValueError, match=message):
        EvaluateArguments(**fields)


def test_the_papers_settings_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_arguments, "find_spec", lambda name: None)
    found = parse(["--model", "a", "b", "--benchmark", "aime24", "hmmt25", "--output_dir", "out"])
    assert (found.n, found.temperature, found.top_p, found.max_new_tokens) == (32, 0.6, 0.95, 32768)
    assert (found.model, found.benchmark, found.k) == (["a", "b"], ["aime24", "hmmt25"], [1, 16, 32])
    assert (found.backend, found.trust_remote_code) == ("transformers", False)


def test_vllm_is_taken_if_it_is_installed_and_named_if_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"model": ["m"], "output_dir": "out", "benchmark": ["aime24"]}
    monkeypatch.setattr(evaluate_arguments, "find_spec", lambda name: object())
    assert EvaluateArguments(**fields).backend == "vllm"
    monkeypatch.setattr(evaluate_arguments, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"trl_entropy\[vllm\]"):
        EvaluateArguments(**fields, backend="vllm")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        EvaluateArguments(model=["m"], output_dir="out", benchmark=["aime24"], backend="transformers")
