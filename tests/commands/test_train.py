"""`trl-entropy train`, end to end on the tiny policy."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.children import kill_when, run_python
from tests.commands.conftest import WriteRecipe, full_disk, log_history
from trl_entropy import pretrained
from trl_entropy.commands import train
from trl_entropy.tasks import arithmetic
from trl_entropy.trainers.resume import last_complete_checkpoint, steps_of


def test_trains_and_saves(recipe: WriteRecipe, tiny_model_path: str) -> None:
    train.main([*recipe(), "--max_steps", "3", "--ce_gppo_alpha1", "0.5", "--ce_gppo_alpha2", "1"])
    steps = [entry for entry in log_history() if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]  # the command line overrides the file
    assert {"reward", "entropy", "grad_norm", "erc/clip_fraction", "ce_gppo/low_fraction"} <= set(steps[0])
    assert steps[2]["erc/clip_fraction"] > 0
    before, after = (load_file(Path(folder, "model.safetensors")) for folder in (tiny_model_path, "run"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert {"README.md", "tokenizer.json", "training_args.bin"} <= set(os.listdir("run"))
    assert "2512.05591" in Path("run/README.md").read_text(encoding="utf-8")


def test_writes_a_report(recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    train.main([*recipe(), "--max_steps", "2"])
    assert "<html" in Path("run/report.html").read_text(encoding="utf-8")
    assert "Report: run/report.html" in capsys.readouterr().out


def test_trains_without_the_plots(recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes importing it fail
    train.main([*recipe(), "--max_steps", "1"])
    assert Path("run/model.safetensors").exists()
    assert not Path("run/report.html").exists()
    assert "No report" in caplog.text


def test_built_in_task_builds_its_policy(
    recipe: WriteRecipe, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model the task makes one in `output_dir/policy`, with the run's seed, and a resumed run keeps it."""
    built: list[tuple[str, int]] = []

    def build(output_dir: str, seed: int) -> str:
        built.append((output_dir, seed))
        return shutil.copytree(tiny_model_path, output_dir, dirs_exist_ok=True)

    monkeypatch.setattr(arithmetic, "TASK", replace(arithmetic.TASK, build_policy=build))
    fields = {"dataset_name": None, "reward_funcs": None, "model_name_or_path": None, "task": "arithmetic"}
    argv = [*recipe(**fields), "--task_args", '{"size": 32}', "--save_strategy", "steps", "--save_steps", "1"]
    train.main([*argv, "--seed", "5", "--max_steps", "1"])
    assert built == [(str(Path("run/policy")), 5)]
    assert "rewards/exact_answer_reward/mean" in log_history()[0]
    train.main([*argv, "--seed", "6", "--max_steps", "1"])
    assert [seed for _, seed in built] == [5, 6]
    train.main([*argv, "--seed", "6", "--max_steps", "2", "--resume_from_checkpoint", "true"])
    assert log_history()[-1]["step"] == 2
    assert [seed for _, seed in built] == [5, 6]


