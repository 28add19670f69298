"""The procedural tasks of reasoning-gym (arXiv 2505.24760), by name: generated here, so they need no download.

Each has a grader of its own, which many tasks need because they have more than one right answer. The graders give a
score in 0..1; here the reward is 1 for a full score and 0 for anything less, as some give part of it to any answer.
Some graders give a full score to wrong answers, or run the answer as Python code; `CHECKS` holds what an answer to
their tasks has to pass before a grader sees it. It was made for the version `AUDITED`, and no other one is used.
"""

import json
import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from datasets import Dataset

from trl_entropy.tasks import Task
from trl_entropy.tasks.reasoning_gym_checks import CHECKS

AUDITED = "0.1.25"
"""The release of reasoning-gym whose graders were read, all of them."""
ANSWER_INSTRUCTION = "Put your final answer, and nothing else, between <answer> and </answer>."
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
MAX_SEED = 2**30
TEST_SEED_OFFSET = 2**30
"""Item `i` of a reasoning-gym dataset with seed `s` is made from seed `s + i`: the splits are this far apart."""
MAX_ANSWER_LENGTH = 10_000
LONG_EXPONENT = re.compile(r"\d[eE][+-]?\d{4}")
GRADING_SECONDS = 5
PROBE = "no answer"
UNSUPPORTED = ("composite",)
"""Made of other tasks: mix those instead."""

logger = logging.getLogger(__name__)


def load(
    split: str,
    name: str = "",
    size: int = 1000,
    test_size: int = 200,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    answer_format: str = "tags",
) -> Dataset:
    """Problems of one of reasoning-gym's tasks, the same ones for the same arguments.

    The splits are made from seeds that are far apart, and `"train"` leaves out every question that is also in
    `"test"`, so they have no problem in common. Left out as well, and counted in a warning: questions that came
    before, questions whose reference answer the grader does not accept, and those where it accepts "no answer".

    Args:
        split: `"train"` or `"test"`.
        name: The task, such as `"chain_sum"`; see `task_names`.
        size: Problems to make for `"train"`.
        test_size: Problems to make for `"test"`. Keep it the same for training and evaluation.
        seed: In 0..2**30 - 1. Problem `i` is made from `seed + i`: seeds closer than `size` share problems.
        config: Fields of the task's own configuration, such as `{"min_terms": 2}`.
        answer_format: `"tags"` asks in a chat message for the answer between `<answer>` and `</answer>`, and grades
            what is in the last such pair. `"plain"` gives the question alone, as text, and grades the whole
            completion: for small models that know nothing else.

    Returns:
        Columns `prompt` and `item` (what the reward needs to find the problem again).

    Raises:
        ImportError: If reasoning-gym is not installed, or in another version than `AUDITED`.
        ValueError: If an argument is out of range, the name or a field of `config` is unknown, or no problem is left.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is unknown. Choose 'train' or 'test'.")
    if answer_format not in ("tags", "plain"):
        raise ValueError(f"answer_format={answer_format!r} is unknown. Choose 'tags' or 'plain'.")
    if not (1 <= size <= MAX_SEED and 1 <= test_size <= MAX_SEED and 0 <= seed < MAX_SEED):
        raise ValueError(f"size={size}, test_size={test_size} and seed={seed} must be in 1..2**30 and 0..2**30 - 1.")
    test_seed = seed + TEST_SEED_OFFSET
    if split == "test":
        return _rows(name, test_size, test_seed, config, answer_format, frozenset())
    held_out = _dataset(name, test_size, test_seed, _as_json(config))
    questions = frozenset(held_out[index]["question"] for index in range(test_size))
    return _rows(name, size, seed, config, answer_format, questions)


def task_names() -> list[str]:
    """The names that `load` takes.

    Raises:
        ImportError: If reasoning-gym is not installed.
    """
    return sorted(set(_factory().DATASETS) - set(UNSUPPORTED))


def full_score_reward(
    prompts: list[Any], completions: list[Any], item: list[str], **columns: object
) -> list[float | None]:
    """1 where the task's grader gives the answer its full score, else 0.

    Args:
        prompts: Not read.
        completions: Texts, or chat messages of which the first is read.
        item: As `load` made them.
        columns: Not read.
    """
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(_is_correct(text, problem)) for text, problem in zip(texts, item, strict=True)]


def is_full_score(name: str, dataset: Any, entry: dict[str, Any], answer: str) -> bool:
    """Whether an answer is fully correct.

    An answer that the grader raises on, or that it is still busy with after `GRADING_SECONDS`, is wrong.

    Args:
        name: The task.
        dataset: reasoning-gym's dataset, which has the grader.
        entry: The problem, with `question`, `answer` and `metadata`.
        answer: The text to grade.
    """
    if not answer or len(answer) > MAX_ANSWER_LENGTH or LONG_EXPONENT.search(answer):
        return False
    try:
        with _time_limit(GRADING_SECONDS):
            check = CHECKS.get(name)
            return (check is None or check(answer, entry)) and dataset.score_answer(answer, entry) >= 1.0
    except Exception:  # the graders are not written for hostile answers: they raise anything
        return False


def _rows(
    name: str, size: int, seed: int, config: dict[str, Any] | None, answer_format: str, held_out: frozenset[str]
) -> Dataset:
    dataset = _dataset(name, size, seed, _as_json(config))
    rows: list[dict[str, Any]] = []
    seen, repeated = set(held_out), 0
    for index in range(size):
        entry = dataset[index]
        if entry["question"] in seen:
            repeated += 1
        elif _is_sound(name, dataset, entry):
            seen.add(entry["question"])
            problem = {"name": name, "size": size, "seed": seed, "config": config, "index": index}
            item = json.dumps({**problem, "answer_format": answer_format})
            rows.append({"prompt": _prompt(entry["question"], answer_format), "item": item})
    if not rows:
        raise ValueError(f"name={name!r} with config={config} gives no problem that is new and can be graded.")
    if len(rows) < size:
        logger.warning(
            "%s: %d of %d problems are left out: %d repeat another or one of the test split, %d cannot be graded.",
            *(name, size - len(rows), size, repeated, size - len(rows) - repeated),
        )
    return Dataset.from_list(rows)


def _is_sound(name: str, dataset: Any, entry: dict[str, Any]) -> bool:
    """Whether the grader takes the reference answer, where there is one, and refuses a non-answer."""
    reference = entry["answer"]
    if reference is not None and not is_full_score(name, dataset, entry, str(reference).strip()):
        return False
    return not is_full_score(name, dataset, entry, PROBE)


def _prompt(question: str, answer_format: str) -> str | list[dict[str, str]]:
    if answer_format == "plain":
        return question
    return [{"role": "user", "content": f"{question}\n\n{ANSWER_INSTRUCTION}"}]


def _is_correct(text: str, item: str) -> bool:
    problem = json.loads(item)
    if problem["answer_format"] == "tags":
        answers = ANSWER.findall(text)
        text = answers[-1] if answers else ""
    name = problem["name"]
    dataset = _dataset(name, problem["size"], problem["seed"], _as_json(problem["config"]))
    return is_full_score(name, dataset, _entry(item), text.strip())


@lru_cache(maxsize=4096)
def _entry(item: str) -> dict[str, Any]:
    """The problem behind an item, made anew: its metadata may hold what a dataset's column cannot."""
    problem = json.loads(item)
    return _dataset(problem["name"], problem["size"], problem["seed"], _as_json(problem["config"]))[problem["index"]]


