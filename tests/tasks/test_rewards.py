"""Reward functions by name and by import path."""

import sys
from pathlib import Path

import pytest
from trl import rewards

from trl_entropy.tasks.rewards import check_reward_columns, load_reward_func, require_math_verify


def test_trl_names() -> None:
    assert load_reward_func("accuracy_reward") is rewards.accuracy_reward
    assert load_reward_func("think_format_reward") is rewards.think_format_reward


def test_import_path_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
    (tmp_path / "rewards_of_mine.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    assert load_reward_func("rewards_of_mine.length")(completions=["abc"]) == [3.0]


def test_errors_name_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_rewards.py").write_text("import no_such_package\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'accuracy' is neither one of TRL's \(accuracy_reward"):
        load_reward_func("accuracy")
    with pytest.raises(ImportError, match="cannot import 'no_such_rewards'"):
        load_reward_func("no_such_rewards.length")
    with pytest.raises(ImportError, match=r"cannot import 'broken_rewards' \(No module named 'no_such_package'\)"):
        load_reward_func("broken_rewards.length")
    with pytest.raises(ValueError, match="'math' has no function 'lenght'"):
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
