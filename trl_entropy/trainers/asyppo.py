"""AsyPPO: PPO with an ensemble of small critics, on GRPO's rollout engine."""

import os
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..controls import TokenMean
from ..critics import (
    Episodes,
    check_tokenizer,
    critic_targets,
    explained_variance,
    generalized_advantages,
    highest_fraction,
    whiten,
)
from .asyppo_config import AsyPPOConfig
from .critics import critic_batch_size, critic_sources, disagreement, load_ensemble
from .grpo import EntropyGRPOTrainer
from .loss_call import TOKEN_LEVEL, loss_mask
from .token_level import TokenValues, summed_rewards

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


class AsyPPOTrainer(EntropyGRPOTrainer):
    """Actor-critic PPO with mini-critics (AsyPPO, arXiv 2510.01656), with every control of `EntropyGRPOTrainer`.

    Advantages come from GAE on the mean of the critics' values instead of from the group's rewards. The tokens on
    which the critics agree most get advantage 0, those on which they disagree most get no entropy bonus, and each
    critic trains on its own share of every prompt's completions. The critics are not part of the model: they have
    their own optimizers, and `critics/` in every checkpoint.

    Args:
        model: As `trl.GRPOTrainer`.
        reward_funcs: As `trl.GRPOTrainer`.
        args ([`AsyPPOConfig`]): The configuration.
        critics (`str`, `nn.Module` or a list of them): Model id, folder or module of a critic, used `num_critics`
            times, or one per critic (sizes may differ). Any backbone of the policy's tokenizer serves; without a value
            head it gets a new one.
        critic_peft_config (`peft.PeftConfig`, *optional*): Trains the critics as adapters.
        *others: As `trl.GRPOTrainer`.

    Raises:
        TypeError: If `args` is not an `AsyPPOConfig`.
        ValueError: If `critics` is missing, does not match `num_critics`, or has another tokenizer than the policy.
    """

    _tag_names: ClassVar[list[str]] = [*EntropyGRPOTrainer._tag_names, "asyppo"]
    config_class: ClassVar[type] = AsyPPOConfig
    has_critics: ClassVar[bool] = True

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: AsyPPOConfig | None = None,
        *others: Any,
        critics: str | nn.Module | list[str | nn.Module] | None = None,
        critic_peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, AsyPPOConfig):
            raise TypeError(f"args={type(args).__name__} must be an AsyPPOConfig, which has the critics' settings.")
        sources = critic_sources(critics, args.num_critics)
        super().__init__(model, reward_funcs, args, *others, **kwargs)
        for source in sources:
            check_tokenizer(self._tokenizer, source, trust_remote_code=args.trust_remote_code)
        self._warmup_done = args.critic_warmup_rollouts == 0
        self._warming_up = False
        self._prompt_generator = torch.Generator().manual_seed(args.seed)
        self.critics = load_ensemble(
            sources,
            args,
            args,
            self.accelerator.device,
            peft_config=critic_peft_config,
            trust_remote_code=args.trust_remote_code,
        )

    @property
    def reads_rollout(self) -> bool:
        return True

    @property
    def wants_old_entropies(self) -> bool:
        # the filter's overlap with the tokens of high entropy is a metric; on TRL 1.12 they are an extra pass
        return super().wants_old_entropies or self.args.entropy_filter_fraction > 0

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.mode == "train" and not self._warmup_done:
            self._warmup_done = self._warming_up = True
            try:
                for _ in range(self.args.critic_warmup_rollouts):
                    self._generate_and_score_completions(self._warmup_prompts(generation_batch))
            finally:
                self._warming_up = False
        return super()._prepare_inputs(generation_batch)

    def rows_to_repeat(self, num_rows: int) -> Tensor | None:
        return None if self._warming_up else super().rows_to_repeat(num_rows)

    def _warmup_prompts(self, generation_batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """This process's rows of a rollout on random prompts; those of `generation_batch` where rows are streamed."""
        if not hasattr(self.train_dataset, "__len__"):
            return [dict(row) for row in generation_batch]
        num_prompts = self.args.generation_batch_size // self.num_generations
        chosen = torch.randint(len(self.train_dataset), (num_prompts,), generator=self._prompt_generator)
        rows = chosen.repeat_interleave(self.num_generations)
        share = len(rows) // self.accelerator.num_processes
        start = self.accelerator.process_index * share
        return [self.train_dataset[index] for index in rows[start : start + share].tolist()]

    def set_token_level(self, output: dict[str, Any], found: list[TokenValues], completion_ids: list[Any]) -> None:
        if any(values.name == "token_advantages" for values in found):
            raise ValueError(f"token_advantages of {found[0].source}: AsyPPO's advantages come from its critics.")
        mask = loss_mask(output)
        rewards = summed_rewards(found, self.written_tokens(mask), output["advantages"].dtype, completion_ids)
        self._log_token_rewards(rewards)
        output["token_rewards"] = torch.where(mask, rewards, 0.0)

    def on_rollout(self, output: dict[str, Any], rewards: Tensor) -> None:
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        # a completion that no reward function scored has no return: nothing is learnt from it
        mask = loss_mask(output) & ~rewards.isnan().unsqueeze(1)
        num_tokens = mask.shape[1]
        values = self.critics.state_values(ids, attention, num_tokens, critic_batch_size(self.args, self.args))
        targets = self._set_advantages(output, values, rewards.nan_to_num(0.0), mask)
        if not self._warming_up:  # the policy stands still, and so do the controls' states
            super().on_rollout(output, rewards)
        self._log_critics(values[:, :, :num_tokens], targets, mask)
        self._log_overlap(output, mask)
        if self.mode == "train":
            losses = self.train_critics(ids, attention, mask, targets)
            for name, value in losses.items():
                self._metrics["train"][f"asyppo/{name}"].append(value)

    def _set_advantages(self, output: dict[str, Any], values: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
        """Put the advantages and the two masks into the rollout; return the critics' targets, `(B, T)`."""
        args, mean = self.args, values.mean(0)
        ends = output["completion_mask"].sum(1)
        truncated = self._is_truncated(output, ends) & args.bootstrap_truncated
        episodes = Episodes(mean, rewards, mask, ends, truncated, output.pop("token_rewards", None))
        advantages = generalized_advantages(episodes, gamma=args.gae_gamma, lam=args.gae_lambda)
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, self._sum_over_processes)
        output["advantages"], output[TOKEN_LEVEL] = advantages, mask.new_ones(len(mask))
        if self.recording:
            output["value_mean"] = mean[:, :-1]
        output.update(disagreement(values[:, :, :-1], mask, args, self._gather))
        return critic_targets(episodes, gamma=args.gae_gamma, lam=args.critic_gae_lambda)

    def _is_truncated(self, output: dict[str, Any], ends: Tensor) -> Tensor:
        """True where a completion fills `max_completion_length` without an end-of-sequence token, bool `(B,)`."""
        last = output["completion_ids"].gather(1, (ends - 1).clamp(min=0).unsqueeze(1))
        eos = self.model.generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        ended = torch.isin(last, last.new_tensor([self._tokenizer.eos_token_id, *eos])).squeeze(1)
        return (ends >= self.max_completion_length) & ~ended

    def train_critics(self, ids: Tensor, attention: Tensor, mask: Tensor, targets: Tensor) -> dict[str, float]:
        """Train each critic on its share of a rollout.

        Args:
            ids: Prompts and completions, `(B, P + T)`.
            attention: Their attention mask, `(B, P + T)`.
            mask: True for the tokens whose value is learnt, bool `(B, T)`.
            targets: Of the values, `(B, T)`.

        Returns:
            The losses, by the metrics' names without their prefix.
        """
        share, processes = len(ids), self.accelerator.num_processes
        groups = [self.num_generations] * (share * processes // self.num_generations)
        start = self.accelerator.process_index * share
        return self.critics.train_on(
            ids,
            attention,
            mask,
            targets,
            critic_of_row=self.critics.assign(groups),
            rows=torch.arange(start, start + share),
            epochs=self.args.critic_num_epochs,
            batch_size=critic_batch_size(self.args, self.args),
        )

    def _log_critics(self, values: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Metrics of a rollout, before the critics train on it; `values` is `(M, B, T)`."""
        metrics, reduce = self._metrics[self.mode], self._sum_over_processes
        metrics["asyppo/explained_variance"].append(explained_variance(values.mean(0), targets, mask, reduce))
        for index, value in enumerate(values):
            name = f"asyppo/critic_{index}"
            metrics[f"{name}/explained_variance"].append(explained_variance(value, targets, mask, reduce))
            self._token_means[self.mode].add({f"{name}/value_mean": TokenMean(value, mask)})
        deviation = values.std(0, unbiased=False)[mask]
        padded = self.accelerator.pad_across_processes(deviation, pad_index=torch.nan)
        pool = self.accelerator.gather(padded)
        pool = pool[~pool.isnan()].sort().values
        for name, share in QUANTILES.items() if len(pool) else ():
            metrics[f"asyppo/value_std_{name}"].append(pool[int(share * (len(pool) - 1))].item())

    def _log_overlap(self, output: dict[str, Any], mask: Tensor) -> None:
        """How many of the tokens with the highest disagreement are also among those with the highest entropy."""
        if "old_entropies" in output:
            fraction, filtered = self.args.entropy_filter_fraction, output["entropy_filtered"]
            high_entropy = highest_fraction(output["old_entropies"], mask, fraction, self._gather)
            self._token_means[self.mode].add({"asyppo/entropy_overlap": TokenMean(high_entropy, filtered)})

    def control_state(self) -> dict[str, Any]:
        return super().control_state() | {
            "warmup_done": self._warmup_done,
            "prompt_generator": self._prompt_generator.get_state(),
        }

    def rollout_settings(self) -> dict[str, str]:
        return super().rollout_settings() | {
            "critics": "True",
            "entropy_filter_enabled": repr(self.args.entropy_filter_fraction > 0),
        }

    def load_control_state(self, state: dict[str, Any], *, own: bool) -> None:
        super().load_control_state(state, own=own)
        self._warmup_done = state["warmup_done"]
        self._prompt_generator.set_state(state["prompt_generator"].cpu())

    def save_controls(self, checkpoint: str) -> None:
        self.critics.save(os.path.join(checkpoint, "critics"))

    def load_controls(self, checkpoint: str) -> None:
        try:
            self.critics.load(os.path.join(checkpoint, "critics"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{checkpoint} has no critics/: it was saved by another trainer. Start anew from its weights, with "
                f"model={checkpoint!r}."
            ) from error
        self._warmup_done = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.critics.save(os.path.join(output_dir or self.args.output_dir, "critics"))
