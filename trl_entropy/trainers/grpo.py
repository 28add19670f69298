"""GRPO with entropy control."""

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from ..controls import (
    CONTROLS,
    ActiveControls,
    Context,
    MicroBatch,
    PolicyTokens,
    Rollout,
    TokenMean,
    bounded_old_logps,
    log_importance_weight,
    micro_batch,
    ratio_controls,
)
from ..telemetry.metrics import TokenMeans, turn_entropies
from ..telemetry.recorder import RecordedMicroBatch, TokenRecorder
from ..vllm_on_cpu import trainable_engines
from .card import add_methods
from .config import ControlChecks, EntropyGRPOConfig
from .contact import GRPOContact, GRPOLoss
from .dropout import warn_of_dropout
from .loss_call import TOKEN_LEVEL, LossCall, loss_mask
from .overrides import check_reach, refuse_token_level
from .recording import add_recorder
from .token_level import TokenValues, check_token_level, credited, summed_rewards

ROWS_PER_REPEAT = 32
"""Of so many rows of a rollout one gets a second forward pass. A rollout costs each row five passes and more (one
before the updates, a forward and a backward pass in them, and its generation), so this is at most 1/160 of it."""


def has_rotary_positions(config: PretrainedConfig) -> bool:
    """Whether padding before a row leaves the model's function as it is (learned positions would change)."""
    text = config.get_text_config()
    return any(getattr(text, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))


