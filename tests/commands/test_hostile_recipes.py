"""Recipes and command lines that are wrong: each is refused before a model is loaded, in one line.

The line names the field and its value, and says what to do.
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trl

from tests.commands.conftest import WriteRecipe
from trl_entropy import AsyPPOConfig
from trl_entropy.commands import evaluate, train
from trl_entropy.commands.fields import ABOVE_0, AT_LEAST, AT_MOST, field_types

TYPES = field_types([AsyPPOConfig])
OF_THE_BASE = {field.name for field in fields(trl.GRPOConfig)}
OWN = [field.name for field in fields(AsyPPOConfig) if field.name not in OF_THE_BASE]
OF_CRITICS = re.compile("num_critics|critic_|gae_|bootstrap|whiten|advantage_|entropy_filter")
CRITICS = set(filter(OF_CRITICS.match, OWN))
FLOATS = [name for name in OWN if TYPES[name] in (float, float | None)]
WHOLE = [name for name in OWN if TYPES[name] in (int, int | None)]
OF_TRL = ["learning_rate", "temperature", "epsilon", "beta", "top_p", "max_grad_norm", "num_train_epochs"]
OF_TRL_WHOLE = [
    "num_generations",
    "steps_per_generation",
    "max_completion_length",
    "per_device_train_batch_size",
    "seed",
]
SWITCHES = [name for name in OWN if TYPES[name] is bool] + ["use_vllm", "mask_truncated_completions", "use_peft"]
WORDS = ["epo_schedule", "epo_form", "epo_history", "critic_dtype", "loss_type", "importance_sampling_level"]

SIGNED = ("positive_nll_min_reward", "clip_cov_low")
UNBOUNDED = {
    *((name, ".inf") for name in ("clip_cov_high", "fipo_max_ratio", "fipo_safe_ratio", "dppo_truncation")),
    *((name, ".inf") for name in ("epo_kappa_high", "erc_high")),
    ("clip_cov_low", "-.inf"),
}
"""Bounds that may be left off."""

Case = tuple[str, str]
"""A line of YAML, and what the message must have beside the field: its value."""


def wrong_types() -> Iterator[Case]:
    for name in [*FLOATS, *OF_TRL]:
        for text in ("true", "2026-11-26", "[0.5]", "{a: 1}", ".nan", ".inf", "-.inf", "half"):
            if (name, text) not in UNBOUNDED:
                yield f"{name}: {text}", shown(text)
    for name in [*WHOLE, *OF_TRL_WHOLE]:
        for text in ("false", "2.5", "[2]", "two", "2026-11-26"):
            yield f"{name}: {text}", shown(text)
    for name in SWITCHES:
        for text in ("2", "0.5", "[true]", "perhaps"):
            yield f"{name}: {text}", shown(text)
    for name in WORDS:
        for text in ("5", "[a]", "no-such-word", "2026-11-26"):
            yield f"{name}: {text}", shown(text)


def shown(text: str) -> str:
    python = {"true": "True", "false": "False", "[true]": "[True]", "[a]": "['a']", "{a: 1}": "{'a': 1}"}
    python |= {".nan": "nan", ".inf": "inf", "-.inf": "-inf", "2026-11-26": "datetime.date(2026, 11, 26)"}
    return python.get(text, text)


def wrong_ranges() -> Iterator[Case]:
    for name, least in AT_LEAST.items():
        yield f"{name}: {int(least) - 1}", str(int(least) - 1)
    for name, most in AT_MOST.items():
        yield f"{name}: {int(most) + 1}", str(int(most) + 1)
    for name in ABOVE_0:
        yield f"{name}: 0.0", "0.0"
    for name in OWN:
        if TYPES[name] in (float, float | None, int, int | None) and name not in SIGNED:
            yield f"{name}: -3", "-3"
    for name in ("gae_gamma", "gae_lambda", "critic_gae_lambda", "advantage_mask_fraction", "entropy_filter_fraction"):
        yield f"{name}: 1.5", "1.5"


CONTRADICTIONS: list[Case] = [
    ("erc_low: 1.2\nerc_high: 1.1", "1.2"),
    ("erc_low: 0.9\nerc_high: null", "0.9"),
    ("ce_gppo_alpha1: 0.5", "0.5"),
    ("ce_gppo_alpha1: 0.5\nce_gppo_alpha2: 1.0\nbeta: 0.1", "0.1"),
    ("ce_gppo_alpha1: 0.5\nce_gppo_alpha2: 1.0\nloss_type: cispo", "cispo"),
    ("loss_type: vespo", "vespo"),
    ("epo_coef: 0.1\nepo_kappa_low: 1.5", "1.5"),
    ("critics: policy\nnum_critics: 1", "1"),
    ("critics: policy\nnum_critics: 9", "9"),
    ("critics: policy\nloss_type: vespo", "vespo"),
    ("critic_lora_r: 4", "4"),
    ("max_prompt_length: 0", "0"),
    ("task: chess\ndataset_name: null", "chess"),
    ("task: arithmetic", "dataset_name"),
    ("reward_funcs: [no.such.function]", "no.such.function"),
    ("reward_funcs: 7", "7"),
    ("task_args: '{'", "{"),
    ("task: arithmetic\ndataset_name: null\ntask_args: &a {b: *a}", "b"),
    ("dataset_name: 2026", "2026"),
    ("dataset_name: null\ndatasets: [{paht: json}]", "paht"),
    ("dataset_name: null\ndatasets: [{path: json, columns: 3}]", "3"),
    ("dataset_name: null\ndatasets: [rows.jsonl]", "rows.jsonl"),
    ("output_dir: 7", "7"),
    ("model_name_or_path: [a, b]", "['a', 'b']"),
    ("resume_from_checkpoint: nowhere", "nowhere"),
    ("num_generations: 3", "3"),
]

NAMES = ("erc_lo", "ERC_LOW", "erc-low", "epo", "critic", "lr", "__class__")
UNKNOWN: list[Case] = [(f"{name}: 1", name) for name in NAMES]

BROKEN: dict[str, str] = {
    "": "is empty",
    "# nothing": "is empty",
    "[1, 2]": "is a list",
    "7": "is a int",
    "text": "is a str",
    "erc_low: 0.9\nerc_low: 0.8": "'erc_low' is there twice",
    "erc_low: 0.9\n'erc_low': 0.8": "'erc_low' is there twice",
    "task_args: {a: 1, a: 2}": "'a' is there twice",
    "a: [1": "not valid YAML",
    "a: b: c": "not valid YAML",
    "\ta: 1": "not valid YAML",
    "a: 'x": "not valid YAML",
    "a: *b": "not valid YAML",
    "? [a]\n: 1": "not valid YAML",
    "a: !!python/object/apply:os.system ['true']": "not valid YAML",
    "a: !!python/name:os.system": "not valid YAML",
    "a: !mine 1": "not valid YAML",
    "!!python/object:os.Popen {}": "not valid YAML",
    "a: \x07": "not valid YAML",
    "a: 1\n---\nb: 2": "not valid YAML",
    "a: " + "[" * 5000: "not valid YAML",
    "1: 2": "field 1",
    "null: 2": "field None",
    "true: 2": "field True",
    "2026-11-26: 2": "field datetime.date(2026, 11, 26)",
    "critics: &a [*a]": "critics",
    "learning_rate: &a [*a]": "learning_rate",
    "env: [1]": "env",
    "output_dir: !!binary aGVsbG8=": "output_dir",
    "erc_low: !!set {0.9}": "erc_low",
    "erc_low: 0o17x": "erc_low",
    "erc_low: 1_0:3x": "erc_low",
}
REMEDY = re.compile(
    r"Set|Correct|Choose|Lower|Raise|Add|Leave|Name|Give|Published|Default|Install|needed|lists the fields|must be|"
    r"Use|Take|Rename|Did you mean|should be|needs|Write",
    re.IGNORECASE,
)


@pytest.fixture
def refusal(recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`refusal(lines, *arguments)`: what `train` says of the recipe with these further lines."""
    for name in ("EntropyGRPOTrainer", "AsyPPOTrainer"):
        monkeypatch.setattr(train, name, lambda **kwargs: pytest.fail("a model was loaded"))
    recipe()
    good = Path("recipe.yaml").read_text(encoding="utf-8")

    def refusal(lines: str, *arguments: str) -> str:
        names = {line.split(":")[0] for line in lines.splitlines()}
        names |= {"erc_low", "erc_high"} if "ce_gppo" in lines else set()
        kept = [line for line in good.splitlines() if line.split(":")[0] not in names]
        critics = ["critics: policy"] if names & CRITICS and "critics" not in names else []
        Path("recipe.yaml").write_text("\n".join([*kept, *critics, lines]), encoding="utf-8")
        with pytest.raises(SystemExit) as stopped:
            train.main(["--config", "recipe.yaml", *arguments])
        message = str(stopped.value)
        assert message.startswith("trl-entropy train: error: "), message
        assert "\n" not in message, message
        assert REMEDY.search(message), message
        return message

    return refusal


