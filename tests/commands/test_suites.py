"""Problems by task, benchmark or file, graded as training grades them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from trl_entropy.commands.suites import Suite, grade, load_suites
from trl_entropy.tasks import rewards


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def length(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def suite(*reward_funcs: Any) -> Suite:
    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(3)]
    return Suite("s", Dataset.from_list(rows), reward_funcs, is_bare=False)


def test_a_file_a_benchmarks_file_and_a_task(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    source = write(tmp_path / "mine.jsonl", [{"problem": "1+1?", "answer": 2}])
    for (found,), name in [(load_suites(dataset_file=source), "mine"), (load_suites(["aime24"], source), "aime24")]:
        assert (found.name, found.is_bare, found.problems["solution"][:]) == (name, True, [r"\boxed{2}"])
        assert found.problems["prompt"][0] == [{"role": "user", "content": "1+1?"}]
        assert grade(found, [0, 0], [r"\boxed{2}", r"\boxed{3}"], [[1], [1]]) == [1.0, 0.0]
    (task,) = load_suites(task="arithmetic", task_args={"size": 5})
    assert (task.name, task.is_bare, len(task.problems)) == ("arithmetic", False, 5)
    answers = task.problems["answer"]
    assert grade(task, [4, 0, 4], [answers[4], answers[4], "x"], [[], [], []]) == [1.0, 0.0, 0.0]


def test_a_procedural_task() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'trl_entropy[gym]'")
    arguments = {"name": "count_bits", "test_size": 2, "answer_format": "plain"}
    (found,) = load_suites(task="reasoning_gym", task_args=arguments)
    number = int(re.findall(r"\d+", found.problems["prompt"][0].replace(",", ""))[-1])
    assert grade(found, [0, 0], [str(number.bit_count()), "-1"], [[], []]) == [1.0, 0.0]


def test_rewards_in_place_of_the_tasks_own() -> None:
    (found,) = load_suites(
        task="arithmetic", task_args={"size": 2}, reward_funcs=["tests.commands.test_suites.length"]
    )
    assert grade(found, [1, 0], ["abc", ""], [[], []]) == [3.0, 0.0]


def test_rewards_add_up_and_get_the_rows_columns() -> None:
    seen: dict[str, Any] = {}

    def matches(prompts: list[str], completions: list[str], answer: list[str], **others: Any) -> list[float | None]:
        seen.update(others, prompts=prompts)
        return [None if text == "?" else float(text == right) for text, right in zip(completions, answer, strict=True)]

    assert grade(suite(matches, length), [2, 0, 1], ["2", "22", "?"], [[7], [7, 7], [8]]) == [2.0, 2.0, None]
    assert seen["prompts"] == ["2?", "0?", "1?"]
    assert seen["completion_ids"] == [[7], [7, 7], [8]]
    seen["log_metric"]("name", 1.0)


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"task_args=\{'sizes': 2\} does not fit task='arithmetic', which takes size"):
        load_suites(task="arithmetic", task_args={"sizes": 2})
    with pytest.raises(ValueError, match=r"'accuracy_reward' asks for solution"):
        load_suites(task="arithmetic", task_args={"size": 2}, reward_funcs=["accuracy_reward"])
    with pytest.raises(ValueError, match=r"task='corridor' is played over several turns"):
        load_suites(task="corridor")
    monkeypatch.setattr(rewards, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"trl_entropy\[maths\]"):
        load_suites(dataset_file=write(tmp_path / "mine.jsonl", [{"problem": "1+1?", "answer": 2}]))
