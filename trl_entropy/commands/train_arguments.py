"""What `trl-entropy train` is told: the fields of the recipe and of the command line, parsed into dataclasses."""

import json
import os
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig
from trl.scripts.grpo import GRPOScriptArguments

from trl_entropy.commands.fields import TrainFieldParser, arguments_of, read_fields
from trl_entropy.recipes import recipe_names, recipes_dir
from trl_entropy.tasks import TASKS
from trl_entropy.tasks.rewards import NAMED_REWARDS
from trl_entropy.trainers import AsyPPOConfig, EntropyGRPOConfig


@dataclass
class TrainArguments(GRPOScriptArguments):
    """What to train on and what to reward, beside TRL's `GRPOScriptArguments`.

    Set one of `task`, `dataset_name` (a dataset of the hub, a local `.json`, `.jsonl`, `.parquet` or `.csv` file, or a
    folder of such files or of a saved dataset) and `datasets`. `reward_funcs` and `reward_model_name_or_path` replace
    the rewards of a task.

    Args:
        task: Name of a task of `trl_entropy.tasks.TASKS`.
        task_args: Arguments of the task's `load`, such as `source` of `maths`; as JSON on the command line.
        reward_funcs: Names of `trl_entropy.tasks.rewards.NAMED_REWARDS`, or import paths; default: the task's own.
        environment_args: Arguments of the task's environment, for a task of episodes; as JSON on the command line.
        critics: Model ids or folders of AsyPPO's critics, one for all or one each; `policy` stands for the weights
            that the policy starts from. Setting it trains with AsyPPO, whose fields `AsyPPOConfig` adds.
        critic_lora_r: Train the critics as LoRA adapters of this rank on all linear layers, with alpha twice the rank.
        max_prompt_length: Leave out rows whose prompt has more tokens than this, chat template included.
    """

    task: str | None = field(default=None, metadata={"help": f"Task to train on: {', '.join(TASKS)}."})
    task_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the task's `load`, as JSON on the command line."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": f"Rewards: {', '.join(NAMED_REWARDS)}, or import paths. Default: those of the task."},
    )
    environment_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the task's environment, as JSON on the command line."}
    )
    critics: list[str] | None = field(
        default=None, metadata={"help": "AsyPPO's critics: model ids or folders, or `policy`. Selects AsyPPO."}
    )
    critic_lora_r: int | None = field(
        default=None, metadata={"help": "Train AsyPPO's critics as LoRA adapters of this rank."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Leave out rows whose prompt has more tokens, chat template included."}
    )

    def __post_init__(self) -> None:
        self.task_args = _from_json("task_args", self.task_args)
        self.environment_args = _from_json("environment_args", self.environment_args)
        if isinstance(self.critics, str):
            self.critics = [self.critics]
        if self.critic_lora_r is not None and (self.critic_lora_r < 1 or not self.critics):
            raise ValueError(f"critic_lora_r={self.critic_lora_r} must be at least 1, and needs critics.")
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        if self.ignore_bias_buffers:
            raise ValueError("ignore_bias_buffers=True does nothing here: TRL reads it for DPO alone. Leave it out.")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length={self.max_prompt_length} must be at least 1, or left out.")


def _from_json(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={value!r} is not JSON ({error}). Write it as in '{{\"size\": 100}}'.") from error


def parse(
    argv: list[str] | None = None,
) -> tuple[TrainArguments, EntropyGRPOConfig, ModelConfig, DatasetMixtureConfig]:
    """Read the recipe and the command line.

    Raises:
        FileNotFoundError: If the recipe does not exist.
        ValueError: If it is not YAML, if it or the command line has an unknown field, or if a field has a bad value.
    """
    argv = _with_known_config(arguments_of(argv))
    recipe = read_fields(argv[argv.index("--config") + 1]) if "--config" in argv else {}
    names_critics = bool(recipe.get("critics")) or any(word.split("=")[0] == "--critics" for word in argv)
    config_class = AsyPPOConfig if names_critics else EntropyGRPOConfig
    types = (TrainArguments, config_class, ModelConfig, DatasetMixtureConfig)
    usage = "trl-entropy train --config FILE [--FIELD VALUE ...]"
    parser = TrainFieldParser(types, prog="trl-entropy train", usage=usage, allow_abbrev=False)
    parser.epilog = "FILE is YAML with any of these fields; the command line overrides it."
    *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        close = get_close_matches(name, [field.name for kind in types for field in fields(kind)], n=1)
        hint = f"Did you mean {close[0]}?" if close else "`trl-entropy train --help` lists the fields."
        raise ValueError(f"Unknown field {name!r} (in {' '.join(unknown)}). {hint}")
    return tuple(parsed)


def _with_known_config(argv: list[str]) -> list[str]:
    """The arguments, whose recipe is there."""
    if "--config" in argv:
        path = next(iter(argv[argv.index("--config") + 1 :]), "")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"--config {path!r} is not a file. The recipes in {recipes_dir()}, of which `trl-entropy recipes copy "
                f"NAME` writes one out: {', '.join(recipe_names())}."
            )
    return argv
