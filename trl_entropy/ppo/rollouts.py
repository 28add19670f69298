"""TRL's rollouts of PPO: responses, their scores and the advantages of their tokens, in methods to override.

A rollout is a dict of tensors with one row per response: `query_responses` `(B, P + T)`, and per token `(B, T)` the
`responses`, `logprobs`, `ref_logprobs`, `state_values`, `advantages`, `returns`, `padding_mask` (True after the last
token) and `padding_mask_p1` (True after the position that follows it).
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from trl.experimental.ppo import PPOTrainer
from trl.experimental.ppo.ppo_trainer import (
    INVALID_LOGPROB,
    batch_generation,
    forward,
    masked_whiten,
    truncate_response,
    unwrap_model_for_generation,
)
from trl.experimental.utils import empty_cache, first_true_indices, get_reward
from trl.trainer.utils import selective_log_softmax

from .advantages import gae, kl_estimate, padding_masks, token_rewards
from .loss import token_entropies


class PPORollouts(PPOTrainer):
    """`trl.experimental.ppo.PPOTrainer` with the making of a rollout as methods, operation for operation TRL's."""

    model: Any

    @property
    def wants_old_entropies(self) -> bool:
        """Whether the rollout shall have `old_entropies`, `(B, T)`."""
        return False

    @torch.no_grad()
    def make_rollout(self, queries: Tensor) -> dict[str, Tensor]:
        """Responses to a batch of prompts, scored, with their advantages.

        Args:
            queries: Prompts padded on the left, `(B, P)`.
        """
        size = self.args.local_rollout_forward_batch_size
        query_responses, logits = self.generate(queries)
        parts = []
        for start in range(0, len(queries), size):
            rows = slice(start, start + size)
            parts.append(self._score(query_responses[rows], logits[rows], queries.shape[1]))
            empty_cache()
        rollout = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        del logits, parts
        empty_cache()
        gc.collect()
        self._add_rewards(rollout)
        self.add_advantages(rollout)
        return rollout

    def generate(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts with their responses, `(B, P + T)`, and the logits that each token was drawn from, `(B, T, V)`."""
        kwargs = {
            "max_new_tokens": self.args.response_length,
            "temperature": self.args.temperature + 1e-7,
            "top_k": 0.0,
            "top_p": 1.0,
            "do_sample": True,
        }
        with unwrap_model_for_generation(
            self.model,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            generation_kwargs=kwargs,
        ) as model:
            return batch_generation(
                model.policy,
                queries,
                self.args.local_rollout_forward_batch_size,
                self.processing_class.pad_token_id,
                GenerationConfig(**kwargs),
            )

    def _score(self, query_responses: Tensor, logits: Tensor, context_length: int) -> dict[str, Tensor]:
        """Log-probs, values and score of some of the responses."""
        pad = self.processing_class.pad_token_id
        responses = query_responses[:, context_length:]
        found = {
            "query_responses": query_responses,
            "responses": responses,
            "logprobs": selective_log_softmax(logits, responses),
            "ref_logprobs": self._ref_logprobs(query_responses, responses),
        }
        if self.wants_old_entropies:
            found["old_entropies"] = token_entropies(logits)
        found["postprocessed"] = responses
        if self.stop_token_id is not None:
            found["postprocessed"] = truncate_response(self.stop_token_id, pad, responses)
        found["sequence_lengths"] = first_true_indices(found["postprocessed"] == pad) - 1
        found["state_values"] = self.rollout_values(query_responses, context_length)
        scored = torch.cat((query_responses[:, :context_length], found["postprocessed"]), 1)
        found["scores"] = get_reward(self.reward_model, scored, pad, context_length)[1]
        return found

    def _ref_logprobs(self, query_responses: Tensor, responses: Tensor) -> Tensor:
        if self.ref_model is None:
            with self._unwrapped() as policy, self.null_ref_context():
                output = forward(policy, query_responses, self.processing_class.pad_token_id)
        else:
            output = forward(self.ref_model, query_responses, self.processing_class.pad_token_id)
        return selective_log_softmax(self._response_logits(output, responses), responses)

    def _response_logits(self, output: Any, responses: Tensor) -> Tensor:
        logits = output.logits[:, -responses.shape[1] - 1 : -1]
        logits /= self.args.temperature + 1e-7  # in place: they are the largest tensor there is
        return logits

    def rollout_values(self, query_responses: Tensor, context_length: int) -> Tensor:
        """Values of the states before the response's tokens, `(B, T)`."""
        value_model = self.accelerator.unwrap_model(self.model).value_model
        values, _, _ = get_reward(value_model, query_responses, self.processing_class.pad_token_id, context_length)
        return values[:, context_length - 1 : -1].squeeze(-1)

    def _add_rewards(self, rollout: dict[str, Tensor]) -> None:
        args, scores, lengths = self.args, rollout["scores"], rollout["sequence_lengths"]
        if args.missing_eos_penalty is not None:
            has_eos = torch.any(rollout["postprocessed"] == self.processing_class.eos_token_id, dim=-1)
            scores[~has_eos] -= args.missing_eos_penalty
        padding, padding_p1 = padding_masks(lengths, rollout["responses"].shape[1])
        rollout["padding_mask"], rollout["padding_mask_p1"] = padding, padding_p1
        for name in ("logprobs", "ref_logprobs"):
            rollout[name] = torch.masked_fill(rollout[name], padding, INVALID_LOGPROB)
        rollout["state_values"] = torch.masked_fill(rollout["state_values"], padding_p1, 0)
        rollout["kl"] = kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], args.kl_estimator)
        rollout["non_score_reward"] = -args.kl_coef * rollout["kl"]
        rewards = token_rewards(rollout["non_score_reward"], scores, lengths)
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, mask=~padding_p1, shift_mean=False)
            rewards = torch.masked_fill(rewards, padding_p1, 0)
        rollout["rewards"] = rewards

    def add_advantages(self, rollout: dict[str, Tensor]) -> None:
        """Add `advantages` and `returns` to a rollout that has `rewards` and `state_values`."""
        padding = rollout["padding_mask"]
        advantages = gae(rollout["rewards"], rollout["state_values"], self.args.gamma, self.args.lam)
        rollout["returns"] = advantages + rollout["state_values"]
        rollout["advantages"] = torch.masked_fill(masked_whiten(advantages, ~padding), padding, 0)

    @contextmanager
    def _unwrapped(self) -> Iterator[Any]:
        """The policy, with `self.model` out of DDP's wrapper, inside which TRL does not find it."""
        model = self.model
        if not hasattr(model, "policy"):
            self.model = self.accelerator.unwrap_model(model)
        try:
            yield self.model.policy
        finally:
            self.model = model
