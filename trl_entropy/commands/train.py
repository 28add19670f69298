"""`trl-entropy train --config recipes/X.yaml [--field value ...]`: RL training from a recipe.

The fields are those of `TrainArguments`, `EntropyGRPOConfig`, `trl.ModelConfig` and `trl.DatasetMixtureConfig`, in the
YAML file or on the command line, which overrides the file. `accelerate launch -m trl_entropy.commands.train` takes the
same arguments.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig
from transformers import set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_entropy.commands.errors import one_line_if_full, one_line_if_wrong
from trl_entropy.commands.train_arguments import TrainArguments, parse
from trl_entropy.commands.train_models import check_models, check_reward_model, load_tokenizer
from trl_entropy.commands.train_rows import check_number_of_rows, check_prompts, check_rewards, row_loader
from trl_entropy.pretrained import resolve_model
from trl_entropy.tasks import Task, get_task
from trl_entropy.tasks.rewards import load_reward_func, require_math_verify
from trl_entropy.tasks.sources import Rows, drop_long_prompts
from trl_entropy.telemetry.diagnosis import DiagnosisCallback
from trl_entropy.telemetry.report import write_report
from trl_entropy.trainers import AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.trainers.contact_table import check_installed
from trl_entropy.trainers.resume import last_complete_checkpoint
from trl_entropy.vllm_on_cpu import require_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
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


def prepare(argv: list[str] | None = None) -> TrainingPlan:
    """Parse and check everything that can be checked before a model is loaded, and load the rows.

    Raises:
        ValueError: As `parse`, or if the task, dataset, rewards, model or checkpoint are missing or do not fit.
        FileNotFoundError: If the recipe, a local dataset or the checkpoint does not exist.
        ImportError: If a reward function or vLLM cannot be imported, or as `resolve_model`.
    """
    check_installed()
    script, config, model, mixture = parse(argv)
    task = get_task(script.task) if script.task else None
    if not model.model_name_or_path and (task is None or task.build_policy is None):
        raise ValueError("model_name_or_path is missing: name the model to train, on the hub or in a folder.")
    if config.use_vllm and find_spec("vllm") is None:
        raise ImportError("use_vllm=True needs vLLM: pip install 'trl_entropy[vllm]', or set use_vllm=False.")
    if config.use_vllm and config.vllm_mode == "colocate":
        require_device()
    reward_funcs = _reward_funcs(script, task)
    checkpoint = _checkpoint(config)
    load = row_loader(script, mixture, task, config.seed)
    train_dataset = load("train")
    eval_dataset = load("test") if config.eval_strategy != "no" else None
    for dataset in (train_dataset, eval_dataset):
        if dataset is not None:
            check_rewards(dataset, reward_funcs, config, task)
    require_math_verify(reward_funcs)
    check_number_of_rows(train_dataset, config)
    if model.model_name_or_path:
        model.model_name_or_path = resolve_model(model.model_name_or_path)
    script.critics = script.critics and [resolve_model(name) for name in script.critics]
    check_models(script, model, config)
    check_reward_model(script, model, config, next(iter(train_dataset))["prompt"])
    plan = TrainingPlan(script, config, model, task, train_dataset, eval_dataset, reward_funcs, checkpoint)
    return _with_checked_prompts(plan, model.model_name_or_path) if model.model_name_or_path else plan


def train(plan: TrainingPlan) -> None:
    """Train, and save the model, its card, `trainer_state.json` and, with the extra `plots`, `report.html`."""
    config = plan.config
    with open_trainer(plan) as trainer:
        trainer.train(resume_from_checkpoint=plan.checkpoint)
    trainer.save_model(config.output_dir)
    trainer.save_state()
    trainer.create_model_card(dataset_name=plan.script.dataset_name)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=plan.script.dataset_name)
    if trainer.is_world_process_zero():
        _write_report(config.output_dir)


@contextmanager
def open_trainer(plan: TrainingPlan, trainer_class: Callable[..., Any] | None = None) -> Iterator[Any]:
    """The trainer of a run, with its model loaded; the environments of its task are closed on leaving.

    Args:
        plan: From `prepare`.
        trainer_class: Takes the arguments of `EntropyGRPOTrainer`; `None` for the one that the recipe asks for.
    """
    config = plan.config
    policy = plan.model.model_name_or_path
    if not policy:
        assert plan.task is not None
        assert plan.task.build_policy is not None
        policy = _built_policy(plan, plan.task.build_policy)
        plan = _with_checked_prompts(plan, policy)
    config.model_init_kwargs = {
        "revision": plan.model.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": plan.model.attn_implementation,
        "dtype": plan.model.dtype,
        **(config.model_init_kwargs or {}),
    }
    set_seed(config.seed)  # TRL 1.12 makes LoRA's weights before it seeds
    with _rollout(plan) as rollout_func:
        yield _trainer(plan, policy, rollout_func, trainer_class)


def _trainer(
    plan: TrainingPlan,
    policy: str,
    rollout_func: Callable[..., Any] | None,
    trainer_class: Callable[..., Any] | None,
) -> EntropyGRPOTrainer:
    """The trainer that is given, or that the recipe asks for: AsyPPO where it names critics."""
    arguments: dict[str, Any] = {
        "model": policy,
        "reward_funcs": plan.reward_funcs,
        "args": plan.config,
        "train_dataset": plan.train_dataset,
        "eval_dataset": plan.eval_dataset,
        "quantization_config": get_quantization_config(plan.model),
        "peft_config": get_peft_config(plan.model),
        "rollout_func": rollout_func,
        "callbacks": [DiagnosisCallback()],
    }
    if trainer_class is not None:
        return trainer_class(**arguments)
    if not plan.script.critics:
        return EntropyGRPOTrainer(**arguments)
    critics: list[Any] = [policy if name == "policy" else name for name in plan.script.critics]
    adapter = None
    if plan.script.critic_lora_r:
        rank = plan.script.critic_lora_r
        adapter = LoraConfig(task_type="TOKEN_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return AsyPPOTrainer(**arguments, critics=critics if len(critics) > 1 else critics[0], critic_peft_config=adapter)


@contextmanager
def _rollout(plan: TrainingPlan) -> Iterator[Callable[..., Any] | None]:
    """The rollout of a task whose completions are episodes; its environments are closed after training."""
    build = plan.task.build_rollout if plan.task else None
    if build is None:
        yield None
        return
    arguments = plan.script.environment_args or {}
    assert not isinstance(arguments, str)  # TrainArguments has read it
    rollout = build(**arguments)
    try:
        yield rollout
    finally:
        rollout.close()


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy train`.

    Args:
        argv: The command line without the command's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With a one-line message if the arguments are wrong.
    """
    with one_line_if_full("train", "and go on with resume_from_checkpoint=auto: the last checkpoint is whole."):
        with one_line_if_wrong("train"):
            plan = prepare(argv)
        train(plan)
    leave_processes()


