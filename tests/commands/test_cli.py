"""The `trl-entropy` command."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from trl_entropy import __version__
from trl_entropy.commands import cli


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        cli.main(argv)
        out = capsys.readouterr().out
        assert "usage: trl-entropy COMMAND" in out
        for command, (_, purpose) in cli.COMMANDS.items():
            assert f"  {command} " in out
            assert purpose in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"trl-entropy {__version__}\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["trian"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "unknown command 'trian'" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("module", [module for module, _ in cli.COMMANDS.values()])
def test_command_modules_exist(module: str) -> None:
    assert find_spec(module) is not None


def test_hands_the_rest_of_the_line_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("trl_entropy.commands.train.main", seen.append)
    cli.main(["train", "--config", "x.yaml", "--seed", "1"])
    assert seen == [["--config", "x.yaml", "--seed", "1"]]


def test_train_help_lists_the_fields() -> None:
    command = [sys.executable, "-m", "trl_entropy.commands.cli", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    for field in ("--task", "--task_args", "--dataset_name", "--reward_funcs", "--erc_low", "--ce_gppo_alpha1"):
        assert f" {field} " in done.stdout
    assert done.stdout.splitlines()[0] == "usage: trl-entropy train --config FILE [--FIELD VALUE ...]"
