"""Where the controls touch TRL's internals (`resume` has what checkpoints need of them).

TRL's `GRPOTrainer._compute_loss` calls the policy's forward pass first and reads the advantages and the old log-probs
afterwards. `compute_loss` hands it a shallow copy of the inputs, and the override of the forward pass writes what the
controls decide into that copy, so TRL's loss does the rest. No line of that loss is repeated here.
"""

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from ..controls import MicroBatch, TokenMean, in_float32
from .contact_table import check_installed, check_rollout, check_trainer
from .masked_vocabulary import finite_logits
from .resume import ExactResume


@dataclass
class LossCall:
    """One call of TRL's loss: the inputs it reads and the forward pass it made.

    Attributes:
        inputs: Shallow copy of the micro-batch; what is written here is what TRL's loss reads.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        forward_done: Whether the forward pass has been made; only then are there the two below.
        logps: Log-probs of the sampled tokens, with their graph, `(B, T)`.
        loss_logps: The same values as TRL's loss reads them: without a graph where a token is a constant to it.
        entropies: Entropies of the policy being trained, nats, `(B, T)`.
        bonus_entropies: The same values as entropy bonuses read them: without a graph where a token gets no bonus.
        batch: What the controls read of it, where one is on.
        frozen: Tokens that are constants of their sequence's ratio, bool `(B, T)`; `None` for none.
        metrics: What the controls counted.
    """

    inputs: dict[str, Any]
    mask: Tensor
    forward_done: bool = False
    logps: Tensor = field(init=False)
    loss_logps: Tensor = field(init=False)
    entropies: Tensor = field(init=False)
    bonus_entropies: Tensor = field(init=False)
    batch: MicroBatch = field(init=False)
    frozen: Tensor | None = None
    metrics: dict[str, TokenMean] = field(default_factory=dict)


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """True for the tokens that the model wrote and that count, bool `(B, T)`."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


@dataclass(frozen=True)
class RolloutForward:
    """A forward pass over a rollout, before its first update.

    Attributes:
        logps: Log-probs of the sampled tokens, `(B, T)`.
        entropies: Nats, `(B, T)`.
        repeated: Indices of the rows whose pass was made again with more padding, and their entropies, `(rows, T)`.
    """

    logps: Tensor
    entropies: Tensor
    repeated: tuple[Tensor, Tensor] | None = None


REPEAT_PADDING = 8
"""Columns of padding before a repeated row: rotary positions move by as many, and with them every rounding."""


FORWARD_ARGUMENTS = ("input_ids", "attention_mask", "logits_to_keep", "batch_size")
"""What TRL gives to its forward pass after the model, in this order where it does not name them."""


FORWARD_PARAMETERS = tuple(signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)


class GRPOContact(ExactResume):
    """`trl.GRPOTrainer` with places for a subclass to act.

    A subclass acts in `on_rollout`, `on_forward`, `added_loss`, `on_loss` and `control_metrics`. Where `hooks_active`
    is False none of them is called and every step is TRL's own.
    """

    _loss_call: LossCall | None = None
    _rollout_forwards: list[RolloutForward] | None = None
    _rewards_per_func: Tensor | None = None
    _entropy_bonus_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_installed()
        super().__init__(*args, **kwargs)
        check_trainer(self)

    @property
    def hooks_active(self) -> bool:
        """Whether a subclass has anything to do: a control to run, tokens to record, turns to measure."""
        return False

    @property
    def wants_old_entropies(self) -> bool:
        """Whether the rollout's forward pass shall also yield the entropies, as `inputs["old_entropies"]`."""
        return False

    @property
    def wants_entropy_gradients(self) -> bool:
        """Whether the entropies of the loss's forward pass shall carry their graph."""
        return False

    def on_rollout(self, output: dict[str, Any], rewards: Tensor) -> None:
        """Add tensors to a scored rollout; `(B, ...)` ones are shuffled and split with it.

        Args:
            output: The rollout of this process.
            rewards: Weighted total reward of each of its completions, `(B,)`; NaN where no reward function scored it.
        """

    def rows_to_repeat(self, num_rows: int) -> Tensor | None:
        """Rows of a rollout of `num_rows` whose forward pass shall be made twice, the same number on every process."""
        return None

    def on_repeat(self, output: dict[str, Any], rows: Tensor, entropies: Tensor) -> None:
        """Compare the entropies of a second pass over these rows with their `output["old_entropies"]`."""

    def on_forward(self, call: LossCall) -> None:
        """Shape `call.inputs`, `call.loss_logps` and `call.bonus_entropies` before TRL's loss reads them."""

    def added_loss(self, call: LossCall) -> Tensor | None:
        """A scalar to add to TRL's loss, or `None`."""
        return None

    def on_loss(self, call: LossCall, inputs: dict[str, Any]) -> None:
        """Look at a finished loss; `inputs` is the micro-batch as it was before `on_forward`."""

    def control_metrics(self) -> dict[str, float]:
        """The controls' metrics since they were last logged, in the current `mode`."""
        return {}

    @property
    def mode(self) -> str:
        """`"train"` or `"eval"`, as TRL tells them apart."""
        return "train" if self.model.training else "eval"

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self.hooks_active:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self._loss_call = call = LossCall(inputs=dict(inputs), mask=loss_mask(inputs))
        try:
            loss = super().compute_loss(model, call.inputs, *args, **kwargs)
        finally:
            self._loss_call = None
        if not call.forward_done:
            raise RuntimeError(
                f"TRL {trl.__version__} computes its loss without `_get_per_token_logps_and_entropies`, so the "
                "entropy controls cannot act. Install a supported version of TRL."
            )
        added = self.added_loss(call)
        self.on_loss(call, inputs)
        return loss if added is None else loss + added

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        forwards = None if model is self.ref_model else self._rollout_forwards
        if forwards is not None:
            kwargs["compute_entropy"] = True
        call, bonus_enabled = self._loss_call, self._entropy_bonus_enabled
        if call is not None and self.wants_entropy_gradients:
            self._entropy_bonus_enabled = True  # TRL below 1.16 detaches the entropies otherwise
        try:
            result = self._forward(model, *args, **kwargs)
        finally:
            self._entropy_bonus_enabled = bonus_enabled
        logps, entropies = result[:2]
        if forwards is not None:
            # TRL's first is that of the policy; with LoRA the reference's comes later and is the same module
            repeated = None if forwards else self._repeat_rows(model, *args, **kwargs)
            forwards.append(RolloutForward(logps, entropies, repeated))
        if call is not None and not call.forward_done:
            call.forward_done, call.logps, call.loss_logps = True, logps, logps
            call.entropies = call.bonus_entropies = entropies
            self.on_forward(call)
            result = (call.loss_logps, call.bonus_entropies, *result[2:])
        return result

    def _forward(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """TRL's forward pass; where a control reads it, without logits of minus infinity, and in float32 at least.

        FSDP may cast what a model returns to 16 bits, in which importance ratios overflow and entropies vanish.
        """
        if not self.hooks_active:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with finite_logits(model, self.temperature):
            logps, entropies, *others = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        return in_float32(logps), None if entropies is None else in_float32(entropies), *others

    def rollout_pass(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of a rollout for which TRL has made no forward pass, `(B, T)` each."""
        completion = output["completion_ids"]
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, entropies, *_ = self._forward(
                self.model,
                torch.cat([output["prompt_ids"], completion], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                completion.shape[1],
                self.args.per_device_train_batch_size,
                compute_entropy=True,
                **{name: output[name] for name in FORWARD_PARAMETERS if name in output},  # of images
            )
        return logps, entropies

    def _repeat_rows(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """Some rows of a rollout's forward pass again, with more padding; no random number is drawn for good."""
        given = dict(zip(FORWARD_ARGUMENTS, args, strict=False)) | kwargs
        rows = self.rows_to_repeat(len(given["input_ids"]))
        if rows is None:
            return None
        rows = rows.to(given["input_ids"].device)
        padded = {
            name: nn.functional.pad(given[name][rows], (REPEAT_PADDING, 0)) for name in ("input_ids", "attention_mask")
        }
        device = self.accelerator.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
            _, entropies, *_ = self._forward(
                model,
                **padded,
                logits_to_keep=given["logits_to_keep"],
                batch_size=given.get("batch_size"),
                compute_entropy=True,
            )
        return rows, entropies

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if not self.hooks_active:
            return super()._generate_and_score_completions(inputs)
        self._rollout_forwards = [] if self.wants_old_entropies else None
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            forwards, self._rollout_forwards = self._rollout_forwards, None
        check_rollout(output)
        old_logps = output.get("old_per_token_logps")
        if forwards is not None and old_logps is not None:
            forward = self._forward_of(old_logps, forwards)
            output["old_entropies"] = forward.entropies
            if forward.repeated is not None:
                self.on_repeat(output, *forward.repeated)
        self.on_rollout(output, self._local_rewards(len(output["completion_ids"])))
        return output

    @staticmethod
    def _forward_of(old_logps: Tensor, forwards: list[RolloutForward]) -> RolloutForward:
        """The forward pass whose log-probs are, by identity, TRL's `old_per_token_logps`."""
        for forward in forwards:
            if forward.logps is old_logps:
                return forward
        raise RuntimeError(
            f"TRL {trl.__version__} does not take `old_per_token_logps` from `_get_per_token_logps_and_entropies` as "
            "it is, so the rollout's entropies are unknown. Install a supported version of TRL."
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _local_rewards(self, num_completions: int) -> Tensor:
        """Weighted total reward of this process's completions, `(B,)`; NaN where no reward function scored one."""
        if self._rewards_per_func is None:
            raise RuntimeError(
                f"TRL {trl.__version__} scores a rollout without `_calculate_rewards`, so its rewards are unknown. "
                "Install a supported version of TRL."
            )
        start = self.accelerator.process_index * num_completions
        rewards = self._rewards_per_func[start : start + num_completions]
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return torch.where(rewards.isnan().all(dim=1), torch.nan, total)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.hooks_active:
            for name, value in self.control_metrics().items():
                self._metrics[self.mode][name].append(value)
        super().log(logs, start_time)
