"""`trl-entropy train`, end to end on the tiny policy, and its refusals, which all come before a model is loaded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from safetensors.torch import load_file

from tests.commands.conftest import WriteRecipe, full_disk
from trl_entropy import pretrained
from trl_entropy.commands import train
from trl_entropy.tasks import arithmetic
from trl_entropy.trainers.resume import last_complete_checkpoint


def log_history(run: str = "run") -> list[dict[str, float]]:
    return json.loads(Path(run, "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


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
    """Without a model the task makes one in `output_dir/policy`, once, with the run's seed."""
    built: list[tuple[str, int]] = []

    def build(output_dir: str, seed: int) -> str:
        built.append((output_dir, seed))
        return shutil.copytree(tiny_model_path, output_dir)

    monkeypatch.setattr(arithmetic, "TASK", replace(arithmetic.TASK, build_policy=build))
    fields = {"dataset_name": None, "reward_funcs": None, "model_name_or_path": None, "task": "arithmetic"}
    train.main([*recipe(**fields, seed=5), "--task_args", '{"size": 32}', "--max_steps", "1"])
    assert built == [(str(Path("run/policy")), 5)]
    assert "rewards/exact_answer_reward/mean" in log_history()[0]


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


def test_killed_on_a_procedural_task_it_goes_on_where_it_was(recipe: WriteRecipe) -> None:
    """SIGKILL while it trains: the steps up to the last checkpoint are not taken again, and the end is the same."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'trl_entropy[gym]'")
    task = {"name": "count_bits", "size": 24, "test_size": 4, "answer_format": "plain"}
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 20, "lr_scheduler_type": "constant"}
    argv = recipe(dataset_name=None, task="reasoning_gym", task_args=task, epo_coef=0.01, **saving)
    train.main([*argv, "--output_dir", "whole"])
    command = [sys.executable, "-m", "trl_entropy.commands.train", *argv, "--output_dir", "killed"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not Path("killed/checkpoint-6/trainer_state.json").exists():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not Path("killed/model.safetensors").exists()
    complete = sorted(Path("killed").glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
    before = log_history(str(complete[-1].parent))
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


STRIPPED = ["--remove_unused_columns", "true"]


def takes_completions(completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]


def takes_nothing() -> None: ...


def takes_solution(completions: list[str], solution: list[str], **kwargs: object) -> list[float]:
    return [0.0 for _ in completions]


def takes_no_columns(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):  # type: ignore
    return [float(len(text)) for text in completions]


def takes_all(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, note):  # type: ignore
    return [float(len(text)) for text in completions]


def base(completions: list[str], scale: float, **kwargs: object) -> list[float | None]:
    return [scale if "1" in text else None for text in completions]


class Judge:
    async def __call__(self, completions: list[str], note: list[int], **kwargs: object) -> list[float]:
        return [float(number) for number in note]


async def waits(**kwargs: object) -> None: ...


partly, judge = partial(base, scale=2.0), Judge()


REFUSALS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "unknown field in the file": (
        {"erc_lo": 0.9},
        [],
        "Unknown field 'erc_lo' (in --erc_lo 0.9). Did you mean erc_low?",
    ),
    "unknown field on the command line": ({}, ["--erc_hi", "1.1"], "(in --erc_hi 1.1). Did you mean erc_high?"),
    "one bound alone": ({"erc_low": None}, [], "erc_low=None and erc_high=1.05: set both"),
    "neither task nor dataset": ({"dataset_name": None}, [], "None is set: set exactly one of task, dataset_name"),
    "task and dataset": ({"task": "maths"}, [], "task and dataset_name are set: set exactly one"),
    "unknown task": ({"task": "chess", "dataset_name": None}, [], "task='chess' is unknown"),
    "unknown task argument": (
        {"task": "arithmetic", "dataset_name": None, "task_args": {"sise": 3}},
        [],
        "task_args={'sise': 3} does not fit task='arithmetic'. Set a mapping with any of: size",
    ),
    "task arguments that are not JSON": ({}, ["--task_args", "size=3"], "task_args='size=3' is not JSON"),
    "missing rows": ({"dataset_name": "nowhere.jsonl"}, [], "'nowhere.jsonl' does not exist"),
    "no model": ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
    "no reward": ({"reward_funcs": None}, [], "There is no reward: set reward_funcs"),
    "unknown reward": ({"reward_funcs": ["acuracy_reward"]}, [], "reward_funcs='acuracy_reward' is neither"),
    "reward without its column": ({"reward_funcs": ["accuracy_reward"]}, [], "'accuracy_reward' asks for solution"),
    "fewer rows than a rollout": ({"steps_per_generation": 16}, [], "The 16 rows to train on are fewer than the 32"),
    "prompt length of zero": ({"max_prompt_length": 0}, [], "max_prompt_length=0 must be at least 1"),
    "no row is short enough": ({"max_prompt_length": 1, "dataset_name": "chat.jsonl"}, [], "no chat template"),
    "chat without a template": (
        {"dataset_name": "chat.jsonl"},
        [],
        "Row 0 of the dataset: The prompts are chat messages, such as [{'role': 'user', 'content': '1+1?'}], and the "
        "tokenizer of model ",
    ),
    "maths with a base model": (
        {"dataset_name": None, "task": "maths", "task_args": {"source": "chat.jsonl"}, "reward_funcs": None},
        [],
        "has no chat template. Take a model that has one, or set `tokenizer.chat_template` and save",
    ),
    "a reward of messages on text": (
        {"dataset_name": "solved.jsonl", "reward_funcs": ["accuracy_reward"]},
        [],
        "'accuracy_reward' reads chat messages, and the prompts are text, such as '1+1='. Make them messages",
    ),
    "a reward that does not take the columns": (
        {"reward_funcs": ["tests.commands.test_train.takes_completions"]},
        [],
        "'takes_completions' does not take completion_ids, log_extra, log_metric, note, prompts, trainer_state, which "
        "every reward function is given. Add **kwargs",
    ),
    "columns that are taken away": (
        {"dataset_name": "solved.jsonl", "reward_funcs": ["tests.commands.test_train.takes_solution"]},
        ["--remove_unused_columns", "true"],
        "'takes_solution' asks for solution, and the dataset has only the columns prompt. Rename or add the column. "
        "remove_unused_columns=True takes the others away.",
    ),
    "an empty prompt": ({"dataset_name": "empty.jsonl"}, [], "Row 9 of the dataset: The prompt '' has no tokens"),
    "a row without a prompt": ({"dataset_name": "gap.jsonl"}, [], "Row 7 of the dataset: None is not a prompt"),
    "no messages": (
        {"dataset_name": "hole.jsonl"},
        ["--model_name_or_path", "CHAT"],
        "Row 5 of the dataset: [] is not a prompt",
    ),
    "numbers for prompts": ({"dataset_name": "numbers.jsonl"}, [], "Row 0 of the dataset: 12 is not a prompt"),
    "arguments of another template": (
        {"dataset_name": "chat.jsonl", "chat_template_kwargs": {"continue_final_message": True}},
        ["--model_name_or_path", "CHAT"],
        "cannot be rendered with chat_template_kwargs={'continue_final_message': True}: continue_final_message and",
    ),
    "a model that is not there": (
        {"model_name_or_path": "./nowhere"},
        [],
        "model_name_or_path='./nowhere' cannot be loaded (",
    ),
    "an adapter as the policy": ({"model_name_or_path": "adapter"}, [], "model_name_or_path='adapter' is an adapter"),
    "an adapter as a critic": (
        {"critics": ["policy", "adapter"]},
        [],
        "critics='adapter' is an adapter, and training",
    ),
    "a critic with pickled weights": (
        {"critics": "pickled"},
        [],
        "critics='pickled' has its weights only as pytorch_model.bin, and loading these can run code. If you trust",
    ),
    "a critic that is not there": ({"critics": "./nowhere"}, [], "critics='./nowhere' cannot be loaded ("),
    "a reward model that is not there": (
        {"reward_funcs": None, "reward_model_name_or_path": "./nowhere"},
        [],
        "reward_model_name_or_path='./nowhere' cannot be loaded (",
    ),
    "a reward model as a function": ({"reward_funcs": ["org/judge"]}, [], "set as reward_model_name_or_path"),
    "nothing to resume": ({}, ["--resume_from_checkpoint", "true"], "output_dir='run' holds no checkpoint"),
    "checkpoint that is not there": ({"resume_from_checkpoint": "run/checkpoint-9"}, [], "is not a folder"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_line_and_come_first(name: str, recipe: WriteRecipe, chat_model_path: str) -> None:
    fields, arguments, message = REFUSALS[name]
    if "CHAT" in arguments:
        arguments = ["--model_name_or_path", chat_model_path]
    with pytest.raises(SystemExit) as stopped:
        train.main([*recipe(**fields), *arguments])
    assert str(stopped.value).startswith("trl-entropy train: error: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


@pytest.mark.usefixtures("no_model")
def test_a_reward_model_for_chat_needs_a_chat_template(
    recipe: WriteRecipe, chat_model_path: str, tiny_model_path: str
) -> None:
    fields = {"dataset_name": "chat.jsonl", "reward_funcs": None, "reward_model_name_or_path": tiny_model_path}
    with pytest.raises(
        SystemExit, match=r"reward_model_name_or_path='.*' has no chat template, and the prompts are ch"
    ):
        train.main(recipe(model_name_or_path=chat_model_path, **fields))


@pytest.mark.usefixtures("no_model")
def test_a_stream_is_checked_by_its_first_row(recipe: WriteRecipe) -> None:
    with pytest.raises(SystemExit, match="has no chat template"):
        train.main(recipe(dataset_name="chat.jsonl", dataset_streaming=True))
    reward = ["tests.commands.test_train.takes_nothing"]
    with pytest.raises(SystemExit, match="'takes_nothing' does not take"):
        train.main(recipe(dataset_name="solved.jsonl", dataset_streaming=True, reward_funcs=reward))


def test_what_training_takes_is_not_refused(recipe: WriteRecipe) -> None:
    mine = ["takes_all", "partly", "judge"] if Version(trl.__version__) >= Version("1.14") else ["takes_all", "partly"]
    names = [f"tests.commands.test_train.{name}" for name in mine]
    train.main([*recipe(reward_funcs=names, max_steps=1)])
    rewards = {key.split("/")[1] for key in log_history()[0] if key.startswith("rewards/")}
    assert rewards == {"takes_all", "base", "Judge"} if len(mine) == 3 else {"takes_all", "base"}
    # without its columns, a reward that reads none of them goes on
    train.main([*recipe(reward_funcs=["tests.commands.test_train.takes_no_columns"], max_steps=1), *STRIPPED])


@pytest.mark.usefixtures("no_model")
def test_objects_that_an_older_trl_does_not_await(recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("trl.trainer.utils.is_async_callable", raising=False)
    argv = recipe(reward_funcs=["tests.commands.test_train.judge"])
    with pytest.raises(SystemExit, match=r"'Judge' is an object with an asynchronous __call__, which TRL .* Name an"):
        train.main(argv)
    train.prepare(recipe(reward_funcs=["tests.commands.test_train.partly", "tests.commands.test_train.waits"]))


def test_chat_is_trained_on(recipe: WriteRecipe, chat_model_path: str, caplog: pytest.LogCaptureFixture) -> None:
    """`<|user|>1+1?<eos><|assistant|>` are 26 tokens, and 41 with an empty thought."""
    fields = {"model_name_or_path": chat_model_path, "dataset_name": "chat.jsonl", "max_steps": 1}
    fields |= {"reward_funcs": ["think_format_reward"], "chat_template_kwargs": {"enable_thinking": False}}
    train.main([*recipe(**fields, max_prompt_length=41)])
    assert "leaves out 1 of 17 rows" in caplog.text
    with pytest.raises(SystemExit, match="max_prompt_length=40 leaves out all 17 rows"):
        train.main([*recipe(**fields, max_prompt_length=40)])


@pytest.mark.usefixtures("no_model")
def test_missing_prompt_column(recipe: WriteRecipe) -> None:
    argv = recipe()
    Path("rows.jsonl").write_text('{"question": "1+1="}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="no column 'prompt', only question"):
        train.main(argv)


def launch(count: int, argv: list[str]) -> None:
    """Run the command under `accelerate launch`; on a machine without a GPU, two processes talk over gloo."""
    kind = "--multi_gpu" if count > 1 else "--cpu"
    launcher = ["-m", "accelerate.commands.launch", kind, f"--num_processes={count}", "--main_process_port=0"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "trl_entropy.commands.train", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


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
