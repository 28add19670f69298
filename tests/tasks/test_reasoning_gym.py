"""reasoning-gym: disjoint splits, rewards that junk and hostile answers cannot earn, and the faults it refuses."""

import contextlib
import inspect
import json
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from trl_entropy.tasks import reasoning_gym
from trl_entropy.tasks.reasoning_gym import (
    TEST_SEED_OFFSET,
    full_score_reward,
    is_full_score,
    load,
    task_names,
)
from trl_entropy.tasks.reasoning_gym_checks import CHECKS, is_expression

gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'trl_entropy[gym]'")

SLOW_TO_MAKE = {
    "futoshiki",
    "intermediate_integration",
    "knight_swap",
    "puzzle24",
    "quantum_lock",
    "sokoban",
    "arc_agi",
}
SLOW_TO_MAKE |= {"sudoku", "zebra_puzzles", "rearc", "simple_integration"}
NAMES = sorted(set(gym.factory.DATASETS) - {"composite"})
JUNK = ["junk", "0", "1", "-1", "True", "False", "Yes", "nan", "inf", "[]", "{}", "0.0"]


def reward(completion: str, item: str) -> float:
    return full_score_reward([None], [[{"role": "assistant", "content": completion}]], [item])[0]


@cache
def entry_of(item: str) -> dict[str, Any]:
    """The problem behind an item, made by reasoning-gym itself."""
    problem = json.loads(item)
    config = problem["config"] or {}
    return gym.create_dataset(problem["name"], size=problem["size"], seed=problem["seed"], **config)[problem["index"]]


def answer_of(item: str) -> str:
    return entry_of(item)["answer"]


