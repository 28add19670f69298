"""AsyPPO's critics in the place of TRL's value model (arXiv 2510.01656)."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..critics import check_tokenizer
from ..trainers import critics as of_trainers


class NoValueModel(nn.Module):
    """Stands where TRL's wrapper of policy and value model wants the latter: no weights, and every value is 0."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _NoBackbone()

    def score(self, hidden: Tensor) -> Tensor:
        """Zeros, `(B, P + T, 1)`."""
        return hidden


class _NoBackbone(nn.Module):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=(torch.zeros(*input_ids.shape, 1, device=input_ids.device),))


def critic_sources(critics: Any, num_critics: int, tokenizer: Any, batch_size: int) -> list[str | nn.Module]:
    """One model id, folder or module per critic, each checked against the policy's tokenizer.

    A padding token that the policy's tokenizer alone has, as TRL's PPO example adds one, is no difference: no model
    ever reads it.

    Raises:
        ValueError: If there are not `num_critics`, if one reads other tokens than the policy writes, or if the batch
            has too few completions for all to learn from.
    """
    if batch_size < num_critics:
        raise ValueError(
            f"num_critics={num_critics} needs as many responses per rollout, and the batch has {batch_size}. Raise "
            f"per_device_train_batch_size or gradient_accumulation_steps, or set num_critics={batch_size}."
        )
    sources = of_trainers.critic_sources(critics, num_critics)
    for source in sources:
        try:
            check_tokenizer(tokenizer, source)
        except ValueError:
            vocabulary = {
                token: index for token, index in tokenizer.get_vocab().items() if token != tokenizer.pad_token
            }
            check_tokenizer(SimpleNamespace(get_vocab=lambda known=vocabulary: known), source)
    return sources
