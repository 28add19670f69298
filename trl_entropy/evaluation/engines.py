"""What generates an evaluation's completions: vLLM, or transformers where it is not installed.

Every sample has a random stream of its own, seeded by what it is and not by when it is drawn. So a sample does not
depend on which others were drawn before it or beside it, and an interrupted evaluation ends with the samples that an
uninterrupted one has. What remains is the rounding of a batch of another size or another padding, which can tip a
draw that falls within it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, get_args

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from trl_entropy.evaluation.checkpoints import Checkpoint, load_tokenizer
from trl_entropy.trainers.contact_table import check_vllm


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        temperature: 0 for the most likely token.
        top_p: Draw from the smallest set of tokens whose probabilities reach this sum; 1 for all.
        max_new_tokens: Longest completion.
    """

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """Token ids without the prompt, and whether the limit cut them off before the end of sequence."""

    token_ids: list[int]
    truncated: bool


class Engine(Protocol):
    """Generates a completion for each prompt, with the random stream of its seed."""

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]: ...


class NucleusSampler(LogitsProcessor):
    """Draws each row's next token with a random stream of the row's own, by inverting the cumulative distribution.

    It leaves the drawn token as the only possible one, for a decoding that takes the most likely token. The uniform
    numbers come from Python's generator, so they are the same on every device.

    Args:
        seeds: One per row.
        temperature: Above 0.
        top_p: As in `Sampling`.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self.streams = [Random(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores (B, V) with all but the drawn token of each row at minus infinity."""
        probabilities, tokens = (scores.float() / self.temperature).softmax(-1).sort(stable=True, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        kept = probabilities.masked_fill(before >= self.top_p, 0.0)
        kept[:, 0] = probabilities[:, 0]  # for a top_p of 0
        cumulative = kept.cumsum(-1)
        uniforms = torch.tensor([[stream.random()] for stream in self.streams], device=scores.device)
        drawn = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
        drawn = drawn.minimum((kept > 0).sum(-1, keepdim=True) - 1)  # rounding may reach past the last one kept
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens.gather(-1, drawn), 0.0)


class TransformersEngine:
    """`generate` of transformers, on the GPU if there is one."""

    def __init__(self, checkpoint: Checkpoint, sampling: Sampling, *, dtype: str, trust_remote_code: bool) -> None:
        self.sampling = sampling
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.model, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        self.ends = _end_tokens(model, tokenizer)
        self.pad = next(token for token in (tokenizer.pad_token_id, *self.ends, 0) if token is not None)
        # The model's own has sampling settings, which `generate` would fall back on.
        model.generation_config = GenerationConfig(eos_token_id=self.ends or None, pad_token_id=self.pad)
        if checkpoint.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, checkpoint.adapter)
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """As `Engine`. Prompts are padded on the left to the longest."""
        longest = max(map(len, prompts))
        rows = [[self.pad] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        sampler = NucleusSampler(seeds, self.sampling.temperature, self.sampling.top_p)
        output = self.model.generate(
            input_ids=torch.tensor(rows, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([sampler] if self.sampling.temperature > 0 else []),
        )
        return [self._completion(row) for row in output[:, longest:].tolist()]

    def _completion(self, tokens: list[int]) -> Completion:
        for position, token in enumerate(tokens):
            if token in self.ends:
                return Completion(tokens[: position + 1], truncated=False)
        return Completion(tokens, truncated=True)


class VLLMEngine:
    """vLLM in this process, or on several GPUs with `tensor_parallel_size`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sampling: Sampling,
        *,
        dtype: str,
        trust_remote_code: bool,
        max_model_len: int,
        tensor_parallel_size: int,
    ) -> None:
        check_vllm()
        from vllm import LLM
        from vllm.config.lora import MaxLoRARanks
        from vllm.lora.request import LoRARequest

        self.sampling = sampling
        self.adapter = LoRARequest("adapter", 1, checkpoint.adapter) if checkpoint.adapter else None
        # an adapter needs the next of the ranks that vLLM has kernels for
        fitting = (rank for rank in sorted(get_args(MaxLoRARanks)) if rank >= max(checkpoint.lora_rank, 1))
        rank = next(fitting, checkpoint.lora_rank)
        self.llm = LLM(
            model=checkpoint.model,
            tokenizer=checkpoint.tokenizer_path,
            load_format="safetensors",
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            enable_lora=self.adapter is not None,
            max_lora_rank=rank,
        )

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """As `Engine`."""
        from vllm import SamplingParams

        settings = self.sampling
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                SamplingParams(
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    max_tokens=settings.max_new_tokens,
                    seed=seed,
                )
                for seed in seeds
            ],
            use_tqdm=False,
            lora_request=self.adapter,
        )
        completions = [output.outputs[0] for output in outputs]
        return [Completion(list(c.token_ids), truncated=c.finish_reason == "length") for c in completions]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a reply: a chat model's generation config may have others than its tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in (*ends, tokenizer.eos_token_id) if token is not None})
