"""Reward functions by name: TRL's, those of this package, or any function by its import path."""

import inspect
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn
from trl import rewards
from trl.trainer.utils import get_callable_name

from trl_entropy.tasks.grading import maths_reward, reasoning_maths_reward
from trl_entropy.tasks.templates import shown

TRL_REWARDS: dict[str, Callable[..., Any]] = {
    "accuracy_reward": rewards.accuracy_reward,
    "reasoning_accuracy_reward": rewards.reasoning_accuracy_reward,
    "think_format_reward": rewards.think_format_reward,
    "get_soft_overlong_punishment": rewards.get_soft_overlong_punishment(
        max_completion_len=1280, soft_punish_cache=256
    ),
}
"""TRL's reward functions by the names that `trl grpo` gives them."""
NAMED_REWARDS: dict[str, Callable[..., Any]] = {
    **TRL_REWARDS,
    "maths_reward": maths_reward,
    "reasoning_maths_reward": reasoning_maths_reward,
}
"""Those and the ones of `trl_entropy.tasks.grading`."""
TRAINER_ARGUMENTS = frozenset(("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"))
"""What TRL's trainer passes to every reward function beside the columns of the dataset."""
NOT_PASSED = frozenset(("prompt", "completion", "completion_ids"))
"""Columns that TRL's trainer does not pass on."""
MESSAGE_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "cosine_scaled_reward")
"""TRL's reward functions that read chat messages and fail on text."""


def load_reward_func(name: str) -> Callable[..., Any]:
    """A reward function by its name in `NAMED_REWARDS` or by its import path, `package.module.function`.

    Modules in the working directory can be imported, unless installed ones have their names: that folder is last.

    Raises:
        ValueError: If `name` is neither, or leads to no function. The name of a reward model is none of them.
        ImportError: If its module cannot be imported.
    """
    if name in NAMED_REWARDS:
        return NAMED_REWARDS[name]
    if "/" in name or os.path.isdir(name):
        raise ValueError(
            f"reward_funcs={name!r} is no function. A reward model is set as reward_model_name_or_path of "
            "`trl-entropy train`; `trl-entropy eval` grades by functions alone."
        )
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ValueError(
            f"reward_funcs={name!r} is neither one of TRL's ({', '.join(TRL_REWARDS)}), nor maths_reward or "
            "reasoning_maths_reward, nor an import path such as 'my_rewards.length_reward'."
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"reward_funcs={name!r}: cannot import {module_name!r} ({error}). Install it or run from its folder."
        ) from error
    func = getattr(module, attribute, None)
    if not callable(func):
        where = getattr(module, "__file__", None)
        found = f"{module_name!r} ({where})" if where else repr(module_name)
        raise ValueError(f"reward_funcs={name!r}: {found} has no function {attribute!r}. Correct the name.")
    if inspect.isclass(func):
        raise ValueError(f"reward_funcs={name!r} is a class. Name an instance of it, or a function.")
    return func


def check_reward_columns(
    reward_funcs: Iterable[Callable[..., Any] | str], columns: Iterable[str], rollout_columns: Iterable[str] = ()
) -> None:
    """Refuse reward functions that cannot be called with what the trainer passes.

    Args:
        reward_funcs: Functions; reward models (names and modules) are passed over.
        columns: Columns of the dataset.
        rollout_columns: What the task's rollout adds to them.

    Raises:
        ValueError: If a function asks for a column that is not there, or does not take one that is; names both.
    """
    columns = list(columns)
    passed = TRAINER_ARGUMENTS | (set(columns) - NOT_PASSED) | set(rollout_columns)
    for func in reward_funcs:
        if isinstance(func, str | nn.Module):
            continue
        if twice := {"prompts", "completions"} & set(columns):
            raise ValueError(f"The column {twice.pop()!r} has the name of an argument of reward functions. Rename it.")
        missing, unknown = _mismatch(func, passed)
        name = get_callable_name(func)
        if missing:
            raise ValueError(
                f"Reward function {name!r} asks for {', '.join(sorted(missing))}, and the "
                f"dataset has only the columns {', '.join(columns)}. Rename or add the column."
            )
        if unknown:
            raise ValueError(
                f"Reward function {name!r} does not take {', '.join(sorted(unknown))}, which every reward function is "
                "given. Add **kwargs to its parameters."
            )


def check_reward_prompts(reward_funcs: Iterable[Callable[..., Any] | str], prompt: Any) -> None:
    """Refuse rewards of TRL that read chat messages where the prompts, and so the completions, are text.

    Args:
        reward_funcs: As `check_reward_columns`.
        prompt: A prompt of the dataset.

    Raises:
        ValueError: Names the function.
    """
    if not isinstance(prompt, str):
        return
    for func in reward_funcs:
        if isinstance(func, str | nn.Module):
            continue
        while isinstance(func, partial):
            func = func.func
        module = getattr(func, "__module__", None) or ""
        if get_callable_name(func) in MESSAGE_REWARDS and module.split(".")[0] in ("trl", "trl_entropy"):
            raise ValueError(
                f"Reward function {get_callable_name(func)!r} reads chat messages, and the prompts are text, such as "
                f"{shown(prompt)}. Make them messages: [{{'role': 'user', 'content': ...}}]."
            )


def require_math_verify(reward_funcs: Iterable[Callable[..., Any] | str]) -> None:
    """Check that the rewards that grade by math-verify can do so.

    Raises:
        ImportError: If math-verify is not installed; the message names the extra.
    """
    graders = {
        rewards.accuracy_reward,
        rewards.reasoning_accuracy_reward,
        maths_reward,
        reasoning_maths_reward,
    }
    if graders.intersection(reward_funcs) and find_spec("math_verify") is None:
        raise ImportError("Grading needs math-verify. Install it with: pip install 'trl_entropy[maths]'")


def _mismatch(func: Callable[..., Any], passed: frozenset[str] | set[str]) -> tuple[set[str], set[str]]:
    """Arguments that the function needs and is not passed, and those that it is passed and does not take.

    A decorator's own parameters count, not those of what it wraps: they are what the call meets.
    """
    try:
        parameters = inspect.signature(func, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # a builtin may have none to read
        return set(), set()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    missing = {name for name, p in named.items() if p.default is p.empty} - passed
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return missing, set() if takes_all else set(passed) - set(named)
