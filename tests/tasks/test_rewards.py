"""Reward functions by name and by import path."""

import sys
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from trl import rewards

from trl_entropy.tasks.arithmetic import exact_answer_reward
from trl_entropy.tasks.rewards import (
    check_reward_columns,
    check_reward_prompts,
    load_reward_func,
    require_math_verify,
)


def test_trl_names() -> None:
    assert load_reward_func("accuracy_reward") is rewards.accuracy_reward
    assert load_reward_func("think_format_reward") is rewards.think_format_reward


def test_import_path_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
    (tmp_path / "rewards_of_mine.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    assert load_reward_func("rewards_of_mine.length")(completions=["abc"]) == [3.0]


def test_a_file_in_the_working_directory_hides_no_installed_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a `json.py` in a folder that was downloaded, which everything imported later would run."""
    installed = tmp_path / "installed"
    for folder in (installed, tmp_path):
        folder.mkdir(exist_ok=True)
        for name in ("of_both", "imported_later"):
            (folder / f"{name}.py").write_text(f"def length(**kwargs):\n    return {folder.name!r}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(installed), *(path for path in sys.path if path not in ("", "."))])
    assert load_reward_func("of_both.length")() == "installed"
    assert sys.path[-1] == str(tmp_path)
    assert import_module("imported_later").length() == "installed"
    with pytest.raises(ValueError, match=r"'of_both' \(.*installed.of_both\.py\) has no function 'width'"):
        load_reward_func("of_both.width")


def test_errors_name_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_rewards.py").write_text("import no_such_package\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'accuracy' is neither one of TRL's \(accuracy_reward"):
        load_reward_func("accuracy")
    with pytest.raises(ImportError, match="cannot import 'no_such_rewards'"):
        load_reward_func("no_such_rewards.length")
    with pytest.raises(ImportError, match=r"cannot import 'broken_rewards' \(No module named 'no_such_package'\)"):
        load_reward_func("broken_rewards.length")
    with pytest.raises(ValueError, match=r"'math'.* has no function 'lenght'"):
        load_reward_func("math.lenght")


def test_missing_column_is_named() -> None:
    def graded(
        prompts: list[str], completions: list[str], solution: list[str], hint: str = "", **kwargs: object
    ) -> None:
        """Asks for `solution`; `hint` has a default."""

    check_reward_columns([graded, "a/reward-model"], ["prompt", "solution"])
    with pytest.raises(ValueError, match=r"'graded' asks for solution, .* only the columns prompt, answer"):
        check_reward_columns([graded], ["prompt", "answer"])


def test_grading_without_math_verify_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_entropy.tasks.rewards.find_spec", lambda name: None)
    require_math_verify([rewards.think_format_reward, "a/reward-model"])
    with pytest.raises(ImportError, match=r"trl_entropy\[maths\]"):
        require_math_verify([rewards.accuracy_reward])
    with pytest.raises(ImportError, match=r"trl_entropy\[maths\]"):
        require_math_verify([load_reward_func("reasoning_maths_reward")])


ALL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "solution")


def without(*names: str) -> Callable[..., Any]:
    """A reward function without `**kwargs` that takes all that the trainer passes but these."""
    scope: dict[str, Any] = {}
    exec(f"def reward({', '.join(name for name in ALL if name not in names)}): ...", scope)
    return scope["reward"]


def test_a_function_must_take_all_that_it_is_given() -> None:
    check_reward_columns([without()], ["prompt", "completion", "solution"])
    for name in ALL:
        with pytest.raises(ValueError, match=rf"'reward' does not take {name}, which .* Add \*\*kwargs"):
            check_reward_columns([without(name)], ["prompt", "solution"])
    with pytest.raises(
        ValueError, match=r"does not take completion_ids, log_extra, log_metric, prompts, solution, tr"
    ):
        check_reward_columns([lambda completions: []], ["prompt", "solution"])
    # with an environment alone
    with pytest.raises(ValueError, match="asks for environments"):
        check_reward_columns([lambda environments, **kwargs: []], ["prompt"])
    with pytest.raises(ValueError, match="column 'completions' has the name of an argument"):
        check_reward_columns([lambda **kwargs: []], ["prompt", "completions"])
    check_reward_columns([lambda success, **kwargs: []], ["prompt"], ["success", "episode_return"])


class Scaled:
    async def __call__(self, completions: list[str], solution: list[str], **kwargs: object) -> list[float]: ...


def test_what_the_trainer_can_call_is_not_refused() -> None:
    @wraps(without())
    def takes_all(completions: list[str], **kwargs: object) -> None: ...

    @wraps(exact_answer_reward)
    def gives_the_answer(completions: list[str], **kwargs: object) -> None: ...

    async def asynchronous(**kwargs: object) -> None: ...

    with_solution = partial(without(), solution=["1"])  # the column replaces it
    fit = [takes_all, gives_the_answer, asynchronous, with_solution, Scaled(), Scaled().__call__, dict, nn.Identity()]
    check_reward_columns([*fit, *map(load_reward_func, ("get_soft_overlong_punishment",))], ["prompt", "solution"])
    with pytest.raises(ValueError, match="'Scaled' asks for solution"):
        check_reward_columns([Scaled()], ["prompt"])


def test_rewards_of_messages_need_messages() -> None:
    messages = [{"role": "user", "content": "1+1?"}]
    mine: list[Any] = [exact_answer_reward, lambda completions, **kwargs: [], "a/reward-model", nn.Identity()]
    readers = [rewards.accuracy_reward, rewards.reasoning_accuracy_reward, rewards.think_format_reward]
    check_reward_prompts([*readers, *mine], messages)
    check_reward_prompts([*mine, load_reward_func("get_soft_overlong_punishment")], "1+1=")
    for func in [*readers, partial(rewards.accuracy_reward, log_extra=None)]:
        with pytest.raises(
            ValueError, match=r"_reward' reads chat messages, and the prompts are text, such as '1\+1="
        ):
            check_reward_prompts([func], "1+1=")


def test_the_quickstarts_reward_reads_both() -> None:
    chat = [[{"role": "assistant", "content": text}] for text in ("2", "3")]
    assert exact_answer_reward(completions=chat, answer=["2", "2"]) == [1.0, 0.0]
    assert exact_answer_reward(completions=["2", "02"], answer=["2", "2"]) == [1.0, 0.0]


def test_models_and_classes_are_no_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge").mkdir()
    for name in ("org/reward-model", "./judge", "judge"):
        with pytest.raises(ValueError, match=r"is no function\. A reward model is set as reward_model_name_or_path"):
            load_reward_func(name)
    with pytest.raises(
        ValueError, match=r"reward_funcs='tests.tasks.test_rewards.Scaled' is a class\. Name an instance"
    ):
        load_reward_func("tests.tasks.test_rewards.Scaled")
