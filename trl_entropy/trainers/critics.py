"""The critics of a trainer: which models they are, their ensemble, and what their disagreement decides.

AsyPPO, arXiv 2510.01656. Every trainer with critics has the fields of `CriticFields`, here called its `settings`.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..critics import CriticEnsemble, highest_fraction, load_critic, lowest_fraction


def critic_sources(critics: Any, num_critics: int) -> list[str | nn.Module]:
    """One model id, folder or module per critic; a module that serves for several is copied."""
    if critics is None:
        raise ValueError("critics is missing: name a small model with the policy's tokenizer, or give a module.")
    if isinstance(critics, list | tuple):
        if len(critics) != num_critics:
            raise ValueError(
                f"critics lists {len(critics)} and num_critics={num_critics}. Give one per critic, or a single one."
            )
        return list(critics)
    if isinstance(critics, str):
        return [critics] * num_critics
    return [critics, *(copy.deepcopy(critics) for _ in range(num_critics - 1))]


def load_ensemble(
    sources: Sequence[str | nn.Module],
    settings: Any,
    args: Any,
    device: torch.device,
    *,
    peft_config: Any = None,
    trust_remote_code: bool = False,
) -> CriticEnsemble:
    """The ensemble that a configuration describes, on the device.

    Args:
        sources: From `critic_sources`.
        settings: The critics' fields.
        args: TRL's: `max_grad_norm`, `seed` and `bf16` count for the critics too.
        device: Where the critics live.
        peft_config: Trains them as adapters.
        trust_remote_code: As in `from_pretrained`.

    Raises:
        ValueError: As `load_critic`, or if two critics share weights.
    """
    critics = [
        load_critic(
            source,
            peft_config=peft_config,
            dtype=getattr(torch, settings.critic_dtype),
            gradient_checkpointing=settings.critic_gradient_checkpointing,
            trust_remote_code=trust_remote_code,
        )
        for source in sources
    ]
    return CriticEnsemble(
        critics,
        learning_rate=settings.critic_learning_rate,
        max_grad_norm=args.max_grad_norm,
        device=device,
        seed=args.seed,
        autocast_dtype=torch.bfloat16 if args.bf16 else None,
    )


def critic_batch_size(settings: Any, args: Any) -> int:
    """Completions per process in a critic's mini-batch: the critics' own number, or else the policy's."""
    return settings.critic_per_device_train_batch_size or args.per_device_train_batch_size


def disagreement(values: Tensor, mask: Tensor, settings: Any, gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The columns of a rollout that say how far the critics are apart, and what follows from it.

    Args:
        values: Every critic's, of the states before the tokens, `(M, B, T)`.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        settings: The critics' fields.
        gather: Concatenates a 1-D tensor, of one length on all processes, in the order of their ranks.

    Returns:
        `value_std`, the critics' standard deviation, `(B, T)`; `advantage_masked` and `entropy_filtered`, True for the
        tokens with the lowest and with the highest of it, bool `(B, T)`.
    """
    deviation = values.std(0, unbiased=False)
    return {
        "value_std": deviation,
        "advantage_masked": lowest_fraction(deviation, mask, settings.advantage_mask_fraction, gather),
        "entropy_filtered": highest_fraction(deviation, mask, settings.entropy_filter_fraction, gather),
    }


def warn_if_nothing_to_filter(settings: Any, has_bonus: bool, stacklevel: int) -> None:
    """Warn where the entropy filter is on and there is no entropy bonus; `stacklevel` as in `warnings.warn`."""
    if settings.entropy_filter_fraction and not has_bonus:
        warnings.warn(
            f"entropy_filter_fraction={settings.entropy_filter_fraction} does nothing: there is no entropy bonus to "
            "filter. Set entropy_coef or epo_coef, or entropy_filter_fraction=0.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
