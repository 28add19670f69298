"""The rows that `trl-entropy train` trains and evaluates on: where they come from, and whether they fit the run."""

import inspect
from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any

import pyarrow.compute as pc
import trl.trainer.utils
from datasets import Dataset
from trl import DatasetMixtureConfig, get_dataset

from trl_entropy.commands.train_arguments import TrainArguments
from trl_entropy.tasks import Task
from trl_entropy.tasks.multi_turn import EPISODE_COLUMNS
from trl_entropy.tasks.rewards import check_reward_columns, check_reward_prompts
from trl_entropy.tasks.sources import Rows, load_source, select_split
from trl_entropy.tasks.templates import check_prompt, render
from trl_entropy.trainers import EntropyGRPOConfig


def row_loader(
    script: TrainArguments, mixture: DatasetMixtureConfig, task: Task | None, seed: int
) -> Callable[[str], Rows]:
    """What loads the rows for `"train"` or `"test"` from the one source that is set.

    Raises:
        ValueError: If not exactly one of task, dataset_name and datasets is set, or `task_args` do not fit the task.
        FileNotFoundError: If a local dataset does not exist.
    """
    sources = {"task": script.task, "dataset_name": script.dataset_name, "datasets": mixture.datasets}
    chosen = [name for name, value in sources.items() if value]
    if len(chosen) != 1:
        raise ValueError(
            f"{' and '.join(chosen) + ' are' if chosen else 'None is'} set: set exactly one of task, dataset_name and "
            "datasets. A task's own rows are chosen with task_args."
        )
    names = {"train": script.dataset_train_split, "test": script.dataset_test_split}
    if task is not None:
        arguments = _task_arguments(script, task)
        return lambda split: task.load(names[split], **arguments)
    if mixture.datasets:
        splits, test_size = get_dataset(mixture), 0.0
    else:
        splits = load_source(script.dataset_name, config=script.dataset_config, streaming=script.dataset_streaming)
        test_size = mixture.test_split_size or 0.0
    source = script.dataset_name or "datasets"
    return lambda split: select_split(splits, names[split], test_size=test_size, seed=seed, source=source)


def _task_arguments(script: TrainArguments, task: Task) -> dict[str, Any]:
    arguments = script.task_args or {}
    known = [name for name in inspect.signature(task.load).parameters if name != "split"]
    if not isinstance(arguments, dict) or set(arguments) - set(known):
        raise ValueError(
            f"task_args={arguments!r} does not fit task={task.name!r}. Set a mapping with any of: {', '.join(known)}."
        )
    return arguments


def check_rewards(
    dataset: Rows, reward_funcs: list[Callable[..., Any] | str], config: EntropyGRPOConfig, task: Task | None
) -> None:
    """Refuse rows without a prompt, and rewards that do not fit the rows. Of a stream, the first row is looked at.

    Raises:
        ValueError: If there is no row, a column is missing or not taken, a reward cannot read such prompts, or TRL
            would not await it.
    """
    _check_awaited(reward_funcs)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("The dataset has no rows. Correct its name or its split.")
    columns = list(first)
    if "prompt" not in columns:
        raise ValueError(
            f"The dataset has no column 'prompt', only {', '.join(columns)}. Rename the column that holds the text or "
            "chat messages to complete."
        )
    hint = ""
    if config.remove_unused_columns:
        columns = [name for name in columns if name in ("prompt", "image", "images")]
        hint = " remove_unused_columns=True takes the others away."
    try:
        check_reward_columns(reward_funcs, columns, EPISODE_COLUMNS if _in_episodes(task) else ())
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from error
    check_reward_prompts(reward_funcs, first["prompt"])


def _check_awaited(reward_funcs: list[Callable[..., Any] | str]) -> None:
    """Before 1.14, TRL awaits asynchronous functions and their partials, but no objects."""
    if hasattr(trl.trainer.utils, "is_async_callable"):
        return
    for func in reward_funcs:
        while isinstance(func, partial):
            func = func.func
        if inspect.iscoroutinefunction(type(func).__call__):
            raise ValueError(
                f"Reward function {type(func).__name__!r} is an object with an asynchronous __call__, which TRL "
                f"{trl.__version__} does not await. Name an asynchronous function, or install TRL 1.14 or newer."
            )


def check_prompts(dataset: Rows, tokenizer: Any, config: EntropyGRPOConfig, task: Task | None) -> None:
    """Refuse prompts that the trainer cannot render: the first one stands for all but those that are empty.

    Args:
        dataset: Of a stream, the first row alone is looked at.
        tokenizer: The policy's.
        config: The trainer's.
        task: Where the rows are from, if from a task. Of episodes the environment writes the prompts.

    Raises:
        ValueError: Says which row, and what to change.
    """
    for number, prompt in _telling_prompts(dataset):
        try:
            if _in_episodes(task):
                check_prompt(tokenizer, prompt)
            else:
                render(tokenizer, prompt, config.chat_template_kwargs)
        except ValueError as error:
            raise ValueError(f"Row {number} of the dataset: {error}") from error


def _telling_prompts(dataset: Rows) -> Iterator[tuple[int, Any]]:
    """The first prompt and, of a dataset that is no stream, those that look empty; with the numbers of their rows."""
    first = next(iter(dataset))["prompt"]
    yield 0, first
    if isinstance(dataset, Dataset):
        column = dataset.select_columns("prompt").with_format("arrow")[:]["prompt"]  # Python objects would take long
        lengths = pc.binary_length(column) if isinstance(first, str) else pc.list_value_length(column)
        empty = pc.equal(pc.fill_null(lengths, 0), 0)
        yield from ((number, dataset[number]["prompt"]) for number in pc.indices_nonzero(empty).to_pylist())


def _in_episodes(task: Task | None) -> bool:
    return task is not None and task.build_rollout is not None


def check_number_of_rows(dataset: Rows, config: EntropyGRPOConfig) -> None:
    """TRL draws whole rollouts only: with fewer rows than one takes, it would wait for the first one forever.

    Raises:
        ValueError: If there are fewer.
    """
    prompts = config.generation_batch_size // config.num_generations
    if isinstance(dataset, Sized) and len(dataset) < prompts:
        raise ValueError(
            f"The {len(dataset)} rows to train on are fewer than the {prompts} prompts of a rollout "
            f"(generation_batch_size={config.generation_batch_size} / num_generations={config.num_generations}). Add "
            "rows, or lower steps_per_generation or per_device_train_batch_size."
        )