TABLE = [*wrong_types(), *wrong_ranges(), *CONTRADICTIONS]


def test_the_table_is_long() -> None:
    assert len(TABLE) + len(UNKNOWN) + len(BROKEN) >= 300


@pytest.mark.parametrize(("line", "value"), TABLE)
def test_a_bad_value_is_refused_by_field_and_value(refusal: Any, line: str, value: str) -> None:
    message = refusal(line)
    assert any(each.split(":")[0] in message for each in line.splitlines()), message
    assert value in message, message


@pytest.mark.parametrize(("line", "name"), UNKNOWN)
def test_an_unknown_field_is_refused(refusal: Any, line: str, name: str) -> None:
    assert name.replace("-", "_") in refusal(line)


@pytest.mark.parametrize(("text", "reason"), BROKEN.items(), ids=[text[:20] for text in BROKEN])
def test_a_broken_file_is_refused(refusal: Any, tmp_path: Path, text: str, reason: str) -> None:
    Path("broken.yaml").write_text(text, encoding="utf-8")
    for command in (train, evaluate):
        with pytest.raises(SystemExit) as stopped:
            command.main(["--config", "broken.yaml"])
        message = str(stopped.value)
        assert re.match(r"trl-entropy (train|eval): error: ", message), message
        assert "\n" not in message
        assert command is evaluate or reason in message, message
        assert REMEDY.search(message), message
    assert not Path("made").exists()


@pytest.mark.parametrize("name", ["erc_low", "learning_rate", "num_generations", "epo_coef"])
@pytest.mark.parametrize("value", ["x", "nan", "-1", ""])
def test_a_bad_value_on_the_command_line_is_refused(refusal: Any, name: str, value: str) -> None:
    message = refusal("", f"--{name}={value}")
    assert name in message
    assert value in message