def leave_processes() -> None:
    """Leave the process group, once nothing holds the trainer any more."""
    # The trainer's DDP wrapper must go first: freed after the process group, it can wait for it forever (gloo).
    gc.collect()
    PartialState().destroy_process_group()


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


def _built_policy(plan: TrainingPlan, build_policy: Callable[[str, int], str]) -> str:
    """The task's own policy, built in `output_dir/policy` by one process while the others wait."""
    config, path = plan.config, Path(plan.config.output_dir, "policy")
    with config.main_process_first(desc="building the policy"):
        ready = plan.checkpoint is not None and (path / "config.json").is_file()
        if config.local_process_index == 0 and not ready:
            build_policy(str(path), config.seed)
    return str(path)


def _write_report(output_dir: str) -> None:
    try:
        print(f"Report: {write_report([output_dir], Path(output_dir, 'report.html'))}")
    except ImportError as error:  # the run is worth having without it
        logger.warning("No report: %s", error)


def _with_checked_prompts(plan: TrainingPlan, policy: str) -> TrainingPlan:
    """The run with those of its rows whose prompts are short enough, now that there is a tokenizer to measure them."""
    tokenizer, sees_images = load_tokenizer(policy, plan.model, plan.config)
    limit, arguments = plan.script.max_prompt_length, plan.config.chat_template_kwargs
    datasets = {"train_dataset": plan.train_dataset, "eval_dataset": plan.eval_dataset}
    for name, dataset in datasets.items():
        if dataset is not None and not sees_images:
            check_prompts(dataset, tokenizer, plan.config, plan.task)
        if dataset is not None and limit is not None:
            datasets[name] = drop_long_prompts(dataset, tokenizer, limit, arguments)
    check_number_of_rows(datasets["train_dataset"], plan.config)
    return replace(plan, **datasets)


if __name__ == "__main__":
    main()
