"""The rows that `trl-entropy train` trains and evaluates on: where they come from, and whether they fit the run."""

import inspect
from collections.abc import Callable, Sized
from typing import Any

from trl import DatasetMixtureConfig, get_dataset

from trl_entropy.commands.train_arguments import TrainArguments
from trl_entropy.tasks import Task
from trl_entropy.tasks.rewards import check_reward_columns
from trl_entropy.tasks.sources import Rows, load_source, select_split
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


def check_columns(dataset: Rows, reward_funcs: list[Callable[..., Any] | str]) -> None:
    """Refuse rows without a prompt, or without a column that a reward reads.

    Raises:
        ValueError: If a column is missing.
    """
    columns = dataset.column_names
    if columns is None:  # a stream whose columns are not known before it is read
        return
    if "prompt" not in columns:
        raise ValueError(
            f"The dataset has no column 'prompt', only {', '.join(columns)}. Rename the column that holds the text or "
            "chat messages to complete."
        )
    check_reward_columns(reward_funcs, columns)


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
