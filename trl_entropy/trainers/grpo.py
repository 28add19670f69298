"""GRPO with entropy control."""

import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from ..controls import (
    EntropyHistory,
    PolicyTokens,
    TokenMean,
    bounded_old_logps,
    clip_controls,
    entropy_ratio,
    epo,
    epo_beta,
    inside_bounds,
    log_importance_weight,
    positive_nll,
)
from ..telemetry.metrics import TokenMeans, turn_entropies
from ..telemetry.recorder import RecorderCallback, TokenRecorder, Update
from ..vllm_on_cpu import trainable_engines
from .card import add_methods
from .config import EntropyGRPOConfig
from .contact import GRPOContact, LossCall, loss_mask
from .dropout import warn_of_dropout

RECORDED_SETTINGS = (
    "erc_low",
    "erc_high",
    "erc_entropy_floor",
    "ce_gppo_alpha1",
    "ce_gppo_alpha2",
    "advantage_mask_fraction",
    "entropy_filter_fraction",
    "record_tokens",
)
"""What the figures of the recorded tokens need to know of the configuration; `None` where it has no such field."""

ROWS_PER_REPEAT = 32
"""Of so many rows of a rollout one gets a second forward pass. A rollout costs each row five passes and more (one
before the updates, a forward and a backward pass in them, and its generation), so this is at most 1/160 of it."""


def has_rotary_positions(config: PretrainedConfig) -> bool:
    """Whether padding before a row leaves the model's function as it is (learned positions would change)."""
    text = config.get_text_config()
    return any(getattr(text, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))