def test_a_pretrained_model_by_name(
    recipe: WriteRecipe, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`smollm2-135m` stands for its folder, of the policy and of the critics."""
    monkeypatch.setattr(pretrained, "_smollm2", lambda: Path(tiny_model_path))
    argv = recipe(model_name_or_path="smollm2-135m", critics=["smollm2-135m"], critic_lora_r=2, max_steps=1)
    run = train.prepare(argv)
    assert (run.model.model_name_or_path, run.script.critics) == (tiny_model_path, [tiny_model_path])
    train.main(argv)
    assert "asyppo/explained_variance" in log_history()[0]


def test_evaluates_on_held_out_rows(recipe: WriteRecipe) -> None:
    argv = recipe(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8, max_steps=1)
    with pytest.raises(SystemExit, match="no split 'test', only 'train'"):
        train.main(argv)
    train.main([*argv, "--test_split_size", "4"])
    assert any("eval_reward" in entry for entry in log_history())


def test_resume_equals_an_uninterrupted_run(recipe: WriteRecipe) -> None:
    """2 + 2 steps, with the checkpoint in the middle of a rollout, end at the weights of 4 steps."""
    argv = recipe(save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    train.main([*argv, "--output_dir", "whole"])
    train.main([*argv, "--output_dir", "halves", "--max_steps", "2", "--resume_from_checkpoint", "auto"])
    before = log_history("halves")[:2]
    train.main([*argv, "--output_dir", "halves", "--resume_from_checkpoint", "true"])
    assert [entry["step"] for entry in log_history("halves") if "loss" in entry] == [1, 2, 3, 4]
    assert log_history("halves")[:2] == before  # their step times too: the first two steps were not taken again
    whole, halves = (load_file(Path(folder, "model.safetensors")) for folder in ("whole", "halves"))
    for name in whole:
        assert torch.equal(whole[name], halves[name]), name


@pytest.mark.slow
def test_killed_on_a_procedural_task_it_goes_on_where_it_was(recipe: WriteRecipe) -> None:
    """SIGKILL while it trains: the steps up to the last checkpoint are not taken again, and the end is the same."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'trl_entropy[gym]'")
    task = {"name": "count_bits", "size": 24, "test_size": 4, "answer_format": "plain"}
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 20, "lr_scheduler_type": "constant"}
    argv = recipe(dataset_name=None, task="reasoning_gym", task_args=task, epo_coef=0.01, **saving)
    train.main([*argv, "--output_dir", "whole"])
    command = ["-m", "trl_entropy.commands.train", *argv, "--output_dir", "killed"]

    def reached() -> str | None:
        checkpoint = last_complete_checkpoint("killed")
        return checkpoint if checkpoint and steps_of(checkpoint) >= 6 else None

    kill_when(reached, command)
    assert not Path("killed/model.safetensors").exists()
    before = log_history(reached() or "")
    train.main([*argv, "--output_dir", "killed", "--resume_from_checkpoint", "auto"])
    after = log_history("killed")
    assert after[: len(before)] == before  # their step times too
    assert [entry["step"] for entry in after if "loss" in entry] == list(range(1, 21))
    whole, killed = (load_file(Path(folder, "model.safetensors")) for folder in ("whole", "killed"))
    for name in whole:
        assert torch.equal(whole[name], killed[name]), name


