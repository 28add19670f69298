"""TRL's PPO loop, which is one method there, in methods that a subclass can override.

What happens, and in which order, is TRL's: the random draws, the updates to the last bit, the callbacks, the files and
the names of the metrics. A rollout is a dict of tensors with one row per response: `query_responses` `(B, P + T)`, and
per token `(B, T)` the `responses`, `logprobs`, `ref_logprobs`, `state_values`, `advantages`, `returns`, `padding_mask`
(True after the last token) and `padding_mask_p1` (True after the position that follows it).
"""

import gc
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
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

from ..controls import PolicyTokens
from .advantages import gae, kl_estimate, padding_masks, token_rewards
from .loss import policy_loss, policy_statistics, token_entropies, value_loss


@dataclass
class PPOCall:
    """One call of `compute_loss`: the micro-batch and the forward pass of the model being trained.

    Attributes:
        inputs: The rows of the rollout.
        tokens: Log-probs with their graph, and what the rollout says of the tokens.
        entropies: Nats, with a graph where `wants_entropy_gradients`, `(B, T)`.
        state_values: Of the states before the tokens, with their graph, `(B, T)`.
        without_bonus: True for tokens that get no entropy bonus, bool `(B, T)`; `None` for none.
    """

    inputs: dict[str, Tensor]
    tokens: PolicyTokens
    entropies: Tensor
    state_values: Tensor
    without_bonus: Tensor | None = None