class EntropyGRPOTrainer(GRPOContact):
    """`trl.GRPOTrainer` with ERC, CE-GPPO and the positive-NLL term; same arguments, methods and files.

    With no control set in its [`EntropyGRPOConfig`], training is bit for bit TRL's own. Otherwise the controls act on
    each token in this order, each on what the one before left: PPO-clip decides on the raw ratio which tokens it would
    drop, CE-GPPO re-weights those, ERC gates every token. All of it is a change of the advantages and old log-probs
    that TRL's loss reads, so every TRL option keeps its meaning.

    Checkpoints hold the rollout in use and the position in the data, so a resumed run equals an uninterrupted one.
    Arguments and errors are those of `trl.GRPOTrainer`; with a plain `trl.GRPOConfig` every control is off.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "trl-entropy"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._token_means = {"train": TokenMeans(), "eval": TokenMeans()}
        self._entropy_history = EntropyHistory()
        with trainable_engines():
            super().__init__(*args, **kwargs)
        self._recorder = self._make_recorder() if self.recording else None
        if isinstance(self.args, EntropyGRPOConfig) and self.args.ratio_controls:
            warn_of_dropout(self.model, self.args.ratio_controls)

    @property
    def recording(self) -> bool:
        """Whether tokens are recorded."""
        return isinstance(self.args, EntropyGRPOConfig) and self.args.recording_enabled

    def _make_recorder(self) -> TokenRecorder:
        recorder = TokenRecorder(
            self.args.output_dir,
            self.args.record_tokens,
            self._tokenizer,
            {name: getattr(self.args, name, None) for name in RECORDED_SETTINGS}
            | {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high},
            process=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            seed=self.args.seed,
            level=self.importance_sampling_level,
            clip_range={"eps_low": self.epsilon_low, "eps_high": self.epsilon_high},
            entropy_floor=self.args.erc_entropy_floor,
        )
        self.add_callback(RecorderCallback(recorder, self.args.steps_per_generation * self.num_iterations))
        return recorder

    @property
    def controlled(self) -> bool:
        """Whether a control is on, or there are tokens to record or turns of episodes to measure."""
        if not isinstance(self.args, EntropyGRPOConfig):
            return False
        if self.recording:
            return True
        return self.args.any_control_enabled or (self.rollout_func is not None and not self.args.loss_is_hidden)

    @property
    def wants_old_entropies(self) -> bool:
        return self.args.erc_enabled or self.args.epo_enabled or self.recording

    @property
    def wants_entropy_gradients(self) -> bool:
        return self.args.epo_enabled

    def on_rollout(self, output: dict[str, Any], rewards: Tensor) -> None:
        if self.args.epo_enabled:
            output["num_trajectories"] = self.accelerator.gather(loss_mask(output).any(1).sum()).sum()
            if self.mode == "train":
                self._entropy_history.finish_step(self._sum_over_processes)
        if self.args.positive_nll_enabled:
            tokens = loss_mask(output) & self._is_correct(rewards).unsqueeze(-1)
            output["rewards"] = rewards
            output["num_correct_tokens"] = self.accelerator.gather(tokens.sum()).sum()
        if self.recording:
            first = self.accelerator.process_index * len(rewards)
            output["completion_index"] = torch.arange(first, first + len(rewards), device=rewards.device)

    def rows_to_repeat(self, num_rows: int) -> Tensor | None:
        if not self.args.erc_enabled or self.mode != "train" or not has_rotary_positions(self.model.config):
            return None
        rollout = self._step // (self.args.steps_per_generation * self.num_iterations)
        if isinstance(self.processing_class, ProcessorMixin) or rollout % math.ceil(ROWS_PER_REPEAT / num_rows):
            return None
        count = max(1, num_rows // ROWS_PER_REPEAT)
        return torch.arange(count) * (num_rows // count)

    def on_repeat(self, output: dict[str, Any], rows: Tensor, entropies: Tensor) -> None:
        low, high = self.args.erc_low, self.args.erc_high
        ratio = entropy_ratio(entropies, output["old_entropies"][rows], self.args.erc_entropy_floor)
        outside = TokenMean(~inside_bounds(ratio, low, high), loss_mask(output)[rows])
        self._token_means[self.mode].add({"erc/rounding_fraction": outside})

    def _sum_over_processes(self, totals: Tensor) -> Tensor:
        return self.accelerator.reduce(self.accelerator.pad_across_processes(totals, dim=0))

    def _is_correct(self, rewards: Tensor) -> Tensor:
        return rewards >= self.args.positive_nll_min_reward

    @property
    def shapes_policy_gradient(self) -> bool:
        """Whether a control changes the advantages or old log-probs that TRL's loss reads."""
        return self.args.erc_enabled or self.args.ce_gppo_enabled

    def on_forward(self, call: LossCall) -> None:
        if "tool_mask" in call.inputs:
            self._token_means[self.mode].add(turn_entropies(call.entropies.detach(), call.mask))
        if self.shapes_policy_gradient:
            self._shape_policy_gradient(call)
        elif self.args.any_control_enabled:
            self._bound_importance_ratio(call)

    @torch.no_grad()
    def _bound_importance_ratio(self, call: LossCall) -> None:
        """Keep TRL's own policy loss finite beside an added loss: an infinite ratio would make both NaN."""
        inputs, logps = call.inputs, call.logps.detach()
        old_logps = inputs.get("old_per_token_logps")
        if old_logps is not None:
            self._keep_off_policy_mask(inputs, old_logps)
            log_weight = log_importance_weight(logps, old_logps, call.mask, self.importance_sampling_level)
            inputs["old_per_token_logps"] = bounded_old_logps(old_logps, log_weight)

    def _keep_off_policy_mask(self, inputs: dict[str, Any], old_logps: Tensor) -> None:
        """TRL's off-policy mask measures the drift from the rollout, which must not be the shaped log-probs."""
        if self.off_policy_mask_threshold is not None:
            inputs.setdefault("sampling_per_token_logps", old_logps)

    @torch.no_grad()
    def _shape_policy_gradient(self, call: LossCall) -> None:
        inputs, logps, entropies = call.inputs, call.logps.detach(), call.entropies.detach()
        on_policy = inputs.get("old_per_token_logps") is None
        advantages = inputs["advantages"]
        tokens = PolicyTokens(
            logps=logps,
            old_logps=logps if on_policy else inputs["old_per_token_logps"],
            advantages=(advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(logps),
            mask=call.mask,
        )
        self._keep_off_policy_mask(inputs, tokens.old_logps)
        old_entropies = entropies if on_policy else inputs.get("old_entropies")
        shaped, metrics = clip_controls(
            tokens,
            entropies,
            old_entropies,
            level=self.importance_sampling_level,
            eps_low=self.epsilon_low,
            eps_high=self.epsilon_high,
            ce_gppo_alphas=self.args.ce_gppo_alphas,
            erc_bounds=self.args.erc_bounds,
            erc_entropy_floor=self.args.erc_entropy_floor,
            delta=self.args.delta,
            constant_ratio=self.args.loss_type == "cispo",
        )
        inputs["advantages"], inputs["old_per_token_logps"] = shaped.advantages, shaped.old_logps
        if shaped.frozen is not None:
            self._freeze(call, shaped.frozen)
        self._count(call, metrics)

    @torch.enable_grad()
    def _freeze(self, call: LossCall, frozen: Tensor) -> None:
        """Make these log-probs constants of the ratio; the KL term, which reads `ref - lp`, keeps its gradient."""
        logps, inputs = call.logps, call.inputs
        call.loss_logps = torch.where(frozen, logps.detach(), logps)
        if self.beta != 0.0:
            attached = inputs["ref_per_token_logps"] - (logps - logps.detach())
            inputs["ref_per_token_logps"] = torch.where(frozen, attached, inputs["ref_per_token_logps"])

    def _count(self, call: LossCall, metrics: Mapping[str, TokenMean]) -> None:
        call.metrics.update(metrics)
        self._token_means[self.mode].add(metrics)

    def added_loss(self, call: LossCall) -> Tensor | None:
        added = []
        if self.args.epo_enabled:
            added.append(self.args.epo_coef * self._epo_loss(call))
        if self.args.positive_nll_enabled:
            added.append(self.args.positive_nll_coef * self._positive_nll_loss(call))
        return torch.stack(added).sum() if added else None

    def _epo_loss(self, call: LossCall) -> Tensor:
        args, history = self.args, self._entropy_history
        if self.mode == "train":
            # the policy that wrote the rollout; on-policy it is the one being trained
            history.add(call.inputs.get("old_entropies", call.entropies), call.mask)
        micro_batches = args.steps_per_generation * self.num_iterations  # of an RL step
        loss, metrics = epo(
            call.entropies,
            call.mask,
            history.mean(args.epo_history, like=call.entropies.detach()),
            beta=epo_beta(
                # by position, not by the history's length: a resumed run may have another schedule, or no history
                self._step // micro_batches,
                math.ceil(self.state.max_steps * args.gradient_accumulation_steps / micro_batches),
                gamma=args.epo_gamma,
                schedule=args.epo_schedule,
            ),
            kappa_low=args.epo_kappa_low,
            kappa_high=args.epo_kappa_high,
            penalty=args.epo_penalty,
            form=args.epo_form,
            num_trajectories=self._per_window(call, "num_trajectories", f"epo_coef={args.epo_coef}"),
            bonus_entropies=call.bonus_entropies,
        )
        self._count(call, metrics)
        return loss

    def _positive_nll_loss(self, call: LossCall) -> Tensor:
        needed_by = f"positive_nll_coef={self.args.positive_nll_coef}"
        num_tokens = self._per_window(call, "num_correct_tokens", needed_by)
        correct = self._is_correct(call.inputs["rewards"])
        loss, metrics = positive_nll(call.logps, call.mask, correct, num_tokens)
        self._count(call, metrics)
        return loss

    def on_loss(self, call: LossCall, inputs: dict[str, Any]) -> None:
        if self._recorder is not None and self.mode == "train":
            measured = (call.mask, call.logps.detach(), call.entropies.detach(), call.metrics)
            self._recorder.add(Update(inputs, *measured, step=self.state.global_step + 1, micro_step=self._step))

    def _per_window(self, call: LossCall, name: str, needed_by: str) -> Tensor:
        """A count over the whole rollout, rescaled to one accumulation window of one process, as TRL's token mean is.

        A loss divided by it, summed over micro-batches and averaged over processes, is the mean over the rollout.
        """
        if name not in call.inputs:
            raise KeyError(
                f"{needed_by} needs `{name}`, which the micro-batch does not have. Let the trainer make the rollout, "
                "or add it."
            )
        count = call.inputs[name].clamp(min=1) / self.accelerator.num_processes
        if self.mode == "train":
            count = count * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return count

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.controlled and self.accelerator.sync_gradients:
            self._token_means[self.mode].close_window(self.accelerator.reduce)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._recorder is not None:
            # before the checkpoint is complete: a run that goes on from it does not take these steps again
            self._recorder.flush()
        super()._save_checkpoint(model, trial)

    def control_state(self) -> dict[str, Any]:
        return {"entropy_history": self._entropy_history.state_dict()}

    def load_control_state(self, state: dict[str, Any], *, own: bool) -> None:
        history = state["entropy_history"]
        # the sums of the step that was running are each process's part of it
        self._entropy_history.load_state_dict(history if own else {**history, "running": None})

    def rollout_settings(self) -> dict[str, str]:
        columns = ("erc_enabled", "epo_enabled", "positive_nll_enabled", "recording_enabled")
        return super().rollout_settings() | {name: repr(getattr(self.args, name, False)) for name in columns}

    def control_metrics(self) -> dict[str, float]:
        return self._token_means[self.mode].pop()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.controlled and self.args.any_control_enabled and self.is_world_process_zero():
            add_methods(os.path.join(self.args.output_dir, "README.md"), self.args)
