"""Reward functions by name: TRL's own, or any function by its import path."""

import inspect
import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from trl import rewards

TRL_REWARDS: dict[str, Callable[..., Any]] = {
    "accuracy_reward": rewards.accuracy_reward,
    "reasoning_accuracy_reward": rewards.reasoning_accuracy_reward,
    "think_format_reward": rewards.think_format_reward,
    "get_soft_overlong_punishment": rewards.get_soft_overlong_punishment(
        max_completion_len=1280, soft_punish_cache=256
    ),
}
"""TRL's reward functions by the names that `trl grpo` gives them."""
TRAINER_ARGUMENTS = frozenset(
    ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
)
"""What TRL's trainer passes to a reward function beside the columns of the dataset."""


def load_reward_func(name: str) -> Callable[..., Any]:
    """A reward function by its name in `TRL_REWARDS` or by its import path, `package.module.function`.

    Modules in the working directory can be imported.

    Raises:
        ValueError: If `name` is neither, or leads to no function.
        ImportError: If its module cannot be imported.
    """
    if name in TRL_REWARDS:
        return TRL_REWARDS[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ValueError(
            f"reward_funcs={name!r} is neither one of TRL's ({', '.join(TRL_REWARDS)}) nor an import path such as "
            "'my_rewards.length_reward'."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"reward_funcs={name!r}: cannot import {module_name!r} ({error}). Install it or run from its folder."
        ) from error
    func = getattr(module, attribute, None)
    if not callable(func):
        raise ValueError(f"reward_funcs={name!r}: {module_name!r} has no function {attribute!r}. Correct the name.")
    return func


def check_reward_columns(reward_funcs: Iterable[Callable[..., Any] | str], columns: Iterable[str]) -> None:
    """Refuse reward functions that ask for a column which the dataset does not have.

    Args:
        reward_funcs: Functions; reward models (names) are passed over.
        columns: Columns of the dataset.

    Raises:
        ValueError: Names the function, what it asks for and the columns there are.
    """
    columns = list(columns)
    for func in reward_funcs:
        if isinstance(func, str):
            continue
        missing = _required_arguments(func) - TRAINER_ARGUMENTS - set(columns)
        if missing:
            raise ValueError(
                f"Reward function {getattr(func, '__name__', func)!r} asks for {', '.join(sorted(missing))}, and the "
                f"dataset has only the columns {', '.join(columns)}. Rename or add the column."
            )


def require_math_verify(reward_funcs: Iterable[Callable[..., Any] | str]) -> None:
    """Check that the rewards that grade by math-verify can do so.

    Raises:
        ImportError: If one of them is TRL's and math-verify is not installed; the message names the extra.
    """
    graders = {rewards.accuracy_reward, rewards.reasoning_accuracy_reward}
    if graders.intersection(reward_funcs) and find_spec("math_verify") is None:
        raise ImportError("Grading needs math-verify. Install it with: pip install 'trl_entropy[maths]'")


def _required_arguments(func: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(func).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty}