@lru_cache(maxsize=64)
def _dataset(name: str, size: int, seed: int, config: str) -> Any:
    if name not in task_names():
        raise ValueError(f"name={name!r} is not a task of reasoning-gym. Choose one of {', '.join(task_names())}.")
    config_class = _factory().DATASETS[name][1]
    known = sorted({field.name for field in fields(config_class)} - {"seed", "size"})
    settings = json.loads(config) or {}
    if set(settings) - set(known):
        raise ValueError(f"config={settings} does not fit name={name!r}, which takes {', '.join(known)}.")
    try:
        return _factory().create_dataset(name, size=size, seed=seed, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"config={settings} does not fit name={name!r}: {error}. Correct the field.") from error


def _factory() -> Any:
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ImportError("The task reasoning_gym needs its package: pip install 'trl_entropy[gym]'.") from error
    if version("reasoning-gym") != AUDITED:
        raise ImportError(
            f"reasoning-gym {version('reasoning-gym')} is installed, and its graders, of which some run answers as "
            f"code, are known for {AUDITED} alone: pip install 'trl_entropy[gym]'."
        )
    return factory


def _as_json(config: dict[str, Any] | None) -> str:
    return json.dumps(config, sort_keys=True)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` after that long. Only in the main thread, and where the system has this signal."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"Grading took longer than {seconds} s.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


TASK = Task(name="reasoning_gym", load=load, reward_funcs=(full_score_reward,))