class PPOLoop(PPOTrainer):
    """`trl.experimental.ppo.PPOTrainer` with places for a subclass to act; by itself it trains as TRL's.

    The averages of the statistics are over the micro-batches there were. With `num_mini_batches` above 1 TRL divides
    them by more, counting micro-batches that do not exist.
    """

    control: Any
    model: Any
    # PPOTrainer does not call the constructor of transformers' Trainer, which sets this from release 5 on
    is_distributed_loading_by_transformers = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._statistics: dict[str, list[Tensor]] = defaultdict(list)
        super().__init__(*args, **kwargs)

    @property
    def wants_old_entropies(self) -> bool:
        """Whether the rollout shall have `old_entropies`, `(B, T)`."""
        return False

    @property
    def wants_entropy_gradients(self) -> bool:
        """Whether `PPOCall.entropies` shall carry their graph."""
        return False

    def shape(self, call: PPOCall) -> PolicyTokens:
        """The tokens as the policy loss shall see them."""
        return call.tokens

    def value_loss(self, call: PPOCall) -> Tensor | None:
        """The loss of the value model; `None` where there is none."""
        inputs = call.inputs
        loss, clipped = value_loss(
            call.state_values,
            inputs["state_values"],
            inputs["returns"],
            ~inputs["padding_mask_p1"],
            self.args.cliprange_value,
        )
        self.record({"loss/value_avg": loss, "val/clipfrac_avg": clipped})
        return loss

    def added_loss(self, call: PPOCall) -> Tensor | None:
        """A scalar to add to the loss, or `None`."""
        return None

    def extra_metrics(self) -> dict[str, float]:
        """Metrics to log beside TRL's."""
        return {}

    def train(self) -> None:
        """Train for `total_episodes`, as TRL's does."""
        args = self.args
        prompts = self._prompt_batches()
        self.accelerator.print("===training policy===")
        start = time.time()
        self.model.train()
        self._begin_training()
        for update in range(1, args.num_total_batches + 1):
            self.state.episode += args.batch_size
            rollout = self.make_rollout(next(prompts)["input_ids"].to(self.accelerator.device))
            self.train_on(rollout)
            self._log_update(rollout, eps=int(self.state.episode / (time.time() - start)))
            self._end_update()
            del rollout
            empty_cache()
            gc.collect()
            if args.num_sample_generations > 0 and (update - 1) % self.sample_generations_freq == 0:
                self.generate_completions(sampling=True)
                empty_cache()
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        self._save_if_asked()

    def _prompt_batches(self) -> Iterator[Any]:
        while True:
            yield from self.dataloader

    def _begin_training(self) -> None:
        args, state = self.args, self.state
        state.global_step = state.episode = 0
        state.max_steps = args.num_total_batches
        state.num_train_epochs = args.total_episodes / self.train_dataset_len
        state.compute_steps(args, state.max_steps)
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model_wrapped = self.model

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

    def train_on(self, rollout: dict[str, Tensor]) -> None:
        """`num_ppo_epochs` passes over a rollout, in a new random order each.

        An optimizer step is `gradient_accumulation_steps` micro-batches, so each pass makes one, whatever
        `num_mini_batches` is; after the dataset's last batch of prompts every micro-batch makes one. Both are TRL's.
        """
        args = self.args
        for _ in range(args.num_ppo_epochs):
            order = np.random.permutation(args.local_batch_size)
            for start in range(0, args.local_batch_size, args.local_mini_batch_size):
                chosen = order[start : start + args.local_mini_batch_size]
                for first in range(0, args.local_mini_batch_size, args.per_device_train_batch_size):
                    rows = chosen[first : first + args.per_device_train_batch_size]
                    self._micro_step({name: values[rows] for name, values in rollout.items()})
                empty_cache()

    def _micro_step(self, inputs: dict[str, Tensor]) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.compute_loss(self.model, inputs))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Loss of one micro-batch: PPO-clip plus `vf_coef` times the value loss.

        Args:
            model: TRL's wrapper of the policy and the value model, prepared for training.
            inputs: Rows of a rollout, see the module.
            *args: Not used; those of `transformers.Trainer.compute_loss`.
            **kwargs: Not used.

        Returns:
            0-dim, with its graph.
        """
        call = self._forward(model, inputs)
        policy = policy_loss(self.shape(call), self.args.cliprange)
        value, added = self.value_loss(call), self.added_loss(call)
        self.record({"loss/policy_avg": policy})
        self.record(policy_statistics(call.tokens, call.entropies, self.args.cliprange))
        loss = policy if value is None else policy + self.args.vf_coef * value
        return loss if added is None else loss + added

    def _forward(self, model: Any, inputs: dict[str, Tensor]) -> PPOCall:
        output, values = forward(model, inputs["query_responses"], self.processing_class.pad_token_id)
        responses, padding = inputs["responses"], inputs["padding_mask"]
        logits = self._response_logits(output, responses)
        logprobs = torch.masked_fill(selective_log_softmax(logits, responses), padding, INVALID_LOGPROB)
        with torch.set_grad_enabled(self.wants_entropy_gradients and torch.is_grad_enabled()):
            entropies = token_entropies(logits)
        values = values[:, -responses.shape[1] - 1 : -1].squeeze(-1)
        return PPOCall(
            inputs=inputs,
            tokens=PolicyTokens(
                logps=logprobs, old_logps=inputs["logprobs"], advantages=inputs["advantages"], mask=~padding
            ),
            entropies=entropies,
            state_values=torch.masked_fill(values, inputs["padding_mask_p1"], 0),
        )

    def record(self, statistics: dict[str, Tensor]) -> None:
        """Keep 0-dim statistics of a micro-batch, whose mean over the update's micro-batches is logged."""
        for name, value in statistics.items():
            self._statistics[name].append(value.detach())

    def _mean(self, values: Tensor) -> float:
        """The mean over the processes of a tensor's mean."""
        return self.accelerator.gather_for_metrics(values).mean().item()

    @torch.no_grad()
    def _log_update(self, rollout: dict[str, Tensor], eps: int) -> None:
        valid, scores = (~rollout["padding_mask"]).float(), rollout["scores"].mean()
        non_score_reward = rollout["non_score_reward"].sum(1).mean()
        metrics = {
            "eps": eps,
            "objective/kl": self._mean(rollout["kl"].sum(1).mean()),
            "objective/entropy": self._mean((-rollout["logprobs"] * valid).sum(1).mean()),
            "objective/non_score_reward": self._mean(non_score_reward),
            "objective/rlhf_reward": self._mean(non_score_reward + scores),
            "objective/scores": self._mean(scores),
        }
        stacked = {name: torch.stack(values) for name, values in sorted(self._statistics.items())}
        self._statistics.clear()
        metrics |= {name: self._mean(values) for name, values in stacked.items()}
        if "val/ratio" in stacked:
            metrics["val/ratio_var"] = self.accelerator.gather_for_metrics(stacked["val/ratio"]).var().item()
        metrics["val/num_eos_tokens"] = (rollout["responses"] == self.processing_class.eos_token_id).sum().item()
        metrics |= self.extra_metrics()
        metrics |= {"lr": self.lr_scheduler.get_last_lr()[0], "episode": self.state.episode}
        self.state.epoch = self.state.episode / self.train_dataset_len
        self.state.global_step += 1
        self.log(metrics)

    def _end_update(self) -> None:
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        self._save_if_asked()

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy, as TRL's does, but on several processes too."""
        with self._unwrapped():
            super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card, as TRL's does, but on several processes too."""
        with self._unwrapped():
            super().create_model_card(*args, **kwargs)

    def _save_if_asked(self) -> None:
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
