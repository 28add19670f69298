"""Asynchronous GRPO with entropy control."""

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models.utils import disable_gradient_checkpointing

from ..controls import (
    ActiveControls,
    Context,
    MicroBatch,
    PolicyTokens,
    Rollout,
    TokenMean,
    clipped_by_ppo,
    in_float32,
    micro_batch,
    ratio_controls,
)
from ..controls.importance import ratio_of
from ..files import whole_file
from ..telemetry.metrics import TokenMeans
from ..telemetry.recorder import RecordedMicroBatch, TokenRecorder
from ..telemetry.staleness import clipped_by_age
from .async_config import EntropyAsyncGRPOConfig
from .async_contact import AsyncContact, AsyncLossCall
from .async_controls import SUPPORTED
from .async_samples import TaggedMetrics, as_rollout, per_token, sample_ids
from .card import add_methods
from .dropout import warn_of_dropout
from .recording import add_recorder
from .resume import UNREADABLE, on_all_processes, steps_of
from .weight_versions import WeightVersions

__all__ = ["SUPPORTED", "EntropyAsyncGRPOConfig", "EntropyAsyncGRPOTrainer"]

VERSIONS_IN_FLIGHT = 4
"""Versions beyond `max_staleness` that a sample may age between leaving the queue, where TRL drops what is older, and
its update: it waits in the planner and in the data loader for one batch each."""
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class EntropyAsyncGRPOTrainer(AsyncContact):
    """TRL's `AsyncGRPOTrainer` with the controls of `SUPPORTED`; same arguments, methods and files.

    With no control set in its [`EntropyAsyncGRPOConfig`], training is bit for bit TRL's own. Otherwise PPO-clip
    decides on the raw ratio to the recorded log-probs of the server which tokens it would drop, and the controls act
    on each token in the order of the table, each on what the one before left.

    Samples come one by one and each is used once, so the micro-batch of all processes stands where the rollout of
    synchronous training is: what a control measures once a rollout before its first update (EntroPIC's entropy,
    STEER's scale, Clip-Cov's covariances) it measures at every micro-batch, under the policy that is about to be
    trained.

    ERC compares with the policy that wrote the tokens, whose entropies no server reports. The trainer computes them
    anew, with the weights of the version that TRL tagged the sample with: the server's when the sample's group was
    requested. A token that was written after a later hand-over has a newer author; `staleness/behaviour_gap` says how
    far the recorded log-probs are from that version's. This costs, for each version in a micro-batch that is not the
    current one, a forward pass of the micro-batch without gradients, and `max_staleness + 4` copies of the trained
    weights in the host's memory. Where no update lies between, nothing is computed anew and the ratio is 1.

    A resumed run goes on with the controls' states; the samples are new, as TRL's are.

    Raises:
        ValueError: For ERC with weights that are sharded over processes.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "async-grpo", "trl-entropy"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._token_means = TokenMeans()
        self.active = ActiveControls((), {})
        self._versions: WeightVersions | None = None
        self._micro_step = self._synced_step = 0
        super().__init__(*args, **kwargs)
        self.active = ActiveControls.of(self.args)
        if self.needs_behaviour_entropies:
            self._refuse_sharding()
            self._versions = WeightVersions(self.args.max_staleness + VERSIONS_IN_FLIGHT)
        self._recorder: TokenRecorder | None = None
        if self.recording:
            self._recorder = add_recorder(self, self.processing_class, self.args.gradient_accumulation_steps)
        if methods := ratio_controls(self.args):
            warn_of_dropout(self.model, methods)

    @property
    def recording(self) -> bool:
        """Whether tokens are recorded."""
        return isinstance(self.args, EntropyAsyncGRPOConfig) and self.args.recording_enabled

    @property
    def hooks_active(self) -> bool:
        return self.recording or bool(self.active.controls)

    @property
    def needs_behaviour_entropies(self) -> bool:
        """Whether a control compares with the entropies of the policy that wrote the tokens: ERC."""
        return any(control.prefix == "erc" for control in self.active.controls)

    def _refuse_sharding(self) -> None:
        kind = self.accelerator.distributed_type
        if kind in SHARDED:
            raise ValueError(
                f"erc_low={self.args.erc_low} needs the entropies of earlier weights, which are put in the place of "
                "the current ones for a forward pass; gathered copies of sharded weights would not follow, and these "
                f"are sharded ({kind.value}). Leave ERC out, or train without sharding."
            )

    def tag(self, sample: Any) -> None:
        sample.metrics = TaggedMetrics(sample.metrics, sample.model_version)

    def add_columns(self, rows: Any, batch: dict[str, Any]) -> None:
        tagged = [[example["metrics"] for example in row.samples] for row in rows]
        # in hand-overs of this trainer, which all processes count; TRL's version is the main process's alone
        versions = [[self.synced - (self.model_version - metrics.version) for metrics in row] for row in tagged]
        of_token = per_token(versions, batch["segment_id"])
        # the keys arrive on the host of every process: reading them waits for no device
        batch["written_by"] = {each: of_token == each for each in sorted({each for row in versions for each in row})}
        rewards = [[metrics.get("reward", torch.nan) for metrics in row] for row in tagged]
        self._check_rewards(rewards)
        batch["reward"] = per_token(rewards, batch["segment_id"])
        if self.recording:
            batch["sample_ids"] = sample_ids(rows)

    def on_sync(self) -> None:
        self._synced_step = self.state.global_step
        if self._versions is not None:
            self._versions.keep(self.synced, self.accelerator.unwrap_model(self.model))

    def on_forward(self, call: AsyncLossCall) -> None:
        self._batch = self._micro_batch(call)
        tokens, ages = self._batch.tokens, self._ages(call)
        low, high = clipped_by_ppo(
            ratio_of(self._batch.log_weight), tokens.advantages, self.epsilon_low, self.epsilon_high
        )
        metrics: dict[str, TokenMean] = clipped_by_age(ages, low | high, tokens.mask)
        if self.active.controls:
            metrics |= self._shape(call, ages)
        self._token_means.add(metrics)
        self._record(call, metrics)

    def _ages(self, call: AsyncLossCall) -> Tensor:
        """Age of each token, in weight versions, `(S, T)`."""
        of_versions = call.inputs["written_by"].items()
        return call.unpack(torch.stack([(self.synced - version) * among for version, among in of_versions]).sum(0))

    def _micro_batch(self, call: AsyncLossCall) -> MicroBatch:
        logps, entropies = (in_float32(call.read(call.outputs, name)) for name in ("log_probs", "entropy"))
        tokens = PolicyTokens(
            logps=logps,
            old_logps=call.unpacked("old_log_probs"),
            advantages=call.unpacked("advantages"),
            mask=call.completions.mask,
        )
        return micro_batch(tokens, entropies, None, self.args.importance_sampling_level)

    def _shape(self, call: AsyncLossCall, ages: Tensor) -> dict[str, TokenMean]:
        batch, context = self._batch, self._context()
        rewards = call.unpacked("reward").where(batch.tokens.mask, -torch.inf).amax(1)
        current = batch.logps.detach(), batch.entropies.detach()
        columns, metrics = self.active.on_rollout(
            Rollout(batch.tokens.mask, rewards, batch.tokens.advantages, *current), context
        )
        old_entropies = None
        if self.needs_behaviour_entropies:
            old_entropies, counted = self._behaviour_entropies(call, ages)
            metrics |= counted
        self._batch = replace(batch, columns=columns, old_entropies=old_entropies)
        shaped, counted = self.active.shape(self._batch, context)
        call.shape("advantages", shaped.advantages)
        call.shape("old_log_probs", shaped.old_logps)
        return {**metrics, **counted}

    def _check_rewards(self, rewards: list[list[float]]) -> None:
        if self.args.positive_nll_enabled and all(math.isnan(reward) for row in rewards for reward in row):
            raise ValueError(
                f"positive_nll_coef={self.args.positive_nll_coef} needs each sample's reward, and no sample has "
                "`metrics['reward']`. Let the rollout worker put it there."
            )

    @torch.no_grad()
    def _behaviour_entropies(self, call: AsyncLossCall, ages: Tensor) -> tuple[Tensor, dict[str, TokenMean]]:
        """Entropies under the weights with the version of each sample, `(S, T)`, and how far they are from its author.

        Every process makes the same passes. Where no update lies between, the pass of the loss is that of the version.
        """
        assert self._versions is not None
        policy, entropies = self.accelerator.unwrap_model(self.model), self._batch.entropies.detach()
        gap, elsewhere = torch.zeros_like(entropies), torch.zeros_like(self._batch.tokens.mask)
        moved = self.state.global_step != self._synced_step
        for version in call.inputs["written_by"]:
            if version == self.synced and not moved:
                continue
            checkpointing = disable_gradient_checkpointing(policy, self.args.gradient_checkpointing_kwargs)
            with self._versions.at(version, policy), checkpointing:
                outputs = call.run()
            among = self._batch.tokens.mask & (ages == self.synced - version)
            entropies = torch.where(among, in_float32(call.read(outputs, "entropy")), entropies)
            distance = (in_float32(call.read(outputs, "log_probs")) - self._batch.tokens.old_logps).abs()
            gap, elsewhere = torch.where(among, distance, gap), elsewhere | among
        return entropies, {"staleness/behaviour_gap": TokenMean(gap, elsewhere)}

    def added_loss(self, call: AsyncLossCall) -> Tensor | None:
        batch, added = self._batch, None
        del self._batch
        if self.active.controls:
            added, metrics = self.active.loss(batch, self._context(batch.columns))
            self._token_means.add(metrics)
        if self.accelerator.sync_gradients:
            self._token_means.close_window(self.accelerator.reduce)
        self._micro_step += 1
        return added

    def _context(self, columns: Mapping[str, Tensor] | None = None) -> Context:
        accumulation = self.current_gradient_accumulation_steps

        def per_window(name: str, needed_by: str) -> Tensor:
            return (columns or {})[name].clamp(min=1) * accumulation / self.accelerator.num_processes

        return Context(
            self.args,
            eps_low=self.epsilon_low,
            eps_high=self.epsilon_high,
            step=self._micro_step,
            total_steps=max(1, self.state.max_steps * self.args.gradient_accumulation_steps),
            sum_over_processes=lambda totals: self.accelerator.reduce(
                self.accelerator.pad_across_processes(totals, dim=0)
            ),
            gather=self.accelerator.gather,
            per_window=per_window,
            group_size=self.args.num_generations,
        )

    def _record(self, call: AsyncLossCall, metrics: Mapping[str, TokenMean]) -> None:
        if self._recorder is None:
            return
        batch = self._batch
        shaped = {name: call.completions.unpack(column) for name, column in self._read_by_loss(call).items()}
        self._recorder.add(
            RecordedMicroBatch(
                as_rollout(call, batch),
                batch.tokens.mask,
                batch.tokens.logps,
                batch.entropies.detach(),
                metrics,
                step=self.state.global_step + 1,
                micro_step=self._micro_step,
                shaped=shaped,
            )
        )

    def _read_by_loss(self, call: AsyncLossCall) -> dict[str, Tensor]:
        """What TRL's loss reads of the trained tokens, under the names of synchronous training, `(M,)` each."""
        names = {"advantages": "advantages", "old_log_probs": "old_per_token_logps"}
        return {ours: (call.inputs | call.shaped)[name][call.completions.packed] for name, ours in names.items()}

    def control_metrics(self) -> dict[str, float]:
        return self._token_means.pop()

    def _controls_path(self, checkpoint: str, process: int) -> str:
        return os.path.join(checkpoint, f"controls_rank{process}.pt")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._recorder is not None:
            # before the checkpoint is complete: a run that goes on from it does not take these steps again
            self._recorder.flush()
        if self.active.controls and not self.args.save_only_model:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            checkpoint = os.path.join(self._get_output_dir(trial=trial), folder)
            state = {"controls": self.active.state_dict(), "num_processes": self.accelerator.num_processes}
            with whole_file(self._controls_path(checkpoint, self.accelerator.process_index)) as part:
                torch.save(state, part)
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # `self.state` may be that of a new run: transformers 4 reads the checkpoint's after this
        self._micro_step = steps_of(checkpoint) * self.args.gradient_accumulation_steps
        if self.active.states:
            self._load_controls(checkpoint)

    def _load_controls(self, checkpoint: str) -> None:
        """Continue from the controls' states: each process's own if all have it, or else what they have in common."""
        state, own, problem = self._read_controls(checkpoint)
        own, known = on_all_processes(self.accelerator, own, state is not None)
        if state is None or not known:
            problem = problem or f"another process cannot read {checkpoint}"
            warnings.warn(f"{problem}: the controls begin anew.", stacklevel=2)
        elif missing := self.active.load_state_dict(state, own=own):
            warnings.warn(f"The checkpoint has no state of {' and '.join(missing)}: it begins anew.", stacklevel=2)

    def _read_controls(self, checkpoint: str) -> tuple[dict[str, Any] | None, bool, str]:
        """What this process or else the first one saved, whether it is this one's own, and what cannot be read."""
        # `accelerator.device` numbers the CPU by rank, which `torch.load` refuses
        device = self.accelerator.device if self.accelerator.device.type != "cpu" else "cpu"
        problem = ""
        for process in (self.accelerator.process_index, 0):
            path = self._controls_path(checkpoint, process)
            try:
                state = torch.load(path, map_location=device, weights_only=True)
                own = process == self.accelerator.process_index
                return state["controls"], own and state["num_processes"] == self.accelerator.num_processes, problem
            except UNREADABLE as error:
                problem = f"{path} cannot be read ({type(error).__name__})"
        return None, False, problem

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.active.controls and self.is_world_process_zero():
            add_methods(os.path.join(self.args.output_dir, "README.md"), self.args)
