"""`trl-entropy train --config recipes/X.yaml [--field value ...]`: RL training from a recipe.

The fields are those of `TrainArguments`, `EntropyGRPOConfig`, `trl.ModelConfig` and `trl.DatasetMixtureConfig`, in the
YAML file or on the command line, which overrides the file. `accelerate launch -m trl_entropy.commands.train` takes the
same arguments.
"""

import gc
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from peft import LoraConfig
from transformers import AutoTokenizer, set_seed
from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_dataset, get_peft_config, get_quantization_config
from trl.scripts.grpo import GRPOScriptArguments

from trl_entropy.recipes import recipe_names, recipes_dir
from trl_entropy.tasks import TASKS, Task, get_task
from trl_entropy.tasks.rewards import TRL_REWARDS, check_reward_columns, load_reward_func, require_math_verify
from trl_entropy.tasks.sources import Rows, drop_long_prompts, load_source, select_split
from trl_entropy.telemetry.diagnosis import DiagnosisCallback
from trl_entropy.telemetry.report import write_report
from trl_entropy.trainers import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.trainers.resume import last_complete_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class TrainArguments(GRPOScriptArguments):
    """What to train on and what to reward, beside TRL's `GRPOScriptArguments`.

    Set one of `task`, `dataset_name` (a dataset of the hub, a local `.json`, `.jsonl`, `.parquet` or `.csv` file, or a
    folder of such files or of a saved dataset) and `datasets`. `reward_funcs` and `reward_model_name_or_path` replace
    the rewards of a task.

    Args:
        task: Name of a task of `trl_entropy.tasks.TASKS`.
        task_args: Arguments of the task's `load`, such as `source` of `maths`; as JSON on the command line.
        reward_funcs: Names of `trl_entropy.tasks.rewards.TRL_REWARDS`, or import paths; default: the task's own.
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
        metadata={"help": f"Rewards: {', '.join(TRL_REWARDS)}, or import paths. Default: those of the task."},
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
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length={self.max_prompt_length} must be at least 1, or left out.")


def _from_json(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={value!r} is not JSON ({error}).") from error


@dataclass(frozen=True)
class Run:
    """A checked training run. No model has been loaded for it yet.

    Attributes:
        script: What to train on and what to reward.
        config: The trainer's configuration.
        model: Which policy, in which precision, with which adapter.
        task: The task, where one was named.
        train_dataset: Rows to train on.
        eval_dataset: Rows to evaluate on; `None` with `eval_strategy="no"`.
        reward_funcs: Functions, and names of reward models.
        checkpoint: Checkpoint to resume from; `None` to start anew.
    """

    script: TrainArguments
    config: EntropyGRPOConfig
    model: ModelConfig
    task: Task | None
    train_dataset: Rows
    eval_dataset: Rows | None
    reward_funcs: list[Callable[..., Any] | str]
    checkpoint: str | None


def parse(
    argv: list[str] | None = None,
) -> tuple[TrainArguments, EntropyGRPOConfig, ModelConfig, DatasetMixtureConfig]:
    """Read the recipe and the command line.

    Raises:
        FileNotFoundError: If the recipe does not exist.
        ValueError: If it is not YAML, if it or the command line has an unknown field, or if a field has a bad value.
    """
    argv = _with_config_apart(sys.argv[1:] if argv is None else argv)
    config_class = AsyPPOConfig if _names_critics(argv) else EntropyGRPOConfig
    types = (TrainArguments, config_class, ModelConfig, DatasetMixtureConfig)
    usage = "trl-entropy train --config FILE [--FIELD VALUE ...]"
    parser = TrlParser(types, prog="trl-entropy train", usage=usage, allow_abbrev=False)
    parser.epilog = "FILE is YAML with any of these fields; the command line overrides it."
    try:
        *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe is not valid YAML: {error}") from error
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        close = get_close_matches(name, [action.dest for action in parser._actions], n=1)
        hint = f"Did you mean {close[0]}?" if close else "`trl-entropy train --help` lists the fields."
        raise ValueError(f"Unknown field {name!r} (in {' '.join(unknown)}). {hint}")
    return tuple(parsed)


def prepare(argv: list[str] | None = None) -> Run:
    """Parse and check everything that can be checked before a model is loaded, and load the rows.

    Raises:
        ValueError: As `parse`, or if the task, dataset, rewards, model or checkpoint are missing or do not fit.
        FileNotFoundError: If the recipe, a local dataset or the checkpoint does not exist.
        ImportError: If a reward function or vLLM cannot be imported.
    """
    script, config, model, mixture = parse(argv)
    task = get_task(script.task) if script.task else None
    if not model.model_name_or_path and (task is None or task.build_policy is None):
        raise ValueError("model_name_or_path is missing: name the model to train, on the hub or in a folder.")
    if config.use_vllm and find_spec("vllm") is None:
        raise ImportError("use_vllm=True needs vLLM: pip install 'trl_entropy[vllm]', or set use_vllm=False.")
    reward_funcs = _reward_funcs(script, task)
    checkpoint = _checkpoint(config)
    load = _loader(script, mixture, task, config.seed)
    train_dataset = load("train")
    eval_dataset = load("test") if config.eval_strategy != "no" else None
    for dataset in (train_dataset, eval_dataset):
        if dataset is not None:
            _check_columns(dataset, reward_funcs)
    require_math_verify(reward_funcs)
    _check_number_of_rows(train_dataset, config)
    return Run(script, config, model, task, train_dataset, eval_dataset, reward_funcs, checkpoint)


def train(run: Run) -> None:
    """Train, and save the model, its card, `trainer_state.json` and, with the extra `plots`, `report.html`."""
    config = run.config
    policy = run.model.model_name_or_path
    if not policy:
        assert run.task is not None
        assert run.task.build_policy is not None
        policy = _built_policy(run, run.task.build_policy)
    config.model_init_kwargs = {
        "revision": run.model.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": run.model.attn_implementation,
        "dtype": run.model.dtype,
        **(config.model_init_kwargs or {}),
    }
    train_dataset = _short_enough(run.train_dataset, run, policy)
    _check_number_of_rows(train_dataset, config)
    set_seed(config.seed)  # TRL 1.12 makes LoRA's weights before it seeds
    with _rollout(run) as rollout_func:
        trainer = _trainer(run, policy, train_dataset, rollout_func)
        trainer.train(resume_from_checkpoint=run.checkpoint)
    trainer.save_model(config.output_dir)
    trainer.save_state()
    trainer.create_model_card(dataset_name=run.script.dataset_name)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=run.script.dataset_name)
    if trainer.is_world_process_zero():
        _write_report(config.output_dir)


def _trainer(
    run: Run, policy: str, train_dataset: Rows | None, rollout_func: Callable[..., Any] | None
) -> EntropyGRPOTrainer:
    """The trainer that the recipe asks for: AsyPPO where it names critics."""
    arguments: dict[str, Any] = {
        "model": policy,
        "reward_funcs": run.reward_funcs,
        "args": run.config,
        "train_dataset": train_dataset,
        "eval_dataset": _short_enough(run.eval_dataset, run, policy),
        "quantization_config": get_quantization_config(run.model),
        "peft_config": get_peft_config(run.model),
        "rollout_func": rollout_func,
        "callbacks": [DiagnosisCallback()],
    }
    if not run.script.critics:
        return EntropyGRPOTrainer(**arguments)
    critics: list[Any] = [policy if name == "policy" else name for name in run.script.critics]
    adapter = None
    if run.script.critic_lora_r:
        rank = run.script.critic_lora_r
        adapter = LoraConfig(task_type="TOKEN_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return AsyPPOTrainer(**arguments, critics=critics if len(critics) > 1 else critics[0], critic_peft_config=adapter)


@contextmanager
def _rollout(run: Run) -> Iterator[Callable[..., Any] | None]:
    """The rollout of a task whose completions are episodes; its environments are closed after training."""
    build = run.task.build_rollout if run.task else None
    if build is None:
        yield None
        return
    arguments = run.script.environment_args or {}
    assert not isinstance(arguments, str)  # TrainArguments has read it
    rollout = build(**arguments)
    try:
        yield rollout
    finally:
        rollout.close()


def _names_critics(argv: list[str]) -> bool:
    """Whether the command line, or the recipe that it names, sets `critics`."""
    if any(word.split("=")[0] == "--critics" for word in argv):
        return True
    if "--config" not in argv:
        return False
    with open(argv[argv.index("--config") + 1], encoding="utf-8") as file:
        try:
            recipe = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"The recipe is not valid YAML: {error}") from error
    return isinstance(recipe, dict) and bool(recipe.get("critics"))


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy train`.

    Args:
        argv: The command line without the command's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With a one-line message if the arguments are wrong.
    """
    try:
        run = prepare(argv)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"trl-entropy train: error: {error}") from error
    train(run)
    # The trainer's DDP wrapper must go first: freed after the process group, it can wait for it forever (gloo).
    gc.collect()
    PartialState().destroy_process_group()


