"""vLLM in the trainer's process, for the responses of TRL's PPO loop."""

from typing import Any

import torch
from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import pad

from ..vllm_on_cpu import trainable_engines
from .config import PPOControls


class VLLMEngine:
    """Samples responses from the policy's current weights; TRL's `VLLMGeneration` in colocate mode.

    Args:
        policy: The policy, or its adapter; vLLM starts from the model id or folder that it was loaded from.
        accelerator: The trainer's.
        tokenizer: The trainer's, which has a padding token.
        args: TRL's settings.
        controls: The `vllm_*` settings.
        stop_token_id: Token that ends a response; `None` for responses of full length.

    Raises:
        ImportError: If vLLM is not installed.
    """

    def __init__(
        self,
        policy: Any,
        accelerator: Any,
        tokenizer: Any,
        args: Any,
        controls: PPOControls,
        stop_token_id: int | None,
    ) -> None:
        self._pad_token_id = tokenizer.pad_token_id
        stop_token_ids = [] if stop_token_id is None else [stop_token_id]
        with trainable_engines():
            self._vllm = VLLMGeneration(
                model=policy,
                accelerator=accelerator,
                processing_class=tokenizer,
                mode="colocate",
                gpu_memory_utilization=controls.vllm_gpu_memory_utilization,
                max_model_length=controls.vllm_max_model_length,
                max_num_seqs=args.local_batch_size,
                enable_sleep_mode=controls.vllm_enable_sleep_mode,
                temperature=args.temperature + 1e-7,
                max_completion_length=args.response_length,
                # the stop token alone ends a response, as in TRL's generation
                generation_kwargs={"ignore_eos": True, "stop_token_ids": stop_token_ids},
            )

    def generate(self, queries: Tensor) -> Tensor:
        """Prompts padded on the left, `(B, P)`, with their responses padded on the right, `(B, P + T)`."""
        self._vllm.sync_weights()
        prompts = [row[row != self._pad_token_id].tolist() for row in queries]
        _, responses, *_ = self._vllm.generate(prompts, None, 1)
        columns = [torch.tensor(response, device=queries.device) for response in responses]
        return torch.cat((queries, pad(columns, padding_value=self._pad_token_id, padding_side="right")), dim=1)
