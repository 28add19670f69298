r"""Grading as training and `eval` do it: rows through the task `maths`, completions through its reward."""

import itertools
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.tasks.grading_table import BOXED, TEXTS, UNMET, pairs
from trl_entropy.evaluation.benchmarks import load_benchmark
from trl_entropy.evaluation.suites import grade, load_suites
from trl_entropy.tasks import get_task, grading
from trl_entropy.tasks.extraction import completion_answer, gold_answer
from trl_entropy.tasks.grading import maths_reward, reasoning_maths_reward
from trl_entropy.tasks.latex import latex
from trl_entropy.tasks.rewards import load_reward_func

equality = pytest.importorskip("trl_entropy.tasks.equality", reason="the extra `maths` is not installed")


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def loaded_golds(golds: list[Any], folder: Path) -> list[str]:
    """What the task makes of a column of answers."""
    Dataset.from_list([{"problem": "?", "answer": gold} for gold in golds]).to_parquet(folder / "rows.parquet")
    return list(get_task("maths").load("train", source=str(folder / "rows.parquet"))["solution"])


def mistakes(rows: list[tuple[str, Any, str, float]], folder: Path) -> list[tuple[Any, str, float | None]]:
    """Gold, completion and reward of the rows whose reward is not the one that they should get."""
    (reward,) = get_task("maths").reward_funcs
    wrong = []
    for _, group in itertools.groupby(rows, key=lambda row: type(row[1])):
        of_type = list(group)
        golds = loaded_golds([row[1] for row in of_type], folder)
        rewards = reward(completions=[message(row[2]) for row in of_type], solution=golds)
        wrong += [(row[1], row[2], got) for row, got in zip(of_type, rewards, strict=True) if got != row[3]]
    return wrong


def test_the_table_is_large_and_even() -> None:
    rewards = [reward for *_, reward in pairs()]
    assert len(rewards) > 1500
    assert 0.4 < sum(rewards) / len(rewards) < 0.6
    assert len({(str(gold), text) for _, gold, text, _ in pairs()}) == len(rewards)


@pytest.mark.parametrize("kind", [*BOXED, *TEXTS])
def test_every_answer_of_the_table_is_graded_rightly(kind: str, tmp_path: Path) -> None:
    assert mistakes([row for row in pairs() if row[0] == kind], tmp_path) == []


@pytest.mark.xfail(strict=True, reason="see the table")
@pytest.mark.parametrize(("gold", "answer", "reward"), UNMET)
def test_what_is_not_met(gold: str, answer: str, reward: float, tmp_path: Path) -> None:
    assert mistakes([("", gold, rf"\boxed{{{answer}}}", reward)], tmp_path) == []


def test_eval_and_benchmarks_grade_as_training_does(tmp_path: Path) -> None:
    rows = [{"problem": "?", "answer": gold} for gold in ("30°", r"\frac14")]
    Dataset.from_list(rows).to_parquet(tmp_path / "mine.parquet")
    texts = [r"\boxed{30}", r"\boxed{\frac14}", r"\boxed{60}", r"\boxed{\frac41}"]
    for benchmarks in ([], ["aime24"]):
        (suite,) = load_suites(benchmarks, str(tmp_path / "mine.parquet"))
        assert suite.reward_funcs == (maths_reward,)
        assert grade(suite, [0, 1, 0, 1], texts, [[]] * 4) == [1.0, 1.0, 0.0, 0.0]
    (suite,) = load_suites(dataset_file=str(tmp_path / "mine.parquet"), reward_funcs=["reasoning_maths_reward"])
    assert grade(suite, [0, 0], [r"<think>6</think>\boxed{30^\circ}", r"\boxed{30}"], [[]] * 2) == [1.0, 0.0]


