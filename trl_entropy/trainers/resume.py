"""Checkpoints that resume exactly.

TRL regenerates its rollout when training resumes, and draws the prompts of later epochs anew. What is here keeps the
rollout in use and the position in the data, so that a resumed run equals an uninterrupted one, weight for weight.
"""

import json
import os
import warnings
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer


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
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            return "global_step" in json.load(file)
    except (OSError, ValueError):
        return False


class ExactResume(GRPOTrainer):
    """`trl.GRPOTrainer` whose checkpoints also hold the rollout in use and what the controls need."""

    _train_sampler: Any = None

    def control_state(self) -> dict[str, Any]:
        """What the controls of this process need to resume exactly: tensors, numbers and text, in lists and dicts."""
        return {}

    def load_control_state(self, state: dict[str, Any]) -> None:
        """Continue from `control_state()`."""

    def save_controls(self, checkpoint: str) -> None:
        """Write further files into the folder `checkpoint`; called on every process."""

    def load_controls(self, checkpoint: str) -> None:
        """Read what `save_controls` wrote."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _rollout_path(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"rollout_rank{self.accelerator.process_index}.pt")

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
            "buffered_inputs": self._buffered_inputs if in_use else None,
            "controls": self.control_state(),
        }
        torch.save(state, path + ".part")
        os.replace(path + ".part", path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.load_controls(checkpoint)
        self._advance_train_sampler(int(self.state.epoch or 0))
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        path = self._rollout_path(checkpoint)
        if not os.path.exists(path):
            warnings.warn(f"{path} is missing: the rollout that was in use is generated anew.", stacklevel=2)
            return
        # `accelerator.device` numbers the CPU by rank, which `torch.load` refuses
        device = self.accelerator.device if self.accelerator.device.type != "cpu" else "cpu"
        state = torch.load(path, map_location=device, weights_only=True)
        self._step = state["step"]
        self.load_control_state(state["controls"])
        if state["num_processes"] == self.accelerator.num_processes:
            self._buffered_inputs = state["buffered_inputs"]
        elif state["buffered_inputs"] is not None:
            warnings.warn(
                f"{checkpoint} was saved by {state['num_processes']} processes and is resumed by "
                f"{self.accelerator.num_processes}: the rollout that was in use is generated anew.",
                stacklevel=2,
            )

    def _advance_train_sampler(self, epochs: int) -> None:
        """Draw the permutations of the finished epochs, so that the next one is the epoch's own."""
        generator = getattr(self._train_sampler, "generator", None)
        if generator is not None:
            for _ in range(epochs):
                torch.randperm(self._train_sampler.num_samples, generator=generator)
