"""How much of what ERC, PPO-clip and CE-GPPO act on is rounding: measured with the trainer's own passes and steps."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from ..telemetry.rounding import Measurement, Pass, Updated
from .config import EntropyGRPOConfig
from .grpo import EntropyGRPOTrainer
from .loss_call import loss_mask
from .rollout_contact import REPEAT_PADDING

ROWS = 16
"""Completions of a probe, at least."""
TAKEN = (
    *("use_cpu", "bf16", "fp16", "tf32", "seed", "trust_remote_code", "model_init_kwargs", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("cast_lm_head_to_fp32", "chat_template_kwargs", "per_device_train_batch_size"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
    *("learning_rate", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta"),
)
"""The fields of a training run that a probe keeps, with those of ERC: what decides its forward pass and its step."""


def alternating_reward(completions: list[Any], **columns: object) -> list[float]:
    """Every other completion is right: advantages of either sign, whatever the model can do."""
    return [float(index % 2) for index in range(len(completions))]


def probe_config(config: EntropyGRPOConfig, *, max_steps: int, max_completion_length: int) -> EntropyGRPOConfig:
    """The configuration of a probe of a training run: one small rollout, used for `max_steps` optimizer steps.

    The micro-batches have the size of the run's. No ERC, CE-GPPO or other control acts on the steps, the rate is
    constant, there is no KL term and no dropout.
    """
    batch_size = config.per_device_train_batch_size
    micro_batches = -(-ROWS // batch_size)
    micro_batches += batch_size * micro_batches % 2
    rows = batch_size * micro_batches
    taken = {name: getattr(config, name) for name in TAKEN if hasattr(config, name)}
    return EntropyGRPOConfig(
        **copy.deepcopy(taken),
        output_dir=config.output_dir,
        max_steps=max_steps,
        max_completion_length=max_completion_length,
        num_generations=4 if rows % 4 == 0 else 2,
        num_iterations=max_steps,
        steps_per_generation=micro_batches,
        gradient_accumulation_steps=micro_batches,
        lr_scheduler_type="constant",
        disable_dropout=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


class RoundingProbe(EntropyGRPOTrainer):
    """An [`EntropyGRPOTrainer`] that trains a few steps on one rollout and keeps what the passes over it say.

    Args:
        *args, **kwargs: Those of the trainer. The configuration must use its one rollout for `max_steps` steps, as
            that of `probe_config` does.
        measured_steps: After which optimizer steps to measure.
        progress: Called with what is about to be done.
    """

    def __init__(
        self, *args: Any, measured_steps: tuple[int, ...], progress: Callable[[str], None] = print, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.measured_steps, self._progress = measured_steps, progress
        self._updates: list[Updated] = []
        self.add_callback(_AfterSteps(self))
        self.remove_callback(PrinterCallback)

    def measure(self) -> Measurement:
        """Sample the rollout, pass over it in every way, train and pass over it again. Once only.

        Raises:
            ValueError: If the model wrote no token that counts.
        """
        self._progress("sampling completions")
        self.train()
        rollout = self._rollout
        advantages = rollout["advantages"].cpu()
        mask = loss_mask(rollout).cpu()
        return Measurement(
            mask=mask,
            advantages=(advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand(mask.shape),
            rollout=self._base,
            layouts=self._layouts,
            float32=self._base_float32,
            updates=tuple(self._updates),
        )

    @property
    def float32_is_left_out(self) -> str | None:
        """Why there is no pass in float32, or `None` where there is one."""
        return self._why_no_float32

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not loss_mask(output).any():
            raise ValueError("The model wrote no token that counts: choose other prompts, or longer completions.")
        self._rollout = output
        self._why_no_float32 = self._float32_obstacle()
        self._progress("same weights, other batch shapes and paddings")
        self._base = self.forward_pass(output)
        self._layouts = {
            "half batches": self.forward_pass(output, batch_size=max(1, self.args.per_device_train_batch_size // 2)),
            "one by one, unpadded": self._one_by_one(output),
            "more padding": self.forward_pass(self._padded(output)),
        }
        self._base_float32 = self._float32_pass(self._base)
        return output

    def after_step(self, step: int) -> None:
        if self.accelerator.optimizer_step_was_skipped:  # by the loss scaling of float16
            self._progress(f"optimizer step {step} was skipped: its gradients overflowed float16")
        if step in self.measured_steps:
            self._progress(f"after optimizer step {step}")
            self._updates.append(self.pass_after(step))

    def pass_after(self, step: int) -> Updated:
        """The rollout's tokens with the weights as they are now, after `step` optimizer steps."""
        trained = self.forward_pass(self._rollout)
        return Updated(step, trained, self._float32_pass(trained))

    @torch.no_grad()
    def forward_pass(self, rollout: dict[str, Any], batch_size: int | None = None) -> Pass:
        """The pass that training makes over a rollout.

        Args:
            rollout: With `prompt_ids`, `prompt_mask`, `completion_ids` and `completion_mask`.
            batch_size: Rows at a time; `None` for the micro-batch of training.
        """
        input_ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        attention_mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
        logps, entropies = self._get_per_token_logps_and_entropies(
            self.model,
            input_ids,
            attention_mask,
            rollout["completion_ids"].size(1),
            batch_size or self.args.per_device_train_batch_size,
            compute_entropy=True,
        )[:2]
        length = rollout.get("length", logps.size(1))
        return Pass(logps[:, :length].float().cpu(), entropies[:, :length].float().cpu())

    def _one_by_one(self, rollout: dict[str, Any]) -> Pass:
        """Every row in a batch of its own, without its padding; what is no token stays 0."""
        logps, entropies = (torch.zeros(rollout["completion_ids"].shape) for _ in range(2))
        for row in range(len(logps)):
            masks = {side: rollout[f"{side}_mask"][row].bool() for side in ("prompt", "completion")}
            alone = {
                f"{side}_{kind}": rollout[f"{side}_{kind}"][row : row + 1, mask]
                for side, mask in masks.items()
                for kind in ("ids", "mask")
            }
            if masks["completion"].any():
                passed, where = self.forward_pass(alone), masks["completion"].cpu()
                logps[row, where], entropies[row, where] = passed.logps[0], passed.entropies[0]
        return Pass(logps, entropies)

    def _padded(self, rollout: dict[str, Any]) -> dict[str, Any]:
        def pad(values: Tensor, sides: tuple[int, int], value: int) -> Tensor:
            return torch.nn.functional.pad(values, sides, value=value)

        left, right, pad_id = (REPEAT_PADDING, 0), (0, REPEAT_PADDING), self._tokenizer.pad_token_id
        return {
            "prompt_ids": pad(rollout["prompt_ids"], left, pad_id),
            "prompt_mask": pad(rollout["prompt_mask"], left, 0),
            "completion_ids": pad(rollout["completion_ids"], right, pad_id),
            "completion_mask": pad(rollout["completion_mask"], right, 0),
            "length": rollout["completion_ids"].size(1),
        }

    def _float32_pass(self, trained: Pass) -> Pass | None:
        """The pass in float32; the one that was made where training is in float32 anyway."""
        if self._why_no_float32 is not None:
            return None
        if not self.accelerator.native_amp and not _narrow_tensors(self.model):
            return trained
        with self._in_float32():
            return self.forward_pass(self._rollout)

    def _float32_obstacle(self) -> str | None:
        """Why the weights cannot be cast to float32 for a pass, or `None`."""
        if getattr(self.model, "is_quantized", False) or getattr(self.model, "quantization_method", None):
            return "the weights are quantised"
        needed = sum(4 * tensor.numel() for tensor in _narrow_tensors(self.model))
        device = self.accelerator.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if needed > free:
            return f"the weights in float32 take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        return None

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Within it, the model's weights are cast to float32 (which changes no value) and autocast is off."""
        accelerator, model = self.accelerator, self.model
        dtypes = [(tensor, tensor.dtype) for tensor in _narrow_tensors(model)]
        handler, forward = accelerator.autocast_handler, model.forward
        for tensor, _ in dtypes:
            tensor.data = tensor.data.float()
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
        model.forward = getattr(model, "_original_forward", forward)  # without accelerate's own autocast
        try:
            yield
        finally:
            model.forward, accelerator.autocast_handler = forward, handler
            for tensor, dtype in dtypes:
                tensor.data = tensor.data.to(dtype)


class _AfterSteps(TrainerCallback):
    """Tells the probe of every finished optimizer step."""

    def __init__(self, probe: RoundingProbe) -> None:
        self._probe = probe

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._probe.after_step(state.global_step)


def _narrow_tensors(model: torch.nn.Module) -> list[Tensor]:
    """The parameters and buffers with fewer bits than float32; tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return [tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.element_size() < 4]