class EntropyControlMixin(GRPOContact):
    """The controls of `trl_entropy.controls.CONTROLS` for a trainer that comes after this class among the bases.

    With no control set in its configuration, training is bit for bit that trainer's own. Otherwise PPO-clip decides on
    the raw ratio which tokens it would drop, and the controls act on each token in the order of the table, each on
    what the one before left. All of it is a change of the advantages and old log-probs that TRL's loss reads, so every
    TRL option keeps its meaning, and of scalars that are added to the loss.

    Checkpoints hold the rollout in use and the position in the data, so a resumed run equals an uninterrupted one.
    Arguments and errors are those of the trainer; with a configuration without the controls' fields all are off.
    """

    has_critics: ClassVar[bool] = False
    """Whether a control that comes with critics has them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._token_means = {"train": TokenMeans(), "eval": TokenMeans()}
        self.active = ActiveControls((), {})
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, ControlChecks)]
        for config in given:  # before a model is loaded
            check_reach(type(self), config)
        with trainable_engines():
            super().__init__(*args, **kwargs)
        if isinstance(self.args, ControlChecks) and not any(one is self.args for one in given):
            check_reach(type(self), self.args)
        self.active = ActiveControls.of(self.args)
        self._recorder: TokenRecorder | None = None
        if self.recording:
            self._recorder = add_recorder(self, self._tokenizer, self._micro_batches_per_rollout)
        if methods := ratio_controls(self.args):
            warn_of_dropout(self.model, methods)

    @property
    def recording(self) -> bool:
        """Whether tokens are recorded."""
        return isinstance(self.args, ControlChecks) and self.args.recording_enabled

    @property
    def hooks_active(self) -> bool:
        """Whether a control is on, or there are tokens to record or turns of episodes to measure."""
        if not isinstance(self.args, ControlChecks):
            return False
        if self.recording:
            return True
        episodes = getattr(self, "rollout_func", None) is not None
        return bool(self.active.controls) or (episodes and not self.args.loss_is_hidden)

    @property
    def must_act(self) -> bool:
        return self.recording or bool(self.active.controls)

    @property
    def reads_rollout(self) -> bool:
        needs = ("old_entropies", "rollout_pass")
        acts = any(one.on_rollout or one.on_repeat for one in self.active.controls)
        return acts or self.recording or any(map(self.active.need, needs))

    @property
    def wants_old_entropies(self) -> bool:
        return self.active.need("old_entropies") or self.recording

    @property
    def sets_advantages(self) -> bool:
        return any(control.sets_advantages for control in self.active.controls)

    @property
    def wants_entropy_gradients(self) -> bool:
        return self.active.need("entropy_gradients")

    @property
    def _micro_batches_per_rollout(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _context(self, per_window: Callable[[str, str], Tensor] | None = None) -> Context:
        """What the controls may ask of this trainer at this step."""
        micro_batches = self._micro_batches_per_rollout
        return Context(
            self.args,
            level=self.importance_sampling_level,
            eps_low=self.epsilon_low,
            eps_high=self.epsilon_high,
            delta=getattr(self.args, "delta", None),
            constant_ratio=self.loss_type == "cispo",
            training=self.mode == "train",
            step=self._step // micro_batches,
            # an epoch may end in a step of fewer micro-batches
            total_steps=max(1, math.ceil(self._position(self.state.max_steps)[1] / micro_batches)),
            sum_over_processes=self._sum_over_processes,
            gather=self._gather,
            group_size=self.num_generations if self.mode == "train" else self.num_generations_eval,
            **({} if per_window is None else {"per_window": per_window}),
        )

    def set_token_level(self, output: dict[str, Any], found: list[TokenValues], completion_ids: list[Any]) -> None:
        others = " and ".join(control.name for control in self.active.controls if control.sets_advantages)
        refuse_token_level(type(self), f"{found[0].name} of {found[0].source}")
        check_token_level(found, self.loss_type, others)
        mask, advantages = loss_mask(output), output["advantages"]
        values = summed_rewards(found, self.written_tokens(mask), advantages.dtype, completion_ids)
        if found[0].name == "token_rewards":
            self._log_token_rewards(values)
            values = credited(advantages, values, mask, self._context())
        output["advantages"], output[TOKEN_LEVEL] = torch.where(mask, values, 0.0), mask.new_ones(len(mask))

    def _log_token_rewards(self, rewards: Tensor) -> None:
        totals = TokenMean(rewards.sum(1), torch.ones_like(rewards[:, 0], dtype=torch.bool)).totals()
        total, count = self._sum_over_processes(totals)
        self._metrics[self.mode]["token_rewards"].append((total / count).item())

    def on_rollout(self, output: dict[str, Any], rewards: Tensor) -> None:
        if self.active.controls:
            old_logps, old_entropies = output.get("old_per_token_logps"), output.get("old_entropies")
            if old_logps is None and self.active.need("rollout_pass"):
                old_logps, old_entropies = self.rollout_pass(output)
            rollout = Rollout(loss_mask(output), rewards, output["advantages"], old_logps, old_entropies)
            columns, metrics = self.active.on_rollout(rollout, self._context())
            output.update(columns)
            self._token_means[self.mode].add(metrics)
        if self.recording:
            first = self.accelerator.process_index * len(rewards)
            output["completion_index"] = torch.arange(first, first + len(rewards), device=rewards.device)

    def rows_to_repeat(self, num_rows: int) -> Tensor | None:
        compared = any(control.on_repeat is not None for control in self.active.controls)
        if not compared or self.mode != "train" or not has_rotary_positions(self.model.config):
            return None
        rollout = self._step // self._micro_batches_per_rollout
        if isinstance(self.processing_class, ProcessorMixin) or rollout % math.ceil(ROWS_PER_REPEAT / num_rows):
            return None
        count = max(1, num_rows // ROWS_PER_REPEAT)
        return torch.arange(count) * (num_rows // count)

    def on_repeat(self, output: dict[str, Any], rows: Tensor, entropies: Tensor) -> None:
        old_entropies, mask = output["old_entropies"][rows], loss_mask(output)[rows]
        metrics = self.active.on_repeat(entropies, old_entropies, mask, self._context())
        self._token_means[self.mode].add(metrics)

    def _sum_over_processes(self, totals: Tensor) -> Tensor:
        return self.accelerator.reduce(self.accelerator.pad_across_processes(totals, dim=0))

    def _gather(self, flat: Tensor) -> Tensor:
        return self.accelerator.gather(flat)

    def on_forward(self, call: LossCall) -> None:
        if "tool_mask" in call.inputs:
            self._token_means[self.mode].add(turn_entropies(call.entropies.detach(), call.mask))
        if self.active.controls:
            call.batch = self._micro_batch(call)
        if self.active.shape_tokens:
            self._shape_policy_gradient(call)
        elif self.active.controls:
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

    def _micro_batch(self, call: LossCall) -> MicroBatch:
        """The micro-batch as the controls read it."""
        inputs, logps, advantages = call.inputs, call.logps, call.inputs["advantages"]
        on_policy = inputs.get("old_per_token_logps") is None
        tokens = PolicyTokens(
            logps=logps,
            old_logps=logps.detach() if on_policy else inputs["old_per_token_logps"],
            advantages=(advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(logps),
            mask=call.mask,
        )
        old_entropies = call.entropies.detach() if on_policy else inputs.get("old_entropies")
        # a copy: what the controls make of these inputs goes into the dict itself
        return micro_batch(tokens, call.entropies, old_entropies, self.importance_sampling_level, dict(inputs))

    def _shape_policy_gradient(self, call: LossCall) -> None:
        inputs, batch = call.inputs, call.batch
        self._keep_off_policy_mask(inputs, batch.tokens.old_logps)
        shaped, metrics = self.active.shape(batch, self._context())
        inputs["advantages"], inputs["old_per_token_logps"] = shaped.advantages, shaped.old_logps
        call.shaped = ("advantages", "old_per_token_logps")
        if shaped.frozen is not None:
            call.frozen = shaped.frozen
            self._freeze(call, shaped.frozen)
        if shaped.without_bonus is not None:
            call.bonus_entropies = torch.where(shaped.without_bonus, call.entropies.detach(), call.entropies)
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
        if not self.active.controls:
            return None
        batch = replace(call.batch, bonus_entropies=call.bonus_entropies)
        added, metrics = self.active.loss(batch, self._context(partial(self._per_window, call.inputs)))
        self._count(call, metrics)
        return added

    def on_loss(self, call: LossCall, inputs: dict[str, Any]) -> None:
        if self._recorder is not None and self.mode == "train":
            measured = (call.mask, call.logps.detach(), call.entropies.detach(), call.metrics)
            position = {"step": self.state.global_step + 1, "micro_step": self._step}
            self._recorder.add(
                RecordedMicroBatch(inputs, *measured, **position, shaped=call.inputs, frozen=call.frozen)
            )

    def _per_window(self, inputs: Mapping[str, Tensor], name: str, needed_by: str) -> Tensor:
        """A count over the whole rollout, rescaled to one accumulation window of one process, as TRL's token mean is.

        A loss divided by it, summed over micro-batches and averaged over processes, is the mean over the rollout.
        """
        if name not in inputs:
            raise ValueError(
                f"{needed_by} needs `{name}`, which the micro-batch does not have. Let the trainer make the rollout, "
                "or add it."
            )
        count = inputs[name].clamp(min=1) / self.accelerator.num_processes
        if self.mode == "train":
            count = count * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return count

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.hooks_active and self.accelerator.sync_gradients:
            self._token_means[self.mode].close_window(self.accelerator.reduce)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._recorder is not None:
            # before the checkpoint is complete: a run that goes on from it does not take these steps again
            self._recorder.flush()
        super()._save_checkpoint(model, trial)

    def control_state(self) -> dict[str, Any]:
        return self.active.state_dict()

    def load_control_state(self, state: dict[str, Any], *, own: bool) -> None:
        if "entropy_history" in state:  # as releases before the table of controls named it
            state = {"epo": state["entropy_history"], **state}
        if missing := self.active.load_state_dict(state, own=own):
            warnings.warn(f"The checkpoint has no state of {' and '.join(missing)}: it begins anew.", stacklevel=2)

    def rollout_settings(self) -> dict[str, str]:
        columns = [control for control in CONTROLS if control.on_rollout or control.needs_old_entropies]
        enabled = {f"{control.prefix}_enabled": repr(control.enabled(self.args)) for control in columns}
        names = ("recording_enabled", *(name for one in self.active.controls for name in one.rollout_settings))
        return super().rollout_settings() | enabled | {name: repr(getattr(self.args, name, False)) for name in names}

    def control_metrics(self) -> dict[str, float]:
        return self._token_means[self.mode].pop()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.active.controls and self.is_world_process_zero():
            add_methods(os.path.join(self.args.output_dir, "README.md"), self.args)


class EntropyGRPOTrainer(EntropyControlMixin, GRPOLoss):
    """`trl.GRPOTrainer` with the entropy controls; same arguments, methods and files.

    [`EntropyControlMixin`] says what they do. With a plain `trl.GRPOConfig` every control is off.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "trl-entropy"]
    config_class: ClassVar[type] = EntropyGRPOConfig
