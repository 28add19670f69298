"""PPO with entropy control on TRL's PPOTrainer."""

import os
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.experimental.ppo.ppo_trainer import forward, masked_mean, masked_whiten

from ..controls import ActiveControls, Context, MicroBatch, PolicyTokens, Rollout, micro_batch
from ..critics import CriticEnsemble, explained_variance
from ..telemetry.metrics import TokenMeans
from ..trainers.critics import critic_batch_size, disagreement, load_ensemble, warn_if_nothing_to_filter
from ..trainers.dropout import warn_of_dropout
from ..vllm_on_cpu import require_device
from .advantages import gae
from .config import CRITIC_FIELDS, PPOControls
from .critics import NoValueModel, critic_sources
from .loop import PPOCall, PPOLoop


class EntropyPPOTrainer(PPOLoop):
    """`trl.experimental.ppo.PPOTrainer` of TRL 1.12 with ERC, CE-GPPO, EPO, an entropy bonus and AsyPPO's critics.

    Arguments, dataset (tokenized `input_ids`), callbacks, files and metrics are TRL's. With no control and a
    `value_model` its updates equal TRL's bit for bit; with a plain `PPOConfig` every control is off. The controls act
    on each token in this order: PPO-clip decides on the raw ratio which tokens it would drop, CE-GPPO re-weights
    those, ERC gates every token, AsyPPO's mask comes last.

    TRL takes the rollout's log-probs from generation, which knows no mixed precision. With ERC, EPO or vLLM they come,
    with the entropies, from a forward pass as in training, so that importance and entropy ratios start at 1.

    Args:
        args (`PPOConfig` or [`EntropyPPOConfig`]): The configuration.
        value_model: As in TRL; leave it out where `critics` are given.
        critics (`str`, `nn.Module` or a list of them, *optional*): AsyPPO's ensemble (arXiv 2510.01656) in place of
            the value model: model id, folder or module of a critic (TRL's value model is one), used `num_critics`
            times, or one per critic. They have their own optimizers, and `critics/` in every checkpoint. A prompt has
            one response here, so each critic trains on its random share of the batch.
        critic_peft_config (`peft.PeftConfig`, *optional*): Trains the critics as adapters.
        processing_class, model, ref_model, reward_model, train_dataset, data_collator, eval_dataset, optimizers,
            callbacks, peft_config: As in TRL.

    Raises:
        ValueError: If not exactly one of `value_model` and `critics` is given, if `critics` does not match
            `num_critics` or has another tokenizer than the policy, or if a field of the critics is set without any.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "ppo", "trl-entropy"]

    def __init__(
        self,
        args: Any,
        processing_class: Any,
        model: Any,
        ref_model: Any,
        reward_model: Any,
        train_dataset: Any,
        value_model: Any = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: Any = (None, None),
        callbacks: Any = None,
        peft_config: Any = None,
        *,
        critics: str | nn.Module | list[str | nn.Module] | None = None,
        critic_peft_config: Any = None,
    ) -> None:
        self.controls = args if isinstance(args, PPOControls) else PPOControls()
        _check_models(self.controls, value_model, critics)
        self._token_means = TokenMeans()
        self.active = ActiveControls.of(self.controls, critics=critics is not None)
        self._critic_metrics: dict[str, float] = {}
        self.critics: CriticEnsemble | None = None
        super().__init__(
            args,
            processing_class,
            model,
            ref_model,
            reward_model,
            train_dataset,
            value_model if critics is None else NoValueModel(),
            data_collator=data_collator,
            eval_dataset=eval_dataset,
            optimizers=optimizers,
            callbacks=callbacks,
            peft_config=peft_config,
        )
        if critics is not None:
            sources = critic_sources(critics, self.controls.num_critics, processing_class, self.args.batch_size)
            self.critics = load_ensemble(
                sources, self.controls, self.args, self.accelerator.device, peft_config=critic_peft_config
            )
        if self.controls.ratio_controls:
            warn_of_dropout(self.policy_model, self.controls.ratio_controls)
        self.engine = self._start_vllm() if self.controls.use_vllm else None

    def _start_vllm(self) -> Any:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("use_vllm=True cannot be used with DeepSpeed or FSDP. Set use_vllm=False.")
        from .vllm import VLLMEngine

        require_device()
        return VLLMEngine(
            self.policy_model, self.accelerator, self.processing_class, self.args, self.controls, self.stop_token_id
        )

    def generate(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        if self.engine is not None:
            query_responses = self.engine.generate(queries)
        else:
            query_responses, logits = super().generate(queries)
            if not self.wants_old_entropies:
                return query_responses, logits
            del logits
        return query_responses, self._logits(query_responses, queries.shape[1])

    def _logits(self, query_responses: Tensor, context_length: int) -> Tensor:
        """The policy's logits of the responses as training computes them, over the temperature, `(B, T, V)`."""
        found = []
        for rows in query_responses.split(self.args.local_rollout_forward_batch_size):
            output, _ = forward(self.model, rows, self.processing_class.pad_token_id)
            found.append(self._response_logits(output, rows[:, context_length:]))
        return torch.cat(found)

    @property
    def hooks_active(self) -> bool:
        """Whether a control is on or critics take the value model's place."""
        return self.controls.any_control_enabled or self.critics is not None

    @property
    def wants_old_entropies(self) -> bool:
        return self.active.need("old_entropies")

    @property
    def wants_entropy_gradients(self) -> bool:
        return self.active.need("entropy_gradients") or self.controls.entropy_bonus_enabled

    def rollout_values(self, query_responses: Tensor, context_length: int) -> Tensor:
        if self.critics is None:
            return super().rollout_values(query_responses, context_length)
        # those of the critics are computed for the whole rollout, in `add_advantages`
        return torch.zeros_like(query_responses[:, context_length:], dtype=torch.float32)

    def add_advantages(self, rollout: dict[str, Tensor]) -> None:
        if self.critics is None:
            super().add_advantages(rollout)
        else:
            self._add_advantages_of(self.critics, rollout)
        if self.active.controls:
            rewards, mask = rollout["rewards"].sum(1), ~rollout["padding_mask"]
            read = Rollout(mask, rewards, rollout["advantages"], rollout["logprobs"], rollout.get("old_entropies"))
            columns, metrics = self.active.on_rollout(read, self._context())
            rollout |= {name: column.expand(len(mask), *column.shape[1:]) for name, column in columns.items()}
            self._token_means.add(metrics)

    def _add_advantages_of(self, critics: CriticEnsemble, rollout: dict[str, Tensor]) -> None:
        args, controls, valid = self.args, self.controls, ~rollout["padding_mask"]
        learnt = ~rollout["padding_mask_p1"]
        values = critics.state_values(
            *self._critic_inputs(rollout), valid.shape[1], critic_batch_size(self.controls, self.args)
        )
        values = torch.where(learnt, values[:, :, :-1], 0.0)
        mean = values.mean(0)
        advantages = gae(rollout["rewards"], mean, args.gamma, args.lam)
        targets = gae(rollout["rewards"], mean, args.gamma, controls.critic_gae_lambda) + mean
        rollout["state_values"], rollout["returns"] = mean, targets
        rollout["advantages"] = torch.where(valid, masked_whiten(advantages, valid), 0.0)
        rollout |= disagreement(values, valid, controls, self.accelerator.gather)

    def _critic_inputs(self, rollout: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Input ids and attention mask; the padding token need not be in a critic's vocabulary."""
        attention = rollout["query_responses"] != self.processing_class.pad_token_id
        return rollout["query_responses"].masked_fill(~attention, 0), attention.long()

    def train_on(self, rollout: dict[str, Tensor]) -> None:
        super().train_on(rollout)
        if self.critics is not None:
            self._train_critics(self.critics, rollout)
        self._token_means.close_window(self.accelerator.reduce)

    def _train_critics(self, critics: CriticEnsemble, rollout: dict[str, Tensor]) -> None:
        learnt, share = ~rollout["padding_mask_p1"], len(rollout["responses"])
        start = self.accelerator.process_index * share
        variance = explained_variance(rollout["state_values"], rollout["returns"], learnt, self._sum_over_processes)
        found = critics.train_on(
            *self._critic_inputs(rollout),
            learnt,
            rollout["returns"],
            critic_of_row=critics.assign([self.args.batch_size]),
            rows=torch.arange(start, start + share),
            epochs=self.controls.critic_num_epochs,
            batch_size=critic_batch_size(self.controls, self.args),
        )
        losses = [value for name, value in found.items() if name.endswith("/loss")]
        self._critic_metrics = {f"asyppo/{name}": value for name, value in found.items()} | {
            "asyppo/explained_variance": variance,
            "loss/value_avg": sum(losses) / max(len(losses), 1),
        }

    def _sum_over_processes(self, totals: Tensor) -> Tensor:
        return self.accelerator.reduce(self.accelerator.pad_across_processes(totals, dim=0))

    def value_loss(self, call: PPOCall) -> Tensor | None:
        return super().value_loss(call) if self.critics is None else None

    def _context(self, mask: Tensor | None = None) -> Context:
        """What the controls may ask of this trainer; means over completions are those of a micro-batch's `mask`."""
        count = torch.ones(()) if mask is None else mask.any(1).sum().clamp(min=1)
        return Context(
            self.controls,
            eps_low=self.args.cliprange,
            eps_high=self.args.cliprange,
            step=self.state.global_step,
            total_steps=self.args.num_total_batches,
            sum_over_processes=self._sum_over_processes,
            gather=self.accelerator.gather,
            per_window=lambda name, needed_by: count,
        )

    def _micro_batch(self, call: PPOCall) -> MicroBatch:
        return micro_batch(call.tokens, call.entropies, call.inputs.get("old_entropies"), "token", call.inputs)

    def shape(self, call: PPOCall) -> PolicyTokens:
        if not self.hooks_active:
            return call.tokens
        tokens, metrics = self.active.shape(self._micro_batch(call), self._context())
        call.without_bonus = tokens.without_bonus
        self._token_means.add(metrics)
        return replace(tokens, logps=call.tokens.logps)

    def added_loss(self, call: PPOCall) -> Tensor | None:
        if not self.hooks_active:
            return None
        entropies, mask = call.entropies, call.tokens.mask
        if call.without_bonus is not None:
            entropies = torch.where(call.without_bonus, entropies.detach(), entropies)
        batch = replace(self._micro_batch(call), bonus_entropies=entropies)
        added, metrics = self.active.loss(batch, self._context(mask))
        self._token_means.add(metrics)
        if self.controls.entropy_bonus_enabled:
            bonus = -self.controls.entropy_coef * masked_mean(entropies, mask)
            added = bonus if added is None else bonus + added
        return added

    def extra_metrics(self) -> dict[str, float]:
        return self._token_means.pop() | self._critic_metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.critics is not None:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.critics.save(os.path.join(self._get_output_dir(trial=trial), name, "critics"))
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.critics is not None and not _internal_call:
            self.critics.save(os.path.join(output_dir or self.args.output_dir, "critics"))


def _check_models(controls: PPOControls, value_model: Any, critics: Any) -> None:
    if (value_model is None) == (critics is None):
        given = "neither" if critics is None else "both"
        raise ValueError(
            f"value_model and critics: {given} given. Give value_model for TRL's single value model, or critics for "
            "AsyPPO's ensemble."
        )
    if critics is None:
        for field in fields(PPOControls):
            value = getattr(controls, field.name)
            if field.name in CRITIC_FIELDS and value != field.default:
                raise ValueError(
                    f"{field.name}={value} is for an ensemble of critics, and there is a value_model. Give critics "
                    f"instead of it, or leave {field.name} out."
                )
    else:
        warn_if_nothing_to_filter(controls, controls.entropy_bonus_enabled or controls.epo_enabled, stacklevel=3)
