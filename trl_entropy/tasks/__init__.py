"""What to train on, by name: a dataset, the rewards that grade its completions and, for built-in tasks, a policy.

`TASKS` is the whole table. A task lives in the module that the table names and is that module's `TASK`; it is imported
only when it is asked for, so that a task's optional packages are needed by its users alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from datasets import Dataset

if TYPE_CHECKING:
    from trl_entropy.tasks.multi_turn import MultiTurnRollout

TASKS = {
    "arithmetic": "trl_entropy.tasks.arithmetic",
    "maths": "trl_entropy.tasks.maths",
    "reasoning_gym": "trl_entropy.tasks.reasoning_gym",
    "corridor": "trl_entropy.tasks.corridor",
    "scienceworld": "trl_entropy.tasks.scienceworld",
    "alfworld": "trl_entropy.tasks.alfworld",
}


@dataclass(frozen=True)
class Task:
    """A dataset, the rewards that grade its completions and, where they are episodes, their environment.

    Attributes:
        name: The key of `TASKS`.
        load: `load(split, **task_args)` returns the rows of split `"train"` or `"test"`, with a `prompt` column (text
            or chat messages) and whatever columns the rewards read. `task_args` are the recipe's.
        reward_funcs: TRL reward functions: `reward(prompts, completions, **columns)` returns one float a completion.
        build_policy: `build_policy(output_dir, seed)` makes the task's own small policy and its tokenizer, saves both
            in `output_dir` and returns that path; `None` where the user brings the model.
        build_rollout: `build_rollout(**environment_args)` makes the trainer's `rollout_func` for a task whose
            completions are episodes in an environment; close it after training. `None` where a completion is one turn.
    """

    name: str
    load: Callable[..., Dataset]
    reward_funcs: tuple[Callable[..., list[float | None]], ...]
    build_policy: Callable[[str, int], str] | None = None
    build_rollout: Callable[..., "MultiTurnRollout"] | None = None


def get_task(name: str) -> Task:
    """Look up a task of `TASKS` by name.

    Raises:
        ValueError: If no task has that name; the message lists those that exist.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown. Choose one of {', '.join(sorted(TASKS))}.")
    return import_module(TASKS[name]).TASK
