"""The models that `trl-entropy train` is to load: whether they are what it can train with, before it loads them."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_entropy.commands.train_arguments import TrainArguments
from trl_entropy.evaluation.checkpoints import is_adapter, require_safetensors
from trl_entropy.tasks.templates import shown
from trl_entropy.trainers import EntropyGRPOConfig


def load_tokenizer(policy: str, model: ModelConfig, config: EntropyGRPOConfig) -> tuple[Any, bool]:
    """The tokenizer that TRL's trainer uses for the policy, and whether it is part of a processor of images.

    Args:
        policy: Name on the hub, or folder.
        model: Its revision.
        config: The trainer's.

    Raises:
        ValueError: If it cannot be loaded.
    """
    _load(AutoConfig, "model_name_or_path", policy, model, config)  # says sooner that there is no such model
    found = _load(AutoProcessor, "model_name_or_path", policy, model, config)
    return (found, False) if isinstance(found, PreTrainedTokenizerBase) else (found.tokenizer, True)


def check_models(script: TrainArguments, model: ModelConfig, config: EntropyGRPOConfig) -> None:
    """Refuse a policy or critics that are adapters, and critics that are not there or have pickled weights.

    Raises:
        ValueError: Names the field.
        FileNotFoundError: If a critic's folder has no weights.
    """
    critics = [name for name in script.critics or [] if name != "policy"]
    for field, name in [("model_name_or_path", model.model_name_or_path or ""), *(("critics", c) for c in critics)]:
        if name and is_adapter(Path(name)):
            raise ValueError(
                f"{field}={name!r} is an adapter, and training starts from a whole model. Merge it into its base "
                "model (merge_and_unload, then save_pretrained) and name that folder, or go on with the run that "
                "wrote it by resume_from_checkpoint."
            )
    for name in critics:
        _load(AutoConfig, "critics", name, None, config)
        if Path(name).is_dir():
            require_safetensors("critics", Path(name))


def check_reward_model(script: TrainArguments, model: ModelConfig, config: EntropyGRPOConfig, prompt: Any) -> None:
    """Refuse a reward model that is not there, or has no chat template for chat prompts.

    Args:
        script: Names the reward model.
        model: TRL loads the reward model in the policy's revision.
        config: The trainer's.
        prompt: A prompt of the dataset.

    Raises:
        ValueError: Names the field.
    """
    name = script.reward_model_name_or_path
    if not name or is_adapter(Path(name)):  # an adapter's tokenizer is its base model's
        return
    tokenizer = _load(AutoTokenizer, "reward_model_name_or_path", name, model, config)
    if not isinstance(prompt, str) and not tokenizer.chat_template:
        raise ValueError(
            f"reward_model_name_or_path={name!r} has no chat template, and the prompts are chat messages, such as "
            f"{shown(prompt)}. Set `chat_template` of its tokenizer and save that in the model's folder, or name "
            "another model."
        )


def _load(kind: Any, field: str, name: str, model: ModelConfig | None, config: EntropyGRPOConfig) -> Any:
    arguments = {"revision": model.model_revision} if model is not None else {}
    try:
        return kind.from_pretrained(name, trust_remote_code=config.trust_remote_code, **arguments)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{field}={name!r} cannot be loaded ({' '.join(str(error).split())}). Name a model's folder, with its "
            "tokenizer, or a model on the hub."
        ) from error