def _with_config_apart(argv: list[str]) -> list[str]:
    """The arguments with `--config FILE` for `--config=FILE`, the one form that `TrlParser` reads."""
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in argv:
        path = next(iter(argv[argv.index("--config") + 1 :]), "")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"--config {path!r} is not a file. The recipes in {recipes_dir()}: {', '.join(recipe_names())}."
            )
    return argv


def _reward_funcs(script: TrainArguments, task: Task | None) -> list[Callable[..., Any] | str]:
    chosen: list[Callable[..., Any] | str] = [load_reward_func(name) for name in script.reward_funcs or []]
    if script.reward_model_name_or_path:
        chosen.append(script.reward_model_name_or_path)
    chosen = chosen or list(task.reward_funcs if task else [])
    if not chosen:
        raise ValueError(
            "There is no reward: set reward_funcs, reward_model_name_or_path, or a task that has its own."
        )
    return chosen


def _checkpoint(config: EntropyGRPOConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: the last one (`true`, `auto`), a folder, or none."""
    wanted = str(config.resume_from_checkpoint or "false")
    if wanted.lower() == "false":
        return None
    if wanted.lower() in ("true", "auto"):
        last = last_complete_checkpoint(config.output_dir)
        if last is None and wanted.lower() == "true":
            raise FileNotFoundError(
                f"resume_from_checkpoint={wanted}: output_dir={config.output_dir!r} holds no checkpoint. Correct "
                "output_dir, or set resume_from_checkpoint=auto to start anew where there is none."
            )
        return last
    if not os.path.isdir(wanted):
        raise FileNotFoundError(
            f"resume_from_checkpoint={wanted!r} is not a folder. Set a checkpoint's folder, true for the last one in "
            "output_dir, or auto for the last one if there is one."
        )
    return wanted


def _loader(
    script: TrainArguments, mixture: DatasetMixtureConfig, task: Task | None, seed: int
) -> Callable[[str], Rows]:
    """What loads the rows for `"train"` or `"test"` from the one source that is set."""
    sources = {"task": script.task, "dataset_name": script.dataset_name, "datasets": mixture.datasets}
    chosen = [name for name, value in sources.items() if value]
    if len(chosen) != 1:
        raise ValueError(
            f"{' and '.join(chosen) + ' are' if chosen else 'None is'} set: set exactly one of task, dataset_name and "
            "datasets. A task's own rows are chosen with task_args."
        )
    names = {"train": script.dataset_train_split, "test": script.dataset_test_split}
    if task is not None:
        arguments = _task_arguments(script, task)
        return lambda split: task.load(names[split], **arguments)
    if mixture.datasets:
        splits, test_size = get_dataset(mixture), 0.0
    else:
        splits = load_source(script.dataset_name, config=script.dataset_config, streaming=script.dataset_streaming)
        test_size = mixture.test_split_size or 0.0
    source = script.dataset_name or "datasets"
    return lambda split: select_split(splits, names[split], test_size=test_size, seed=seed, source=source)


def _task_arguments(script: TrainArguments, task: Task) -> dict[str, Any]:
    arguments = script.task_args or {}
    known = [name for name in inspect.signature(task.load).parameters if name != "split"]
    if not isinstance(arguments, dict) or set(arguments) - set(known):
        raise ValueError(
            f"task_args={arguments!r} does not fit task={task.name!r}. Set a mapping with any of: {', '.join(known)}."
        )
    return arguments


def _check_columns(dataset: Rows, reward_funcs: list[Callable[..., Any] | str]) -> None:
    columns = dataset.column_names
    if columns is None:  # a stream whose columns are not known before it is read
        return
    if "prompt" not in columns:
        raise ValueError(
            f"The dataset has no column 'prompt', only {', '.join(columns)}. Rename the column that holds the text or "
            "chat messages to complete."
        )
    check_reward_columns(reward_funcs, columns)


def _check_number_of_rows(dataset: Rows, config: EntropyGRPOConfig) -> None:
    """TRL draws whole rollouts only: with fewer rows than one takes, it would wait for the first one forever."""
    prompts = config.generation_batch_size // config.num_generations
    if isinstance(dataset, Sized) and len(dataset) < prompts:
        raise ValueError(
            f"The {len(dataset)} rows to train on are fewer than the {prompts} prompts of a rollout "
            f"(generation_batch_size={config.generation_batch_size} / num_generations={config.num_generations}). Add "
            "rows, or lower steps_per_generation or per_device_train_batch_size."
        )


def _built_policy(run: Run, build_policy: Callable[[str, int], str]) -> str:
    """The task's own policy, built in `output_dir/policy` by one process while the others wait."""
    config, path = run.config, Path(run.config.output_dir, "policy")
    with config.main_process_first(desc="building the policy"):
        ready = run.checkpoint is not None and (path / "config.json").is_file()
        if config.local_process_index == 0 and not ready:
            build_policy(str(path), config.seed)
    return str(path)


def _write_report(output_dir: str) -> None:
    try:
        print(f"Report: {write_report([output_dir], Path(output_dir, 'report.html'))}")
    except ImportError as error:  # the run is worth having without it
        logger.warning("No report: %s", error)


def _short_enough(dataset: Rows | None, run: Run, policy: str) -> Rows | None:
    limit = run.script.max_prompt_length
    if dataset is None or limit is None:
        return dataset
    tokenizer = AutoTokenizer.from_pretrained(
        policy, revision=run.model.model_revision, trust_remote_code=run.config.trust_remote_code
    )
    return drop_long_prompts(dataset, tokenizer, limit)


if __name__ == "__main__":
    main()