FULL: dict[str, tuple[dict[str, Any], int]] = {
    "the record": ({"record_tokens": 256}, 6_000),
    "the critics' weights": ({"critics": "policy"}, 15_000),
    "the critics' state": ({"critics": "policy"}, 50_000),
    "the rollout": ({}, 15_000),
    "the weights": ({}, 25_000),
    "the optimizer": ({}, 50_000),
}
"""What there is no room for at the second checkpoint: fields, and the largest size of a file, bytes."""


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(
    name: str, recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no report, which would take most of the time
    fields, largest_file = FULL[name]
    argv = recipe(**fields, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    argv += ["--resume_from_checkpoint", "auto"]
    train.main([*argv, "--output_dir", "whole"])
    train.main([*argv, "--max_steps", "2"])
    before = {path: path.read_bytes() for path in Path("run/checkpoint-2").rglob("*") if path.is_file()}
    with full_disk(largest_file), pytest.raises(SystemExit) as stopped:
        train.main(argv)
    message = str(stopped.value)
    assert message.startswith("trl-entropy train: error: a file could not be written (")
    assert message.endswith("Make room, and go on with resume_from_checkpoint=auto: the last checkpoint is whole.")
    assert "\n" not in message
    assert last_complete_checkpoint("run") == "run/checkpoint-2"
    assert before == {path: path.read_bytes() for path in Path("run/checkpoint-2").rglob("*") if path.is_file()}
    train.main(argv)
    whole, stopped_run = (load_file(Path(folder, "model.safetensors")) for folder in ("whole", "run"))
    for weight in whole:
        assert torch.equal(whole[weight], stopped_run[weight]), weight
    assert not list(Path("run").rglob("*.part"))


def test_no_room_for_the_rows(recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` has an error of its own for it, of which the full disk is the cause."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("cache"))
    argv = [*recipe(), "--dataset_name", "empty.jsonl"]
    with full_disk(200), pytest.raises(SystemExit, match=r"^trl-entropy train: error: a file could not be written \("):
        train.main(argv)


def test_lora(recipe: WriteRecipe) -> None:
    train.main([*recipe(use_peft=True, lora_target_modules=["all-linear"], lora_dropout=0.0, max_steps=1)])
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir("run"))


def test_long_prompts_are_left_out(recipe: WriteRecipe, caplog: pytest.LogCaptureFixture) -> None:
    train.main([*recipe(max_prompt_length=2, max_steps=1)])
    assert "max_prompt_length=2 leaves out 8 of 16 rows" in caplog.text
    with pytest.raises(SystemExit, match="The 4 rows to train on are fewer than the 8 prompts of a rollout"):
        train.main(recipe(max_prompt_length=1))


@pytest.mark.parametrize("asked_for", [False, True])
def test_remote_code_stays_off_unless_asked_for(
    asked_for: bool, recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(**arguments: Any) -> None:
        raise InterruptedError(arguments["args"].model_init_kwargs["trust_remote_code"])

    monkeypatch.setattr(train, "EntropyGRPOTrainer", stop)
    with pytest.raises(InterruptedError, match=str(asked_for)):
        train.train(train.prepare([*recipe(), *(["--trust_remote_code", "true"] if asked_for else [])]))


def test_chat_is_trained_on(recipe: WriteRecipe, chat_model_path: str, caplog: pytest.LogCaptureFixture) -> None:
    """`<|user|>1+1?<eos><|assistant|>` are 26 tokens, and 41 with an empty thought."""
    fields = {"model_name_or_path": chat_model_path, "dataset_name": "chat.jsonl", "max_steps": 1}
    fields |= {"reward_funcs": ["think_format_reward"], "chat_template_kwargs": {"enable_thinking": False}}
    train.main([*recipe(**fields, max_prompt_length=41)])
    assert "leaves out 1 of 17 rows" in caplog.text
    with pytest.raises(SystemExit, match="max_prompt_length=40 leaves out all 17 rows"):
        train.main([*recipe(**fields, max_prompt_length=40)])


def launch(count: int, argv: list[str]) -> None:
    """Run the command under `accelerate launch`; on a machine without a GPU, two processes talk over gloo."""
    kind = "--multi_gpu" if count > 1 else "--cpu"
    launcher = ["-m", "accelerate.commands.launch", kind, f"--num_processes={count}", "--main_process_port=0"]
    run_python([*launcher, "-m", "trl_entropy.commands.train", *argv])


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_weights(recipe: WriteRecipe) -> None:
    argv = recipe(ce_gppo_alpha1=0.5, ce_gppo_alpha2=1.0, positive_nll_coef=0.1)
    train.main([*argv, "--output_dir", "plain"])
    launch(1, [*argv, "--output_dir", "launched"])
    plain, launched = (load_file(Path(run, "model.safetensors")) for run in ("plain", "launched"))
    for name in plain:
        assert torch.equal(plain[name], launched[name]), name


@pytest.mark.slow
def test_two_processes(recipe: WriteRecipe) -> None:
    """Half the batch on each; the checkpoint of the last step has the random state of both."""
    argv = recipe(ce_gppo_alpha1=0.5, ce_gppo_alpha2=1.0, positive_nll_coef=0.1, per_device_train_batch_size=4)
    launch(2, [*argv, "--save_strategy", "steps", "--save_steps", "4"])
    assert [entry["step"] for entry in log_history() if "loss" in entry] == [1, 2, 3, 4]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir("run/checkpoint-4"))