def test_numbers_of_benchmarks(tmp_path: Path) -> None:
    Dataset.from_list([{"problem": "?", "answer": 1e-05}]).to_parquet(tmp_path / "rows.parquet")
    assert load_benchmark("aime24", str(tmp_path / "rows.parquet"))["solution"][0] == r"\boxed{0.00001}"
    Dataset.from_list([{"problem": "?", "answer": float("nan")}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="row 0, column 'answer': no answer"):
        load_benchmark("aime24", str(tmp_path / "rows.parquet"))


def test_reasoning_is_taken_off() -> None:
    """As TRL's `reasoning_accuracy_reward` in its documentation, with answers that it does not read."""
    completions = [
        message(r"<think> \boxed{5} </think> The final answer is \boxed{\frac13}"),
        message(r"<think> Reasoning </think> The final answer is \boxed{\frac12}"),
        message(r"<think> Partial answers \boxed{\frac13} but no final answer"),
        message(r"<think> a </think> \boxed{5} <think> b </think> \boxed{\frac13}"),
    ]
    assert reasoning_maths_reward(completions, [r"\frac13"] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert reasoning_maths_reward([message(r"x END \boxed{1}")], ["1"], reasoning_delimiters=["STOP", "END"]) == [1.0]


def test_names_of_the_rewards() -> None:
    assert load_reward_func("maths_reward") is maths_reward
    assert load_reward_func("reasoning_maths_reward") is reasoning_maths_reward


def test_golds_that_are_not_understood_have_no_reward() -> None:
    assert maths_reward([message(r"\boxed{4}")] * 2, [r"\frac{", "4"]) == [None, 1.0]


def test_texts_are_completions_too() -> None:
    assert maths_reward([r"\boxed{4}", r"\boxed{5}"], ["4", "4"]) == [1.0, 0.0]


def test_what_was_read_is_logged() -> None:
    logged: dict[str, list[Any]] = {}
    maths_reward([message(r"so \boxed{30^\circ}")], [r"\boxed{30°}"], log_extra=logged.__setitem__)
    assert logged == {"solution": [r"\boxed{30°}"], "gold_parsed": [r"30^\circ"], "answer_parsed": [r"30^\circ"]}


def test_out_of_time_is_no_reward_and_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def spin(*args: Any, **kwargs: Any) -> None:
        raise equality.TimeoutException

    monkeypatch.setattr(equality, "verify", spin)
    assert maths_reward([message(r"\boxed{4.0}"), message("?")], ["4", "4"]) == [None, 0.0]
    assert "No reward, math-verify ran out of time: gold '4', answer '4.0'." in caplog.text


SLOW_SERVER = f"""
import importlib.util, time
spec = importlib.util.spec_from_file_location("equality", {equality.__file__!r})
equality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(equality)
parse = equality.parse

def parse_slowly(text, *settings, **named):
    if "777" in text:
        equality.timeout(1)(time.sleep)(600)
    return parse(text, *settings, **named)

equality.parse = parse_slowly
equality.main()
"""
"""The child process with an answer that takes ten minutes, and one second for it."""


def test_other_threads_grade_in_a_child_process_and_have_time_outs_too(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grading, "SERVER", tmp_path / "server.py")
    monkeypatch.setattr(grading, "_CHILDREN", [])
    grading.SERVER.write_text(SLOW_SERVER, encoding="utf-8")
    rewards: list[float | None] = []
    texts = [r"\boxed{\frac12}", r"\boxed{0.25}", r"\boxed{777x}", r"\boxed{0.5}"]
    thread = threading.Thread(target=lambda: rewards.extend(maths_reward(list(map(message, texts)), [r"\frac12"] * 4)))
    thread.start()
    thread.join()
    assert rewards == [1.0, 0.0, None, 1.0]
    assert "ran out of time" in caplog.text


def test_a_child_process_that_dies_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    rewards: list[float | None] = []

    def run() -> None:
        rewards.extend(maths_reward([message(r"\boxed{0.5}")], [r"\frac12"]))
        grading._CHILDREN[0]._process.kill()
        grading._CHILDREN[0]._process.wait()
        rewards.extend(maths_reward([message(r"\boxed{0.5}")], [r"\frac12"]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert rewards == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{3} and \boxed{4}", "3, 4"),
        (r"\boxed{3}. But \boxed{4}", "4"),
        (r"\boxed{{1}}", "{1}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{3} \boxed{4", None),
        (r"\boxed{3} then \boxed{}", "3"),
        (r"use \boxed{. So \boxed{4}", "4"),
        (r"$\boxed{50}\%$", r"50\%"),
        ("1\n#### 2", "2"),
        ("#### Step 1\nfoo", None),
        ("", None),
    ],
)
def test_the_answer_of_a_completion(text: str, answer: str | None) -> None:
    assert completion_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5", "5"),
        (r"Let $a=3$. So it is \boxed{9}.", "9"),
        ("3*4=12\n#### 12", "12"),
        ("$2$,$3$", "2,3"),
        (r"so it is $\frac{1}{2}$", r"\frac{1}{2}"),
        ("$12$ apples", "12 apples"),
        ("$5", "$5"),
        (r"\[x\]", "x"),
        ("So we get $x=3$ and $y=4$, thus 7", ""),
        ("So we get $x=3$ and $y=4$.", "y=4"),
    ],
)
def test_the_answer_of_a_gold(text: str, answer: str) -> None:
    assert gold_answer(text) == answer


