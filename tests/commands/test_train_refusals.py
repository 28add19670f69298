"""What `trl-entropy train` refuses, before a model is loaded, and what it does not."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trl
from packaging.version import Version

from tests.commands.conftest import WriteRecipe, log_history
from trl_entropy.commands import train

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
        {"reward_funcs": ["tests.commands.test_train_refusals.takes_completions"]},
        [],
        "'takes_completions' does not take completion_ids, log_extra, log_metric, note, prompts, trainer_state, which "
        "every reward function is given. Add **kwargs",
    ),
    "columns that are taken away": (
        {"dataset_name": "solved.jsonl", "reward_funcs": ["tests.commands.test_train_refusals.takes_solution"]},
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
    reward = ["tests.commands.test_train_refusals.takes_nothing"]
    with pytest.raises(SystemExit, match="'takes_nothing' does not take"):
        train.main(recipe(dataset_name="solved.jsonl", dataset_streaming=True, reward_funcs=reward))


def test_what_training_takes_is_not_refused(recipe: WriteRecipe) -> None:
    mine = ["takes_all", "partly", "judge"] if Version(trl.__version__) >= Version("1.14") else ["takes_all", "partly"]
    names = [f"tests.commands.test_train_refusals.{name}" for name in mine]
    train.main([*recipe(reward_funcs=names, max_steps=1)])
    rewards = {key.split("/")[1] for key in log_history()[0] if key.startswith("rewards/")}
    assert rewards == {"takes_all", "base", "Judge"} if len(mine) == 3 else {"takes_all", "base"}
    # without its columns, a reward that reads none of them goes on
    train.main([*recipe(reward_funcs=["tests.commands.test_train_refusals.takes_no_columns"], max_steps=1), *STRIPPED])


@pytest.mark.usefixtures("no_model")
def test_objects_that_an_older_trl_does_not_await(recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("trl.trainer.utils.is_async_callable", raising=False)
    argv = recipe(reward_funcs=["tests.commands.test_train_refusals.judge"])
    with pytest.raises(SystemExit, match=r"'Judge' is an object with an asynchronous __call__, which TRL .* Name an"):
        train.main(argv)
    train.prepare(
        recipe(reward_funcs=["tests.commands.test_train_refusals.partly", "tests.commands.test_train_refusals.waits"])
    )


@pytest.mark.usefixtures("no_model")
def test_missing_prompt_column(recipe: WriteRecipe) -> None:
    argv = recipe()
    Path("rows.jsonl").write_text('{"question": "1+1="}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="no column 'prompt', only question"):
        train.main(argv)