def test_only_the_version_whose_graders_were_read_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some graders run answers as code: what `CHECKS` leaves to those of another version, nobody has read."""
    requirements = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'gym = ["reasoning-gym=={reasoning_gym.AUDITED}"]' in requirements
    monkeypatch.setattr(reasoning_gym, "version", lambda name: "0.1.26")
    with pytest.raises(ImportError, match=r"reasoning-gym 0\.1\.26 is installed, and .* 0\.1\.25.*entropy\[gym\]'"):
        load("train", name="gcd", size=2, test_size=2)


def test_rows_and_their_reward() -> None:
    row = load("train", name="chain_sum", size=3, test_size=3)[0]
    (message,) = row["prompt"]
    assert message["role"] == "user"
    assert message["content"].endswith("between <answer> and </answer>.")
    answer = answer_of(row["item"])
    assert reward(f"thinking <answer>{answer}</answer>", row["item"]) == 1.0
    assert reward(f"<answer>0</answer> no: <answer> {answer}\n</answer>", row["item"]) == 1.0
    assert reward(f"<answer>{answer}</answer> no: <answer>0</answer>", row["item"]) == 0.0
    assert reward(answer, row["item"]) == 0.0


def test_plain_format_is_the_question_and_the_whole_completion() -> None:
    rows = load("test", name="products", test_size=3, answer_format="plain")
    assert all(isinstance(prompt, str) for prompt in rows["prompt"])
    item = rows["item"][0]
    assert full_score_reward([None] * 3, [answer_of(item), f" {answer_of(item)} ", "0"], [item] * 3) == [1.0, 1.0, 0.0]


def test_a_trainer_takes_its_rows_and_reward(make_trainer: Callable[..., Any]) -> None:
    rows = load("train", name="products", size=16, test_size=2, answer_format="plain")
    trainer = make_trainer(train_dataset=rows, reward_funcs=full_score_reward, max_steps=1)
    trainer.train()
    assert any("rewards/full_score_reward/mean" in log for log in trainer.state.log_history)


def test_same_arguments_same_problems_and_the_seed_changes_them() -> None:
    first, again, other = (load("train", name="gcd", size=5, test_size=2, seed=seed) for seed in (1, 1, 1000))
    assert first.to_list() == again.to_list()
    assert set(map(str, first["prompt"])).isdisjoint(map(str, other["prompt"]))


def test_splits_are_disjoint_by_question_where_the_task_is_small(caplog: pytest.LogCaptureFixture) -> None:
    # 81 products of two digits: 200 draws of each split repeat themselves and each other
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    test = load("test", name="products", test_size=30, config=config)
    train = load("train", name="products", size=200, test_size=30, config=config)
    questions = [prompt[0]["content"] for prompt in train["prompt"]]
    held_out = [prompt[0]["content"] for prompt in test["prompt"]]
    assert len(set(questions)) == len(questions) > 20
    assert len(set(held_out)) == len(held_out) > 10
    assert not set(questions) & set(held_out)
    assert f"products: {200 - len(train)} of 200 problems are left out" in caplog.text


def test_splits_are_disjoint_by_seed() -> None:
    # an item's seed is the dataset's plus its index
    train, test = (load(split, name="gcd", size=5, test_size=5, seed=3) for split in ("train", "test"))
    seeds = [{item["seed"] + item["index"] for item in map(json.loads, rows["item"])} for rows in (train, test)]
    assert seeds[0] <= set(range(3, 8))
    assert seeds[1] <= set(range(3 + TEST_SEED_OFFSET, 8 + TEST_SEED_OFFSET))


@pytest.mark.parametrize("name", sorted(set(NAMES) - SLOW_TO_MAKE))
def test_reference_earns_the_reward_and_junk_does_not(name: str) -> None:
    items = load("test", name=name, test_size=3)["item"]
    for item in items:
        reference = answer_of(item)
        if reference is not None:
            assert reward(f"<answer>{reference}</answer>", item) == 1.0
        for junk in JUNK:
            if not same(junk, reference):
                assert reward(f"<answer>{junk}</answer>", item) == 0.0, (junk, reference)
        assert reward("", item) == reward("<answer></answer>", item) == 0.0


def same(junk: str, reference: str | None) -> bool:
    """Whether the junk happens to be right: as text, or as a number."""
    try:
        return float(junk) == float(str(reference))
    except ValueError:
        return junk.lower() == str(reference).strip().lower()


ENTRIES: dict[str, tuple[str, list[str]]] = {
    # task: the reference, and wrong answers that reasoning-gym 0.1.25 gives a full score
    "coin_flip": ("0.171875", ["0.0", "0/1", "0.1"]),
    "complex_arithmetic": ("3.0 - 2.0i", ["nan", "nan - 2.0i"]),
    "game_of_life_halting": ("True", ["False", "junk", "0"]),
    "gsm_symbolic": ("5", ["-5"]),
    "letter_jumble": ("one two", ["one two three"]),
    "spell_backward": ("ekilxesnu", ["ekilxesnu x"]),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_answers_that_a_grader_wrongly_takes(name: str) -> None:
    reference, wrong = ENTRIES[name]
    dataset = gym.create_dataset(name, size=1, seed=0)
    entry = {"question": "", "answer": reference, "metadata": {"result": (3.0, -2.0)}}
    assert is_full_score(name, dataset, entry, reference)
    assert any(dataset.score_answer(answer, entry) >= 1.0 for answer in wrong), "its grader is mended: drop the check"
    assert not any(is_full_score(name, dataset, entry, answer) for answer in wrong)


def test_other_numbers_that_make_24_are_wrong() -> None:
    dataset = gym.create_dataset("puzzle24", size=1, seed=0)
    entry = {"question": "", "answer": "2*(3 + 4 + 5)", "metadata": {"numbers": [2, 3, 4, 5]}}
    assert is_full_score("puzzle24", dataset, entry, "(3 + 4 + 5)*2")
    assert dataset.score_answer("6*4*1*1", entry) == 1.0
    assert not is_full_score("puzzle24", dataset, entry, "6*4*1*1")


class Trap:
    """Stands in for a file that a hostile answer would write: any call sets `sprung`."""

    sprung = False

    def __call__(self, *args: Any) -> list[str]:
        Trap.sprung = True
        return []


@pytest.fixture
def trap(monkeypatch: pytest.MonkeyPatch) -> type[Trap]:
    module = type(sys)("trapped")
    module.call = Trap()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trapped", module)
    Trap.sprung = False
    return Trap


def test_no_grader_runs_an_answer(trap: type[Trap]) -> None:
    hostile = "__import__('trapped').call()"
    for name in ("binary_matrix", "string_insertion", "countdown"):
        item = load("test", name=name, test_size=1)["item"][0]
        dataset = gym.create_dataset(name, size=1, seed=0)
        dataset.score_answer(hostile, entry_of(item))
        assert trap.sprung, f"{name} no longer runs answers: drop its check"
        trap.sprung = False
        assert reward(f"<answer>{hostile}</answer>", item) == 0.0
        assert not trap.sprung


def test_every_grader_that_runs_answers_has_a_check() -> None:
    """Read from the installed version, so that a new one with such a grader turns this red."""
    running = set()
    for name in NAMES:
        source = inspect.getsource(gym.factory.DATASETS[name][0].score_answer)
        if any(call in source for call in ("eval(", "exec(", "parse_expr(", "sympify(", "S(")):
            running.add(name)
    assert running - {"number_sorting"} <= set(CHECKS)  # number_sorting evaluates its own reference
    assert {"countdown", "n_queens", "polynomial_multiplication"} <= running


@pytest.mark.parametrize(
    "answer",
    [
        *("9**9**9", "(9**64)**64", "2**(64*64*64)", "2**1000", "factorial(10**9)", "x.__class__", "'a'", "[1]*9"),
        *("(lambda: 1)()", "1 or 2", "Integral(x, x)", "x if x else 1", "f'{x}'", "print(1)", "x!", "abc"),
    ],
)
def test_expressions_that_are_not_given_to_sympy(answer: str) -> None:
    with contextlib.suppress(SyntaxError):
        assert not is_expression(answer, {})


@pytest.mark.parametrize(
    "answer", ["58 + 39 - 19*(12/-6)", "2*x**9 - x**8/2 + C", "-cos(3*x - 10)**3/3", "E**(2*x)", "x**(1/2)"]
)
def test_expressions_that_are(answer: str) -> None:
    assert is_expression(answer, {})


@pytest.mark.parametrize(
    ("name", "answer"), [("coin_flip", "1e999999999"), ("countdown", "9**9**9**9"), ("gcd", "9" * 10**6)]
)
def test_answers_that_would_hang_the_grader(name: str, answer: str) -> None:
    item, start = load("test", name=name, test_size=1)["item"][0], time.monotonic()
    assert reward(f"<answer>{answer}</answer>", item) == 0.0
    assert time.monotonic() - start < 2


def test_a_slow_or_raising_grader_means_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            time.sleep(10)
            return 1.0

    class Raising:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            raise KeyError(answer)

    monkeypatch.setattr(reasoning_gym, "GRADING_SECONDS", 0.2)
    start = time.monotonic()
    assert not is_full_score("gcd", Slow(), {}, "4")
    assert time.monotonic() - start < 2
    assert not is_full_score("gcd", Raising(), {}, "4")


def test_problems_whose_reference_the_grader_refuses_are_left_out_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = load("test", name="gcd", test_size=4, seed=9)["item"][1]
    bad = answer_of(refused), entry_of(refused)["question"]
    scores = type(gym.create_dataset("gcd", size=1, seed=0)).score_answer

    def score(self: Any, answer: str, entry: dict[str, Any]) -> float:
        return 0.5 if (answer, entry["question"]) == bad else scores(self, answer, entry)

    monkeypatch.setattr(gym.factory.DATASETS["gcd"][0], "score_answer", score)
    assert refused not in load("test", name="gcd", test_size=4, seed=9)["item"]
    assert (
        "gcd: 1 of 4 problems are left out: 0 repeat another or one of the test split, 1 cannot be graded"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"name='' is not a task of reasoning-gym\. Choose one of ab, .*zebra_puzzles"),
        ({"name": "chainsum"}, r"chain_sum"),
        ({"name": "composite"}, r"not a task"),
        (
            {"name": "gcd", "config": {"digits": 3}},
            r"config=\{'digits': 3\} does not fit name='gcd', which takes .*max_num",
        ),
        ({"name": "gcd", "config": {"min_numbers": -3}}, r"config=\{'min_numbers': -3\} does not fit"),
        ({"name": "gcd", "config": {"seed": 3}}, r"does not fit"),
        ({"name": "gcd", "size": 0}, r"size=0"),
        ({"name": "gcd", "seed": -1}, r"seed=-1"),
        ({"name": "gcd", "answer_format": "boxed"}, r"answer_format='boxed'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("train", **{"size": 2, "test_size": 2, **arguments})


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split='dev'"):
        load("dev", name="gcd")


def test_the_extra_is_named_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"trl_entropy\[gym\]"):
        task_names()
