"""Problems by task, benchmark or file, graded as training grades them."""

import asyncio
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version

from trl_entropy.evaluation.suites import RewardError, Suite, grade, load_suites
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
        task="arithmetic", task_args={"size": 2}, reward_funcs=["tests.evaluation.test_suites.length"]
    )
    assert grade(found, [1, 0], ["abc", ""], [[], []]) == [3.0, 0.0]


def test_rewards_add_up_and_get_the_rows_columns() -> None:
    seen: dict[str, Any] = {}

    def matches(prompts: list[str], completions: list[str], answer: list[str], **others: Any) -> list[float | None]:
        seen.update(others, prompts=prompts)
        return [None if text == "?" else float(text == right) for text, right in zip(completions, answer, strict=True)]

    assert grade(suite(matches, length), [2, 0, 1], ["2", "22", "?"], [[7], [7, 7], [8]]) == [2.0, 2.0, 1.0]
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


TEXTS = ["2", "", "?", "4444"]


def scaled(completions: list[str], factor: float = 0.1, **columns: Any) -> list[float]:
    return [factor * len(text) for text in completions]


async def waits(completions: list[str], **columns: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [None if text == "?" else float(len(text)) for text in completions]


class Judge:
    """A reward with a state, which waits."""

    async def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return await waits(completions)  # type: ignore[return-value]


class Counter:
    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> tuple[float, ...]:
        return tuple(float(len(ids)) for ids in completion_ids)

    def method(self, completions: list[str], **columns: Any) -> list[float]:
        return scaled(completions)


def never(completions: list[str], **columns: Any) -> list[float]:
    return [math.nan] * len(completions)


def some(completions: list[str], **columns: Any) -> list[float | None]:
    return [1.0, None, math.nan, -math.inf]


def uses_state(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
    return [float(trainer_state.global_step > -1)] * len(completions)


def no_more(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer):  # type: ignore
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


REWARDS: dict[str, Callable[..., Any]] = {
    "function": scaled,
    "partial": partial(scaled, factor=0.7),
    "asynchronous": waits,
    "asynchronous partial": partial(waits, unused=1),
    "object": Counter(),
    "method": Counter().method,
    "asynchronous object": Judge(),
    "partial of an object": partial(Judge(), unused=1),
    "tensor": lambda completions, **_: torch.tensor(scaled(completions), dtype=torch.float64),
    "list of tensors": lambda completions, **_: list(torch.tensor(scaled(completions))),
    "array": lambda completions, **_: np.asarray(scaled(completions), dtype=np.float32),
    "integers and truth": lambda completions, **_: [1, True, np.int64(3), np.bool_(False)],
    "generator": lambda completions, **_: (length for length in scaled(completions)),
    "never": never,
    "some": some,
    "state": uses_state,
    "no more arguments": no_more,
}


@pytest.mark.parametrize("names", [[name] for name in REWARDS] + [["some", "never"], ["some", "array"], list(REWARDS)])
def test_rewards_are_those_of_the_trainer(names: list[str], make_trainer: Callable[..., Any]) -> None:
    if Version(trl.__version__) < Version("1.14") and any("object" in name and "async" in name for name in names):
        pytest.skip("this TRL does not await objects")
    if Version(trl.__version__) < Version("1.14") and ("partial of an object" in names or len(names) > 9):
        pytest.skip("this TRL does not await objects")
    rows = [{"prompt": f"{i}?", "answer": str(i), "completion": "x"} for i in range(4)]
    token_ids = [[5] * (i + 1) for i in range(4)]
    chosen = [REWARDS[name] for name in names]
    trainer = make_trainer(reward_funcs=list(chosen))
    prompts = [row["prompt"] for row in rows]
    per_function = trainer._calculate_rewards(rows, prompts, TEXTS, token_ids)
    expected = per_function.nansum(1).tolist()
    unscored = per_function.isnan().all(1).tolist()
    graded = grade(Suite("s", Dataset.from_list(rows), tuple(chosen), is_bare=False), [0, 1, 2, 3], TEXTS, token_ids)
    assert graded == [None if skip else reward for skip, reward in zip(unscored, expected, strict=True)]


def test_asynchronous_rewards_run_together_and_on_one_loop() -> None:
    loops: list[Any] = []
    meeting: dict[str, asyncio.Event] = {}

    async def first(completions: list[str], **columns: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        meeting["event"] = asyncio.Event()
        await asyncio.wait_for(meeting["event"].wait(), 10)
        return [1.0]

    async def second(completions: list[str], **columns: Any) -> list[float]:
        meeting["event"].set()
        return [2.0]

    for _ in range(2):
        assert grade(suite(first, scaled, second), [0], ["2" * 10], [[]]) == [4.0]
    assert loops[0] is loops[1]

    async def nested() -> list[float | None]:
        return grade(suite(waits), [0], ["2"], [[]])

    assert asyncio.run(nested()) == [1.0]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, r"'reward' returned None, which is not a number \(or None\) for each completion"),
        (1.0, r"returned 1\.0, which is not"),
        ([1.0], r"'reward' returned 1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], r"returned 3 rewards for 2 completions"),
        (["1.0", "0.0"], r"'1\.0' is text"),
        ("10", "'1' is text"),
        ([[1.0], [0.0]], r"returned \[\[1\.0\], \[0\.0\]\], which is not a number"),
        (torch.zeros(2, 2), "which is not a number"),
        ({"a": 1.0, "b": 0.0}, "'a' is text"),
    ],
)
def test_what_is_no_reward_is_refused(output: Any, message: str) -> None:
    def reward(completions: list[str], **columns: Any) -> Any:
        return output

    with pytest.raises(RewardError, match=message):
        grade(suite(reward), [0, 1], ["2", "2"], [[], []])


def test_names_of_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert suite(partial(scaled, factor=2), Counter(), waits).reward_names == ("scaled", "Counter", "waits")
    source = """
from functools import partial
from torch import nn

def base(completions, scale=1, **columns):
    return [0.0 for _ in completions]

double, triple, model = partial(base, scale=2), partial(base, scale=3), nn.Linear(1, 1)
"""
    (tmp_path / "named_rewards.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = ["named_rewards.double", "named_rewards.triple"]
    (found,) = load_suites(task="arithmetic", task_args={"size": 2}, reward_funcs=wanted)
    assert found.reward_names == ("double", "triple")
    with pytest.raises(ValueError, match="reward_funcs='model' is a model, and eval grades by functions"):
        load_suites(task="arithmetic", task_args={"size": 2}, reward_funcs=["named_rewards.model"])
    with pytest.raises(ValueError, match="'think_format_reward' reads chat messages, and the prompts are text"):
        load_suites(task="arithmetic", task_args={"size": 2}, reward_funcs=["think_format_reward"])
