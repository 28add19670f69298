"""SIGKILL at random moments of a command: what was finished stays, and the next run goes on to the same end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.conftest import WriteRecipe
from tests.telemetry.made_record import write_record

WORKER = Path(__file__).with_name("killed.py")
KILLS = 4
"""Of each command, at moments that its name seeds."""


def odd_length_reward(completions: list[list[dict[str, str]]], **kwargs: object) -> list[float]:
    return [float(len(messages[0]["content"]) % 2) for messages in completions]


def train(recipe: WriteRecipe, tiny_model_path: str) -> list[str]:
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 10}
    controls = {"critics": "policy", "epo_coef": 0.01, "record_tokens": 16, "critic_learning_rate": 1e-3}
    argv = recipe(**saving, **controls, lr_scheduler_type="constant", entropy_filter_fraction=0.0)
    return [*argv, "--output_dir", "{}", "--resume_from_checkpoint", "auto"]


def evaluate(recipe: WriteRecipe, tiny_model_path: str) -> list[str]:
    recipe()
    rows = [{"problem": "+".join("12345678"[: i + 1]) + "=", "answer": str(i)} for i in range(8)]
    Path("problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    sampling = [
        "--temperature",
        "1.0",
        "--max_new_tokens",
        "20",
        "--n",
        "4",
        "--batch_size",
        "1",
        "--template",
        "none",
    ]
    graded = ["--dataset_file", "problems.jsonl", "--reward_funcs", "tests.commands.test_killed.odd_length_reward"]
    model = ["--model", tiny_model_path, "--backend", "transformers"]
    return [*model, *graded, *sampling, "--output_dir", "{}"]


def report(recipe: WriteRecipe, tiny_model_path: str) -> list[str]:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    Path("run").mkdir()
    history = [{"step": step, "reward": step / 10, "entropy": 1 / step} for step in range(1, 20)]
    Path("run/trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    write_record(Path("run"), 5)
    return ["run", "--output", "{}/report.html"]


def quickstart(recipe: WriteRecipe, tiny_model_path: str) -> list[str]:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    recipe()
    return ["--output_dir", "{}", "--arms", "ppo-clip,erc"]


def same_training(whole: Path, killed: Path) -> None:
    for file in ("model.safetensors", *(f"critics/critic_{index}/model.safetensors" for index in range(2))):
        expected, found = load_file(whole / file), load_file(killed / file)
        assert all(torch.equal(expected[name], found[name]) for name in expected), file
    history = json.loads((killed / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 11))


def same_evaluation(whole: Path, killed: Path) -> None:
    expected, found = (json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (whole, killed))
    assert expected["results"] == found["results"]
    (samples,) = whole.rglob("*.jsonl")
    assert samples.read_bytes() == (killed / samples.relative_to(whole)).read_bytes()


def same_page(whole: Path, killed: Path) -> None:
    for page in whole.rglob("*.*"):
        assert page.read_bytes() == (killed / page.relative_to(whole)).read_bytes(), page


def same_arms(whole: Path, killed: Path) -> None:
    expected, found = (json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (whole, killed))
    for results in (expected, found):
        assert all(arm.pop("seconds") > 0 for arm in results["arms"].values())
    assert found == expected
    for file in ("policy/model.safetensors", "ppo-clip/model.safetensors", "erc/model.safetensors"):
        assert (whole / file).read_bytes() == (killed / file).read_bytes(), file
    assert (killed / "report.html").exists()


COMMANDS: dict[str, tuple[Callable[[WriteRecipe, str], list[str]], Callable[[Path, Path], None]]] = {
    "train": (train, same_training),
    "eval": (evaluate, same_evaluation),
    "report": (report, same_page),
    "quickstart": (quickstart, same_arms),
}
"""Its arguments, and what must be the same in the end."""


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_random_moments_it_goes_on_to_the_same_end(
    command: str, recipe: WriteRecipe, tiny_model_path: str
) -> None:
    arguments, same_end = COMMANDS[command]
    argv = arguments(recipe, tiny_model_path)
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    worker = [sys.executable, str(WORKER), command, "killed", str(len(command)), str(KILLS), *argv]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "generated anew" not in done.stderr
    same_end(Path("whole"), Path("killed"))
    assert not list(Path("killed").glob("**/*.part"))
