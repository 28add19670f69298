"""TRL's PPO loop, which is one method there, in methods that a subclass can override.

What happens, and in which order, is TRL's: the random draws, the updates to the last bit, the callbacks, the files and
the names of the metrics.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.experimental.ppo import PPOTrainer
from trl.experimental.ppo.ppo_trainer import INVALID_LOGPROB, forward
from trl.experimental.utils import empty_cache
from trl.trainer.utils import selective_log_softmax

from ..controls import PolicyTokens
from .contact import check_ppo_trainer, check_ppo_type
from .loss import policy_loss, policy_statistics, token_entropies, value_loss
from .rollouts import PPORollouts


@dataclass
class PPOCall:
    """One call of `compute_loss`: the micro-batch and the forward pass of the model being trained.

    Attributes:
        inputs: The rows of the rollout, as `rollouts` names its tensors.
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


class PPOLoop(PPORollouts):
    """`trl.experimental.ppo.PPOTrainer` with places for a subclass to act; by itself it trains as TRL's.

    The averages of the statistics are over the micro-batches there were. With `num_mini_batches` above 1 TRL divides
    them by more, counting micro-batches that do not exist.
    """

    control: Any
    # PPOTrainer does not call the constructor of transformers' Trainer, which sets this from release 5 on
    is_distributed_loading_by_transformers = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_ppo_type(PPOTrainer)
        self._statistics: dict[str, list[Tensor]] = defaultdict(list)
        super().__init__(*args, **kwargs)
        check_ppo_trainer(self)

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
            inputs: Rows of a rollout, as `rollouts` names its tensors.
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
