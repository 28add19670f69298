"""Every option of the commands that have fields of their own changes something that can be seen.

Those of `train` and `eval`, which are dataclasses, are in the tables of `test_wiring.py`. A new option must be added
to `CHANGES`.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.small_quickstart import make_small
from trl_entropy.commands import cli, probe, quickstart

pytest.importorskip("matplotlib")

PROBE = ["--model", "m", "--dataset", "rows.jsonl", "--per_device_train_batch_size", "2", "--num_generations", "2"]
QUICKSTART = ["--output_dir", "out", "--arms", "ppo-clip"]
CHANGES: dict[str, tuple[list[str], list[str]]] = {
    "methods names": ([], ["erc"]),
    "methods --markdown": ([], ["--markdown"]),
    "methods --metrics": ([], ["--metrics"]),
    "methods --trainers": ([], ["--trainers"]),
    "recipes show name": (["show", "quickstart"], ["show", "epo-corridor"]),
    "recipes copy name": (["copy", "epo-corridor"], ["copy", "asyppo-corridor"]),
    "recipes copy destination": (["copy", "epo-corridor"], ["copy", "epo-corridor", "mine.yaml"]),
    "recipes copy --force": (["copy", "quickstart"], ["copy", "quickstart", "--force"]),
    "report runs": (["run"], ["run", "run"]),
    "report --output": (["run"], ["run", "--output", "page.html"]),
    "probe --model": (PROBE, [*PROBE, "--model", "copy"]),
    "probe --dataset": (PROBE, [*PROBE, "--dataset", "more.jsonl"]),
    "probe --dtype": (PROBE, [*PROBE, "--dtype", "bfloat16"]),
    "probe --steps": (PROBE, [*PROBE, "--steps", "2"]),
    "probe --max_completion_length": (PROBE, [*PROBE, "--max_completion_length", "5"]),
    "probe --output_dir": (PROBE, [*PROBE, "--output_dir", "elsewhere"]),
    "quickstart --output_dir": (QUICKSTART, [*QUICKSTART, "--output_dir", "elsewhere"]),
    "quickstart --model": (QUICKSTART, [*QUICKSTART, "--model", "./nowhere"]),
    "quickstart --seed": (QUICKSTART, [*QUICKSTART, "--seed", "1"]),
    "quickstart --steps": (QUICKSTART, [*QUICKSTART, "--steps", "7"]),
    "quickstart --arms": (QUICKSTART, [*QUICKSTART, "--arms", "erc"]),
}
"""Command and option: a command line, and one with another value."""


class ReachedError(Exception):
    """What a command was about to do."""


def options(parser: argparse.ArgumentParser, command: str) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options(below, f"{command} {name}")
        elif not isinstance(action, argparse._HelpAction):
            yield f"{command} {(action.option_strings or [action.dest])[0]}"


def test_every_option_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(parser: argparse.ArgumentParser, *given: Any, **more: Any) -> None:
        raise ReachedError(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    found: list[str] = []
    for command, (module, _) in cli.COMMANDS.items():
        if command not in ("train", "eval"):
            with pytest.raises(ReachedError) as reached:
                import_module(module).main([])
            found += options(reached.value.args[0], command)
    assert sorted(found) == sorted(CHANGES)


def reach_training(*, args: Any, model: str, **given: Any) -> None:
    raise ReachedError(args.output_dir, args.seed, args.max_steps, args.erc_low, model)


def reach_measuring(asked: probe.Probe) -> None:
    plan = asked.plan
    raise ReachedError(
        *(asked.steps, plan.config.output_dir, plan.config.max_completion_length, plan.config.bf16),
        *(plan.model.model_name_or_path, plan.model.dtype, list(plan.train_dataset)),
    )


@pytest.fixture
def seen(
    tmp_path: Path,
    tiny_model_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., Any]]:
    """`seen(command, argv)`: what it prints, what it writes, and how it ends; no model is trained."""
    start = tmp_path / "start"
    (start / "run").mkdir(parents=True)
    for name in ("m", "copy"):
        (start / name).symlink_to(tiny_model_path)
    for name in ("rows", "more"):
        (start / f"{name}.jsonl").write_text((json.dumps({"prompt": name}) + "\n") * 4, encoding="utf-8")
    log = {"log_history": [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}]}
    (start / "run" / "trainer_state.json").write_text(json.dumps(log), encoding="utf-8")
    (start / "quickstart.yaml").write_text("mine", encoding="utf-8")
    make_small(monkeypatch, tmp_path / "small.yaml")
    monkeypatch.setattr(quickstart, "EntropyGRPOTrainer", reach_training)
    monkeypatch.setattr(probe, "measure", reach_measuring)
    threads = torch.get_num_threads()

    def seen(command: str, argv: list[str]) -> Any:
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(start, work, symlinks=True)
        monkeypatch.chdir(work)
        try:
            end: Any = import_module(cli.COMMANDS[command][0]).main(argv)
        except (ReachedError, SystemExit) as error:
            end = error.args
        files = {str(path.relative_to(work)) for path in work.rglob("*")}
        return end, capsys.readouterr().out, files, [path.read_text() for path in sorted(work.glob("*.yaml"))]

    yield seen
    torch.set_num_threads(threads)


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_changes_what_is_seen(seen: Callable[..., Any], bases: dict[str, Any], option: str) -> None:
    command, (before, after) = option.split()[0], CHANGES[option]
    key = repr((command, before))
    if key not in bases:
        bases[key] = seen(command, before)
    assert seen(command, after) != bases[key]


@pytest.mark.parametrize("command", ["methods", "recipes", "report", "probe", "quickstart"])
def test_without_a_change_the_same_is_seen(seen: Callable[..., Any], bases: dict[str, Any], command: str) -> None:
    before = next(before for option, (before, _) in CHANGES.items() if option.startswith(command))
    key = repr((command, before))
    first = bases[key] if key in bases else seen(command, before)
    assert seen(command, before) == first
