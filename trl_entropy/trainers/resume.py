"""Checkpoints that resume exactly.

TRL regenerates its rollout when training resumes, and draws the prompts of later epochs anew. What is here keeps the
rollout in use and the position in the data, so that a resumed run equals an uninterrupted one, weight for weight.
"""

import json
import math
import os
import pickle
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import whole_file
from .contact_table import check_sampler

if TYPE_CHECKING:
    from trl import GRPOTrainer as Trainer
else:
    Trainer = object

ROLLOUT_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "chat_template_kwargs",
    "mask_truncated_completions",
    "beta",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "reward_weights",
    "scale_rewards",
    "multi_objective_aggregation",
)
"""The fields of `GRPOConfig` that say how a rollout is made and when it is used."""
SAVED = ("step", "num_processes", "buffered_inputs", "controls")
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError)
"""What `torch.load` raises on a file that was cut off or overwritten."""


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The checkpoint with the most steps whose saving has finished; `None` if there is none.

    A run that was killed while it saved leaves a folder without a readable `trainer_state.json`, which is passed over.
    """
    found = {}
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        steps = name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if steps != name and steps.isdecimal() and _is_complete(os.path.join(output_dir, name)):
            found[int(steps)] = os.path.join(output_dir, name)
    return found[max(found)] if found else None


def _is_complete(checkpoint: str) -> bool:
    try:
        steps_of(checkpoint)
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def on_all_processes(accelerator: Any, *flags: bool) -> list[bool]:
    """Which of these hold on every process; all of them must call it."""
    local = torch.tensor([flags], device=accelerator.device)
    return accelerator.gather(local.int()).bool().all(0).tolist()


def steps_of(checkpoint: str | os.PathLike[str]) -> int:
    with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
        return json.load(file)["global_step"]


def _setting(settings: Mapping[str, str], name: str) -> str | None:
    """A setting of a rollout; a control that a release does not know of is off."""
    return settings.get(name, "False" if name.endswith("_enabled") else None)


class ExactResume(Trainer):
    """Before a trainer of TRL that buffers rollouts: checkpoints hold that in use too, and what the controls need."""

    _train_sampler: Any = None
    _steps_before: int = 0

    def rollout_settings(self) -> dict[str, str]:
        """What the rollout in use depends on; resumed with another value of any of it, the rollout is made anew."""
        return {name: repr(getattr(self.args, name, None)) for name in ROLLOUT_SETTINGS}

    def control_state(self) -> dict[str, Any]:
        """What the controls of this process need to resume exactly: tensors, numbers and text, in lists and dicts."""
        return {}

    def load_control_state(self, state: dict[str, Any], *, own: bool) -> None:
        """Continue from `control_state()`.

        Args:
            state: From the checkpoint.
            own: Whether it is that of this process, and every process has its own. Otherwise it is that of some
                process, and what differs between them is to be left out.
        """

    def save_controls(self, checkpoint: str) -> None:
        """Write further files into the folder `checkpoint`; called on every process."""

    def load_controls(self, checkpoint: str) -> None:
        """Read what `save_controls` wrote."""

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(resume_from_checkpoint, os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
        self._steps_before = steps_of(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else 0
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """A run that is resumed from its last step has no epoch left; transformers would take one step more."""
        epochs, steps_per_epoch, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        if self._steps_before >= max_steps:
            epochs = min(epochs, self._steps_before // steps_per_epoch)
        return epochs, steps_per_epoch, *others, max_steps

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        check_sampler(self._train_sampler)
        return self._train_sampler

    def _rollout_path(self, checkpoint: str, process: int | None = None) -> str:
        process = self.accelerator.process_index if process is None else process
        return os.path.join(checkpoint, f"rollout_rank{process}.pt")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.args.save_only_model:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            checkpoint = os.path.join(self._get_output_dir(trial=trial), folder)
            os.makedirs(checkpoint, exist_ok=True)
            self.save_controls(checkpoint)
            self._save_rollout(self._rollout_path(checkpoint))
            self.accelerator.wait_for_everyone()
        # trainer_state.json, the last file that this writes, is what makes a checkpoint complete
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json comes next: not before the slowest process has saved its part
        self.accelerator.wait_for_everyone()

    def _save_rollout(self, path: str) -> None:
        in_use = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        state = {
            "step": self._step,
            "num_processes": self.accelerator.num_processes,
            "settings": self.rollout_settings(),
            "buffered_inputs": self._buffered_inputs if in_use else None,
            "controls": self.control_state(),
        }
        with whole_file(path) as part:
            torch.save(state, part)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.load_controls(checkpoint)
        # `self.state` may be that of a new run: transformers 4 reads the checkpoint's after this
        epochs, self._step = self._position(steps_of(checkpoint))
        self._advance_train_sampler(epochs)
        self._resume_rollout(checkpoint)

    def _position(self, steps: int) -> tuple[int, int]:
        """The finished epochs and micro-batches, as transformers counts them under the schedule of this run."""
        accumulation = self.args.gradient_accumulation_steps
        if self._train_sampler is None:
            return 0, steps * accumulation
        rows = self._train_batch_size * self.args.steps_per_generation * self.accelerator.num_processes
        micro_batches = max(len(self._train_sampler) // rows, 1)
        epochs, steps = divmod(steps, math.ceil(micro_batches / accumulation))
        return epochs, epochs * micro_batches + steps * accumulation

    def _resume_rollout(self, checkpoint: str) -> None:
        """Go on with the rollout in use if it is this run's, on all processes or on none."""
        state, reason = self._read_rollout(self._rollout_path(checkpoint))
        own = state is not None and state["num_processes"] == self.accelerator.num_processes
        if state is None:
            state, _ = self._read_rollout(self._rollout_path(checkpoint, process=0))
        own, known = on_all_processes(self.accelerator, own, state is not None)
        if state is not None and known:
            self.load_control_state(state["controls"], own=own)
            reason = self._other_settings(state, checkpoint) or reason
        if state is not None and own and reason is None:
            self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
        elif state is None or state["buffered_inputs"] is not None:
            reason = reason or f"another process cannot read its part of {checkpoint}"
            warnings.warn(f"{reason}: the rollout that was in use is generated anew.", stacklevel=2)

    def _read_rollout(self, path: str) -> tuple[dict[str, Any] | None, str | None]:
        """What `_save_rollout` wrote, or why there is nothing."""
        if not os.path.exists(path):
            return None, f"{path} is missing"
        # `accelerator.device` numbers the CPU by rank, which `torch.load` refuses
        device = self.accelerator.device if self.accelerator.device.type != "cpu" else "cpu"
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            return {name: state[name] for name in SAVED} | {"settings": state.get("settings", {})}, None
        except UNREADABLE as error:
            return None, f"{path} cannot be read ({type(error).__name__})"

    def _other_settings(self, state: dict[str, Any], checkpoint: str) -> str | None:
        """In words, how the checkpoint's settings of a rollout differ from this run's."""
        if not state["settings"]:
            return f"{checkpoint} does not say how its rollout was made"
        saved = {"num_processes": repr(state["num_processes"]), **state["settings"]}
        here = {"num_processes": repr(self.accelerator.num_processes), **self.rollout_settings()}
        changed = [
            f"{name}={_setting(saved, name)} (now {_setting(here, name)})"
            for name in {**here, **saved}
            if _setting(saved, name) != _setting(here, name)
        ]
        return f"{checkpoint} was saved with {', '.join(changed)}" if changed else None

    def _advance_train_sampler(self, epochs: int) -> None:
        """Draw the permutations of the finished epochs, so that the next one is the epoch's own.

        A sampler that does not shuffle has none, and a subclass's own, without `shuffle`, keeps its own account.
        """
        if getattr(self._train_sampler, "shuffle", False):
            for _ in range(epochs):
                torch.randperm(self._train_sampler.num_samples, generator=self._train_sampler.generator)
