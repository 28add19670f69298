"""Value models: a transformers backbone with one number per token, the value of the state after it."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.pytorch_utils import Conv1D

from .processes import without_adapter

SEQUENCE_CLASSIFIER = "ForSequenceClassification"
CLASSIFIERS = (SEQUENCE_CLASSIFIER, "ForTokenClassification")
"""How transformers ends the names of its classes with a head of `num_labels` numbers."""


def load_critic(
    model: str | nn.Module,
    *,
    peft_config: Any = None,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    vocab_size: int | None = None,
    **model_kwargs: Any,
) -> nn.Module:
    """Load a critic: `AutoModelForTokenClassification` with one label, without dropout.

    A checkpoint without a value head gets one of zeros. Then all first values are 0, so the first advantages are the
    returns; a random head would add its noise, scaled by the width of the backbone, to every one of them.

    Args:
        model: Model id or folder of any causal backbone, or a token- or sequence-classification model with one label,
            which is changed in place. The head of a sequence-classification model, such as TRL's PPOTrainer takes for
            its value model, is applied to every token, as it is there.
        peft_config: Trains an adapter and the value head instead of all weights.
        dtype: Of the weights; float32 if `None`, and a given model keeps its own.
        gradient_checkpointing: Recompute activations in the backward pass.
        trust_remote_code: As in `from_pretrained`.
        vocab_size: Number of tokens that the policy's tokenizer knows.
        **model_kwargs: Further arguments of `from_pretrained`, such as `attn_implementation`. Weights are loaded from
            safetensors alone, as pickled ones can run code; `use_safetensors=False` loads those.

    Returns:
        The critic, on the CPU if it was loaded here.

    Raises:
        ValueError: If a given model has no value head, or a classifier has several labels, if the embedding is smaller
            than `vocab_size`, if the adapter has dropout, or if there are no weights as safetensors.
    """
    critic: Any
    if isinstance(model, str):
        critic, name = _from_pretrained(model, dtype, trust_remote_code, model_kwargs), model
    else:
        critic, name = _checked_module(model, dtype, trust_remote_code), type(model).__name__
    _check_vocabulary(critic.config, vocab_size, name)
    critic.config.use_cache = False
    _disable_dropout(critic)
    if peft_config is not None:
        critic = _with_adapter(critic, peft_config)
    for head in _value_heads(critic):
        head.register_forward_hook(_value_in_float32)
    if gradient_checkpointing:
        # the second is its name in transformers 4
        enable = getattr(critic, "activation_checkpointing_enable", None) or critic.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return critic


def state_values(critic: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_completion_tokens: int) -> Tensor:
    """Values of the states from before the first completion token to after the last.

    The critic gets the input ids and the attention mask and nothing else, as TRL's forward pass of the policy does:
    position ids are left to the backbone. Columns at the end that no row attends to are not computed.

    Args:
        critic: From `load_critic`.
        input_ids: Prompts padded on the left and completions padded on the right, `(B, P + T)`.
        attention_mask: 1 where there is a token, `(B, P + T)`.
        num_completion_tokens: `T`.

    Returns:
        Float32 `(B, T + 1)`; 0 where there is no token.

    Raises:
        ValueError: If there is no prompt token.
    """
    width = input_ids.shape[1]
    if num_completion_tokens >= width:
        raise ValueError(
            f"input_ids has {width} columns and num_completion_tokens={num_completion_tokens}: the first state needs "
            "at least one prompt token. Use a prompt that is not empty."
        )
    first = width - num_completion_tokens - 1
    used = attention_mask.any(0).nonzero()
    end = max(first, int(used[-1]) if len(used) else 0) + 1
    logits = critic(input_ids=input_ids[:, :end], attention_mask=attention_mask[:, :end]).logits
    found = nn.functional.pad(logits[:, first:].squeeze(-1).float(), (0, width - end))
    return torch.where(attention_mask[:, first:].bool(), found, 0.0)


def check_tokenizer(policy_tokenizer: Any, critic: str | nn.Module, *, trust_remote_code: bool = False) -> None:
    """Refuse a critic that reads other tokens than the policy writes.

    The vocabularies must be equal, special tokens included; the critic's embedding may be larger, as padded ones are.
    Which token ends a sequence or pads it may differ: a base model and its chat model do. A module and a folder
    without a tokenizer are checked for the size of their embedding alone.

    Args:
        policy_tokenizer: The policy's tokenizer or processor.
        critic: Model id, folder or module.
        trust_remote_code: As in `from_pretrained`.

    Raises:
        ValueError: With the first token that differs, or the sizes.
    """
    policy = getattr(policy_tokenizer, "tokenizer", policy_tokenizer).get_vocab()
    size = max(policy.values()) + 1
    if not isinstance(critic, str):
        if not hasattr(critic, "config"):
            raise ValueError(f"The critic {type(critic).__name__} is no model of transformers. Give one, or its path.")
        return _check_vocabulary(critic.config, size, type(critic).__name__)
    if os.path.isdir(critic) and not (Path(critic) / "tokenizer_config.json").exists():
        config = AutoConfig.from_pretrained(critic, trust_remote_code=trust_remote_code)
        return _check_vocabulary(config, size, critic)
    found = AutoTokenizer.from_pretrained(critic, trust_remote_code=trust_remote_code).get_vocab()
    differing = sorted((index, token) for token, index in policy.items() if found.get(token) != index)
    if differing or len(found) != len(policy):
        example = ""
        if differing:
            index, token = differing[0]
            example = f" {token!r} is token {index} of the policy's and {found.get(token)} of the critic's."
        raise ValueError(
            f"The critic {critic!r} has another tokenizer than the policy: {len(policy)} tokens in the policy's and "
            f"{len(found)} in the critic's.{example} Take a critic of the policy's model family."
        )


def _from_pretrained(
    path: str, dtype: torch.dtype | None, trust_remote_code: bool, model_kwargs: dict[str, Any]
) -> nn.Module:
    saved = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    kind = (saved.architectures or [""])[0]
    _check_family(saved, path)
    if kind.endswith(CLASSIFIERS):
        _check_labels(saved, f"{path} ({kind})")
    config = AutoConfig.from_pretrained(path, num_labels=1, trust_remote_code=trust_remote_code)
    for part in (config, config.get_text_config()):
        _disable_config_dropout(part)
    pooled = kind.endswith(SEQUENCE_CLASSIFIER)
    auto = AutoModelForSequenceClassification if pooled else AutoModelForTokenClassification
    arguments = {"dtype": dtype or torch.float32, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    try:
        with _whole_on_every_process():
            critic, info = auto.from_pretrained(
                path, config=config, output_loading_info=True, **{**arguments, **model_kwargs}
            )
    except OSError as error:
        raise ValueError(
            f"The critic {path!r} has no weights as safetensors ({' '.join(str(error).split())}). If you trust their "
            "source, load the model with transformers and write it out again with save_pretrained, which makes them."
        ) from error
    for name, value in critic.named_parameters():
        if name in info["missing_keys"] and not name.startswith(f"{critic.base_model_prefix}."):
            nn.init.zeros_(value)
    return _for_every_token(critic, trust_remote_code) if pooled else critic


def _checked_module(module: nn.Module, dtype: torch.dtype | None, trust_remote_code: bool) -> nn.Module:
    kind = type(without_adapter(module)).__name__
    if not hasattr(module, "config") or kind.endswith("ForCausalLM"):
        raise ValueError(
            f"The critic {kind} has no value head. Load it with AutoModelForTokenClassification and num_labels=1, or "
            "give its path, from which a head is added."
        )
    _check_labels(module.config, kind)
    if kind.endswith(SEQUENCE_CLASSIFIER):
        module = _for_every_token(module, trust_remote_code)
    return module if dtype is None else module.to(dtype)


def _check_family(config: Any, name: str) -> None:
    if type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(
            f"The critic {name} is of model_type={config.model_type!r}, for which transformers has no "
            "token-classification model. Take a critic of another family with the policy's tokenizer."
        )


def _check_labels(config: Any, name: str) -> None:
    if config.num_labels != 1:
        raise ValueError(
            f"The critic {name} has num_labels={config.num_labels} and must be a token- or sequence-classification "
            "model with one: a value is one number. Load it with num_labels=1."
        )


def _for_every_token(classifier: Any, trust_remote_code: bool) -> nn.Module:
    """The token-classification model with the backbone and the head of a sequence-classification model.

    Raises:
        ValueError: If it is in an adapter, or if its head is not one linear layer on the backbone.
    """
    model, heads = without_adapter(classifier), _value_heads(classifier)
    if model is not classifier or len(heads) != 1 or heads[0].out_features != 1:
        raise ValueError(
            f"The critic {type(model).__name__} is a sequence-classification model in an adapter, or its head is not "
            "one linear layer. Merge the adapter, or load it with AutoModelForTokenClassification and num_labels=1."
        )
    _check_family(model.config, type(model).__name__)
    with torch.device("meta"):
        critic = AutoModelForTokenClassification.from_config(model.config, trust_remote_code=trust_remote_code)
    setattr(critic, critic.base_model_prefix, model.base_model)
    critic.config = model.config
    critic.config.architectures = [type(critic).__name__]
    (head,), pooled = _value_heads(critic), heads[0]
    head.weight = pooled.weight
    if head.bias is not None:
        head.bias = nn.Parameter(pooled.weight.new_zeros(1)) if pooled.bias is None else pooled.bias
    return critic


def _check_vocabulary(config: Any, size: int | None, name: str) -> None:
    known = config.get_text_config().vocab_size
    if size is not None and known < size:
        raise ValueError(
            f"The critic {name} has an embedding of vocab_size={known}, and the policy's tokenizer needs {size}. Take "
            "a critic of the policy's model family."
        )


def _disable_config_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    # transformers takes 0.1 for the value head where the config has no such field
    config.classifier_dropout = 0.0


def _disable_dropout(critic: nn.Module) -> None:
    for module in critic.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # what a layer applies as a function
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _value_heads(critic: nn.Module) -> list[nn.Linear]:
    """The linear layers outside the backbone; an adapter's trained copy of the head is one of them."""
    model = without_adapter(critic)
    backbone = set(model.base_model.modules())
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module not in backbone]