def test_normalising_twice_changes_nothing() -> None:
    for _, gold, _, _ in pairs():
        once = latex(gold_answer(str(gold)))
        assert latex(once) == once


def test_long_texts_are_read_in_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    started = time.process_time()
    texts = [
        r"\boxed{" * 20_000,
        "{" * 50_000,
        r"\boxed{4}, " * 5_000,
        r"\boxed{" + "(" * 900 + "4" + ")" * 900 + "}",
        r"\boxed{4}" + " " * 100_000,
        "\n" * 100_000 + "#### 4",
        "\n" * 100_000 + "4",
        "answer is " * 20_000 + "$4$",
        "answer is $3$" + r"\(" * 50_000,
    ]
    assert maths_reward(list(map(message, texts)), ["4"] * 9) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    "text",
    [
        "answer is $" + r"\frac{" * 1500 + "1" + "}{1}" * 1500 + "$",
        "answer " + r"\frac{" * 1500 + "4" + "}{1}" * 1500,
        r"\boxed{" + "{" * 500 + "4" + "}" * 500 + "}",
        r"\boxed{" * 200 + "4" + "}" * 200,
        r"\boxed{" + "(1+" * 400 + "4" + ")" * 400 + "}",
        r"\boxed{" + "[1+" * 400 + "4" + "]" * 400 + "}",
        r"\boxed{" + r"\sqrt(" * 300 + "4" + ")" * 300 + "}",
        r"\boxed{" + "2^" * 900 + "4}",
    ],
)
def test_deeply_nested_answers_are_wrong_at_once(text: str) -> None:
    started = time.process_time()
    assert maths_reward([text], ["4"]) == [0.0]
    assert time.process_time() - started < 8


def test_completions_and_golds_in_odd_forms() -> None:
    parts = [{"type": "text", "text": r"so \boxed"}, {"type": "text", "text": "{4}"}]
    completions: list[Any] = [[], [{"role": "assistant"}], [{"content": None}], [{"content": parts}], None]
    assert maths_reward(completions, ["4"] * 5) == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert reasoning_maths_reward(
        [[], [{"content": [{"type": "text", "text": r"</think>\boxed{4}"}]}]], ["4"] * 2
    ) == [
        0.0,
        1.0,
    ]
    golds: list[Any] = [None, 4, 4.0, ["4"], "", "N/A", "#### ", r"\boxed{}", float("nan")]
    rewards = [None, 1.0, 1.0, None, None, None, None, None, None]
    assert maths_reward([r"\boxed{4}"] * 9, golds) == rewards


def test_large_numbers_are_compared_exactly() -> None:
    """However little they differ."""
    texts = [rf"\boxed{{\binom{{100}}{{50}}{change}}}" for change in ("", "+1", r"+10^{10}")]
    assert maths_reward(texts, [r"\binom{100}{50}"] * 3) == [1.0, 0.0, 0.0]
