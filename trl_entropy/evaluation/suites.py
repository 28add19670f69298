"""The problems of an evaluation, and the grading of their completions by the rewards that training uses."""

import asyncio
import atexit
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from inspect import isawaitable
from math import nan
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerState
from trl.trainer.utils import get_callable_name, shutdown_event_loop_in_daemon, start_event_loop_in_daemon

from trl_entropy.evaluation.benchmarks import load_benchmark
from trl_entropy.tasks import get_task
from trl_entropy.tasks.grading import maths_reward
from trl_entropy.tasks.rewards import (
    NOT_PASSED,
    check_reward_columns,
    check_reward_prompts,
    load_reward_func,
    require_math_verify,
)
from trl_entropy.tasks.templates import shown


class RewardError(ValueError):
    """What the rewards returned cannot be used."""


@dataclass(frozen=True)
class Suite:
    """Problems and what grades them.

    Attributes:
        name: What the results call it.
        problems: Rows with a `prompt` and the columns that the rewards read.
        reward_funcs: As in `trl_entropy.tasks.Task`, and asynchronous ones.
        is_bare: Whether the prompts are bare problems, without the instruction that the model's family expects.
        reward_names: What the samples' file calls the rewards; by default the functions' own names.
    """

    name: str
    problems: Dataset
    reward_funcs: tuple[Callable[..., list[float | None]], ...]
    is_bare: bool
    reward_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.reward_names:
            object.__setattr__(self, "reward_names", tuple(map(get_callable_name, self.reward_funcs)))


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
        benchmarks: Names of `trl_entropy.evaluation.benchmarks.BENCHMARKS`.
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
        suites = [Suite(name, load_benchmark(name, dataset_file), (maths_reward,), True) for name in benchmarks]
    else:
        maths, source = get_task("maths"), str(dataset_file)
        suites = [Suite(Path(source).stem, maths.load("train", source=source), maths.reward_funcs, True)]
    if reward_funcs:
        chosen = tuple(map(load_reward_func, reward_funcs))
        names = tuple(name.rpartition(".")[2] for name in reward_funcs)
        suites = [replace(suite, reward_funcs=chosen, reward_names=names) for suite in suites]
    for suite in suites:
        for name, func in zip(suite.reward_names, suite.reward_funcs, strict=True):
            if isinstance(func, nn.Module):
                raise ValueError(f"reward_funcs={name!r} is a model, and eval grades by functions. Name a function.")
        check_reward_columns(suite.reward_funcs, suite.problems.column_names)
        check_reward_prompts(suite.reward_funcs, suite.problems[0]["prompt"])
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


def grade(
    suite: Suite, problems: list[int], replies: Sequence[str | dict[str, Any]], token_ids: list[list[int]]
) -> list[float | None]:
    """What the suite's rewards add up to for each completion, as TRL's trainer adds them with weights of 1.

    A reward of `None` or NaN is left out of the sum, and a completion without any other is not scored: `None`.

    Args:
        suite: The problems and their rewards.
        problems: Row of each completion's problem.
        replies: The completions: text or, for chat prompts, the assistant's messages.
        token_ids: Their tokens.

    Raises:
        RewardError: If a reward function does not return one number for each completion.
    """
    rows = suite.problems.select(problems)
    columns = {name: list(rows[name]) for name in rows.column_names}
    prompts = columns["prompt"]
    completions = [_completion(reply, isinstance(prompts[0], list)) for reply in replies]
    arguments = {
        **{name: values for name, values in columns.items() if name not in NOT_PASSED},
        "prompts": prompts,
        "completions": completions,
        "completion_ids": token_ids,
        "trainer_state": TrainerState(epoch=1.0, global_step=1, max_steps=1),  # as at the end of a training
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    outputs = _awaited([func(**arguments) for func in suite.reward_funcs])
    rewards = [_numbers(name, out, len(problems)) for name, out in zip(suite.reward_names, outputs, strict=True)]
    per_completion = torch.tensor(rewards, dtype=torch.float32).T
    unscored = per_completion.isnan().all(1).tolist()
    sums = per_completion.nansum(1).tolist()
    return [None if skip else total for skip, total in zip(unscored, sums, strict=True)]


def _completion(reply: str | dict[str, Any], in_chat: bool) -> Any:
    """A completion as reward functions are given it."""
    if not in_chat:
        return reply
    return [{"role": "assistant", "content": reply} if isinstance(reply, str) else reply]


def _numbers(name: str, output: Any, count: int) -> list[float]:
    """What a reward function returned, as floats; NaN for `None`."""
    try:
        rewards = [nan if reward is None else _number(reward) for reward in output]
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"The reward function {name!r} returned {shown(output)}, which is not a number (or None) for each "
            f"completion ({error})."
        ) from error
    if len(rewards) != count:
        raise RewardError(f"The reward function {name!r} returned {len(rewards)} rewards for {count} completions.")
    return rewards


def _number(reward: Any) -> float:
    if isinstance(reward, str):  # the trainer refuses text too
        raise TypeError(f"{reward!r} is text")
    return float(reward)


def _awaited(outputs: list[Any]) -> list[Any]:
    """What reward functions returned; the asynchronous ones run together, on one event loop for all batches."""
    waiting = [index for index, output in enumerate(outputs) if isawaitable(output)]
    if not waiting:
        return outputs

    async def gather() -> list[Any]:
        return await asyncio.gather(*(outputs[index] for index in waiting))

    outputs = list(outputs)
    for index, output in zip(waiting, asyncio.run_coroutine_threadsafe(gather(), _event_loop()).result(), strict=True):
        outputs[index] = output
    return outputs


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop on a thread of its own, as the trainer has: what a reward keeps open stays usable in the next batch."""
    thread, loop, ready = start_event_loop_in_daemon(name="rewards")
    ready.wait()
    atexit.register(shutdown_event_loop_in_daemon, thread, loop)
    return loop