def _linear_layers(backbone: Any) -> set[str]:
    """The last parts of the names of a backbone's linear layers, such as `q_proj`."""
    return {
        name.rpartition(".")[2] for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear | Conv1D)
    }


def _value_in_float32(head: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Compute the value in float32 from what the backbone gives.

    In bfloat16 neighbouring numbers differ by up to 0.8 %, which hides small disagreements of the critics.
    """
    with torch.autocast(output.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(args[0].float(), head.weight.float(), bias)


def _with_adapter(critic: nn.Module, peft_config: Any) -> nn.Module:
    from peft import TaskType, get_peft_model

    dropout = getattr(peft_config, "lora_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"critic_peft_config has lora_dropout={dropout}: a critic's values would be noise at training time. Set "
            "lora_dropout=0."
        )
    config = copy.deepcopy(peft_config)
    config.task_type = TaskType.TOKEN_CLS
    if getattr(config, "target_modules", None) == "all-linear":
        # PEFT counts the value head among them, which is trained whole, and cannot do both
        config.target_modules = _linear_layers(critic.base_model)
    return get_peft_model(critic, config, autocast_adapter_dtype=False)


@contextmanager
def _whole_on_every_process() -> Iterator[None]:
    """Load all weights on every process, whatever the policy's sharding tells transformers to do.

    Under DeepSpeed ZeRO-3 it would hand the critic to DeepSpeed, and under FSDP with memory-efficient loading it would
    leave it empty but on the first process.
    """
    name, deepspeed_config = "FSDP_CPU_RAM_EFFICIENT_LOADING", deepspeed_integration._hf_deepspeed_config_weak_ref
    efficient = os.environ.pop(name, None)
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = deepspeed_config
        if efficient is not None:
            os.environ[name] = efficient
