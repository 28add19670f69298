"""The problems of an evaluation, and the grading of their completions by the rewards that training uses."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.rewards import accuracy_reward

from trl_entropy.tasks import get_task
from trl_entropy.tasks.benchmarks import load_benchmark
from trl_entropy.tasks.rewards import check_reward_columns, load_reward_func, require_math_verify


@dataclass(frozen=True)
class Suite:
    """Problems and what grades them.

    Attributes:
        name: What the results call it.
        problems: Rows with a `prompt` and the columns that the rewards read.
        reward_funcs: As in `trl_entropy.tasks.Task`.
        is_bare: Whether the prompts are bare problems, without the instruction that the model's family expects.
    """

    name: str
    problems: Dataset
    reward_funcs: tuple[Callable[..., list[float | None]], ...]
    is_bare: bool


def load_suites(
    benchmarks: Sequence[str] = (),
    dataset_file: str | None = None,
    task: str | None = None,
    task_args: Mapping[str, Any] | None = None,
    split: str = "test",
    reward_funcs: Sequence[str] | None = None,
) -> list[Suite]:
    """The problems of a task, of benchmarks, or of a file of mathematics problems.

    Args:
        benchmarks: Names of `trl_entropy.tasks.benchmarks.BENCHMARKS`.
        dataset_file: The one benchmark's file; with no benchmark, a file with the columns that the task `maths` reads.
        task: Name of a task of `trl_entropy.tasks.TASKS`.
        task_args: Arguments of the task's `load`.
        split: Split of the task.
        reward_funcs: Rewards in place of the task's own, by name.

    Raises:
        ValueError: If the rows do not fit the task, the benchmark or the rewards.
        OSError: If the file is not there, or the hub cannot be reached.
        ImportError: If a task's or reward's package is not installed.
    """
    if task is not None:
        suites = [_task_suite(task, dict(task_args or {}), split)]
    elif benchmarks:
        suites = [Suite(name, load_benchmark(name, dataset_file), (accuracy_reward,), True) for name in benchmarks]
    else:
        maths, source = get_task("maths"), str(dataset_file)
        suites = [Suite(Path(source).stem, maths.load("train", source=source), maths.reward_funcs, True)]
    if reward_funcs:
        chosen = tuple(map(load_reward_func, reward_funcs))
        suites = [replace(suite, reward_funcs=chosen) for suite in suites]
    for suite in suites:
        check_reward_columns(suite.reward_funcs, suite.problems.column_names)
        require_math_verify(suite.reward_funcs)
    return suites


def _task_suite(name: str, task_args: dict[str, Any], split: str) -> Suite:
    task = get_task(name)
    if task.build_rollout is not None:
        raise ValueError(f"task={name!r} is played over several turns, and eval generates one. Choose another task.")
    known = [argument for argument in inspect.signature(task.load).parameters if argument != "split"]
    if set(task_args) - set(known):
        raise ValueError(f"task_args={task_args!r} does not fit task={name!r}, which takes {', '.join(known)}.")
    return Suite(name, task.load(split, **task_args), task.reward_funcs, is_bare=False)


def grade(suite: Suite, problems: list[int], texts: list[str], token_ids: list[list[int]]) -> list[float | None]:
    """What the suite's rewards add up to for each completion; `None` where any of them cannot grade it.

    Args:
        suite: The problems and their rewards.
        problems: Row of each completion's problem.
        texts: The completions.
        token_ids: Their tokens.
    """
    rows = suite.problems.select(problems)
    columns = {name: rows[name] for name in rows.column_names}
    prompts = list(columns.pop("prompt"))
    chat = isinstance(prompts[0], list)
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    arguments = {"prompts": prompts, "completions": completions, "completion_ids": token_ids, "trainer_state": None}
    logs = {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None, "environments": None}
    rewards = [
        func(**arguments, **logs, **{name: list(values) for name, values in columns.items()})
        for func in suite.reward_funcs
    ]
    return [None if None in parts else float(sum(parts)) for parts in zip(*rewards, strict=True)]
