"""The recorder: what every control did to a sample of the tokens of each optimizer step, and to a few completions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..controls import CONTROLS, ENTROPY_FLOOR, TokenMean, clipped_by_ppo, entropy_ratio, log_importance_weight
from ..controls.control import PPO_CLIP_LOSSES
from ..controls.importance import ratio_of
from ..controls.turns import turn_indices
from .record import COUNTS, FLAGS, FLOATS, FOLDER, cut_after, write_rows

MAX_SAMPLED = 1_000_000
"""Sampled tokens of a process in a run, some 30 MB; a longer run is recorded at every second, third, ... step."""
MAX_ROLLOUTS = 200
"""Rollouts of a run with whole completions; those of a longer run are thinned out evenly."""
WHOLE_COMPLETIONS = 2
"""Completions of such a rollout that a process records whole, at the rollout's last optimizer step."""
WHOLE_TOKENS = 512
"""Tokens that are kept of the start of a whole completion."""
PROMPT_TOKENS = 256
"""Tokens that are kept of the end of its prompt."""
ROWS_PER_FILE = 20_000

METRIC_OF_FLAG = {mark.column: mark.metric for control in CONTROLS for mark in control.marks}
"""What the controls did is what they counted."""
MEASURED = (*COUNTS, *FLOATS, *FLAGS)
PRESENT = "present"


@dataclass(frozen=True)
class RecordedMicroBatch:
    """One micro-batch of an optimizer step, as the recorder reads it.

    Attributes:
        inputs: The micro-batch before any control shaped it.
        mask: True for the tokens that the model wrote and that count, bool `(B, T)`.
        logps: Log-probs of the sampled tokens under the policy being trained, `(B, T)`.
        entropies: Its entropies, nats, `(B, T)`.
        metrics: What the controls counted.
        step: The optimizer step, from 1.
        micro_step: Micro-batches of this process before this one, since the start of the training.
        shaped: The micro-batch as the controls shaped it, which is what TRL's loss read; `None` for `inputs`.
        frozen: Tokens that are constants of their sequence's ratio, bool `(B, T)`; `None` for none.
    """

    inputs: Mapping[str, Any]
    mask: Tensor
    logps: Tensor
    entropies: Tensor
    metrics: Mapping[str, TokenMean]
    step: int
    micro_step: int
    shaped: Mapping[str, Any] | None = None
    frozen: Tensor | None = None


@dataclass(frozen=True)
class Schedule:
    """How micro-batches make up optimizer steps and rollouts.

    Attributes:
        micro_per_step: Micro-batches of an optimizer step.
        micro_per_rollout: Micro-batches of a rollout, all its iterations counted.
        max_steps: Optimizer steps of the run.
    """

    micro_per_step: int
    micro_per_rollout: int
    max_steps: int

    def tokens(self, num_tokens: int, batch: RecordedMicroBatch) -> int:
        """How many of a step's `num_tokens` are sampled from this micro-batch."""
        every = math.ceil(self.max_steps * num_tokens / MAX_SAMPLED)
        if batch.step % every:
            return 0
        index = batch.micro_step % self.micro_per_step
        return (index + 1) * num_tokens // self.micro_per_step - index * num_tokens // self.micro_per_step

    def takes_whole(self, batch: RecordedMicroBatch) -> bool:
        """Whether whole completions are recorded: at a rollout's last micro-batch, its most off-policy one."""
        rollouts = math.ceil(self.max_steps * self.micro_per_step / self.micro_per_rollout)
        every = math.ceil(rollouts / MAX_ROLLOUTS)
        last = (batch.micro_step + 1) % self.micro_per_rollout == 0
        return last and batch.micro_step // self.micro_per_rollout % every == 0


class TokenRecorder:
    """Samples tokens on the device and writes them, a copy and a file every `ROWS_PER_FILE` rows or checkpoint.

    It draws from a generator of its own and waits for the device only when it writes, so a training that is recorded
    is bit for bit the one that is not. Which tokens it draws depends on the seed and the step alone.

    Args:
        run_folder: The run's `output_dir`; files go to `tokens/` in it.
        num_tokens: Tokens per optimizer step and process, at least 1.
        tokenizer: Gives the tokens' text.
        settings: Fields of the configuration that the figures need; JSON values.
        process: Index of this process.
        num_processes: Number of processes.
        seed: Seeds the choice of tokens.
        level: `importance_sampling_level`.
        loss_type: TRL's.
        delta: Dual clip, see `Context`.
        clip_range: `eps_low` and `eps_high`.
        entropy_floor: Floor of the entropy ratio, nats.
    """

    def __init__(
        self,
        run_folder: str,
        num_tokens: int,
        tokenizer: Any,
        settings: Mapping[str, Any],
        *,
        process: int,
        num_processes: int,
        seed: int,
        level: str,
        loss_type: str = "dapo",
        delta: float | None = None,
        clip_range: Mapping[str, float],
        entropy_floor: float = ENTROPY_FLOOR,
    ) -> None:
        self._folder, self._num_tokens, self._settings = Path(run_folder, FOLDER), num_tokens, settings
        self._process, self._num_processes, self._seed = process, num_processes, seed
        self._loss_type, self._delta = loss_type, delta
        self._level, self._clip_range, self._entropy_floor = level, clip_range, entropy_floor
        self._tokenizer, self._texts = tokenizer, dict[int, str]()
        self._generator: torch.Generator | None = None
        self._blocks: list[tuple[dict[str, int], Tensor]] = []

    def start(self, step: int, schedule: Schedule) -> None:
        """Begin after optimizer step `step`, 0 for a new run: rows of later steps, which are made anew, are removed.

        Called on every process, before any of them writes.
        """
        self._schedule, self._blocks = schedule, []
        cut_after(self._folder, step, process=self._process, num_processes=self._num_processes)

    def add(self, batch: RecordedMicroBatch) -> None:
        """Record what the sampling takes of one micro-batch; without a synchronisation with the device."""
        num_tokens, whole = self._schedule.tokens(self._num_tokens, batch), self._schedule.takes_whole(batch)
        if not num_tokens and not whole:
            return
        if self._num_rows >= ROWS_PER_FILE and batch.step > self._blocks[-1][0]["step"]:
            self.flush()
        columns = self._columns(batch)
        about = {"step": batch.step, "rollout": batch.micro_step // self._schedule.micro_per_rollout}
        if num_tokens:
            chosen = self._choose(batch, num_tokens)
            columns[PRESENT] = batch.mask
            block = torch.stack([columns[name].flatten()[chosen].float() for name in (*MEASURED, PRESENT)])
            self._blocks.append(({**about, "whole": 0}, block))
        if whole:
            self._blocks.append(({**about, "whole": 1}, _whole_completions(columns, batch.inputs)))

    def flush(self) -> None:
        """Write what has been recorded since the last file."""
        if not self._blocks:
            return
        abouts, blocks = zip(*self._blocks, strict=True)
        self._blocks = []
        values: NDArray[np.float32] = torch.cat(blocks, dim=1).cpu().numpy()
        sizes = [block.shape[1] for block in blocks]
        present = values[-1] == 1.0
        columns: dict[str, Any] = {name: row[present] for name, row in zip(MEASURED, values[:-1], strict=True)}
        for name in abouts[0]:
            columns[name] = np.repeat([about[name] for about in abouts], sizes)[present]
        columns["process"] = np.full(len(columns["step"]), self._process)
        columns["token"] = [self._text(int(token)) for token in columns["token_id"]]
        first_step = abouts[0]["step"]
        write_rows(self._folder, columns, self._settings, process=self._process, first_step=first_step)

    @property
    def _num_rows(self) -> int:
        return sum(block.shape[1] for _, block in self._blocks)

    def _choose(self, batch: RecordedMicroBatch, num_tokens: int) -> Tensor:
        """Flat indices of a uniform sample of the tokens where the mask is True, without replacement."""
        device = batch.mask.device
        if self._generator is None:
            self._generator = torch.Generator(device)
        # by step rather than from where the last draw ended: a resumed run draws what an uninterrupted one does
        self._generator.manual_seed((self._seed * 1_000_003 + batch.micro_step) * 1009 + self._process)
        scores = torch.rand(batch.mask.shape, generator=self._generator, device=device)
        scores = scores.masked_fill(~batch.mask, -1.0).flatten()
        return scores.topk(min(num_tokens, len(scores)), sorted=False).indices

    def _columns(self, batch: RecordedMicroBatch) -> dict[str, Tensor]:
        """Every measured column, `(B, T)`; NaN where the run does not have it."""
        inputs, mask, logps = batch.inputs, batch.mask, batch.logps
        on_policy = inputs.get("old_per_token_logps") is None
        old_logps: Tensor = logps if on_policy else inputs["old_per_token_logps"]
        absent = torch.full((), torch.nan, device=mask.device)
        old_entropies = batch.entropies if on_policy else inputs.get("old_entropies", absent.expand_as(mask))
        advantages = inputs["advantages"]
        advantages = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(logps)
        ratio = ratio_of(log_importance_weight(logps, old_logps, mask, self._level))
        low, high = clipped_by_ppo(ratio, advantages, **self._clip_range)
        completion = inputs.get("completion_index", absent)
        found = {
            "completion": completion.unsqueeze(-1) if completion.dim() else completion,
            "position": torch.arange(mask.shape[1], device=mask.device),
            "turn": turn_indices(mask),
            "token_id": inputs["completion_ids"],
            "lp_old": old_logps,
            "lp": logps,
            "H_old": old_entropies,
            "H": batch.entropies,
            "A": advantages,
            "gradient": self._gradient(batch),
            "ratio": ratio,
            "entropy_ratio": entropy_ratio(batch.entropies, old_entropies, self._entropy_floor),
            "written": mask,
            "ppo_low": low,
            "ppo_high": high,
            **{name: inputs[name] for name in ("value_mean", "value_std") if name in inputs},
            **{flag: batch.metrics[key].value for flag, key in METRIC_OF_FLAG.items() if key in batch.metrics},
        }
        return {name: found.get(name, absent).expand_as(mask) for name in MEASURED}

    def _gradient(self, batch: RecordedMicroBatch) -> Tensor:
        """What the policy loss multiplies each token's gradient with, by the shaped tokens, `(B, T)`.

        NaN for the loss types SAPO and VESPO, which weigh tokens otherwise.
        """
        shaped, logps, mask = batch.shaped or batch.inputs, batch.logps, batch.mask
        old_logps, advantages = shaped.get("old_per_token_logps"), shaped["advantages"]
        advantages = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(logps)
        old_logps = logps if old_logps is None else old_logps
        ratio = ratio_of(log_importance_weight(logps, old_logps, mask, self._level))
        weighted = shaped.get("importance_sampling_ratio", 1.0) * advantages
        if self._loss_type == "cispo":
            return ratio.clamp(max=self._clip_range["eps_high"]) * weighted
        if self._loss_type not in PPO_CLIP_LOSSES:
            return torch.full_like(logps, torch.nan)
        low, high = clipped_by_ppo(ratio, advantages, **self._clip_range)
        dual = (advantages < 0) & (ratio > (math.inf if self._delta is None else self._delta))
        gradient = torch.where(low | high | dual, 0.0, ratio * weighted)
        if self._level == "sequence":  # every token's term moves every token of its sequence
            mean = (gradient * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
            gradient = mean.expand_as(logps)
        return gradient if batch.frozen is None else torch.where(batch.frozen, 0.0, gradient)

    def _text(self, token_id: int) -> str:
        if token_id not in self._texts:
            text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
            # SentencePiece decoders drop the space that a piece begins with
            if str(self._tokenizer.convert_ids_to_tokens(token_id)).startswith("\u2581") and text[:1] != " ":
                text = " " + text
            self._texts[token_id] = text.encode("utf-8", errors="replace").decode("utf-8")
        return self._texts[token_id]


def _whole_completions(columns: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
    """The first completions of a micro-batch (shuffled, so any) with their prompts, `(columns, tokens)`."""
    rows = slice(WHOLE_COMPLETIONS)
    completions = torch.stack([columns[name][rows, :WHOLE_TOKENS].float() for name in MEASURED])
    prompt_ids = inputs["prompt_ids"][rows, -PROMPT_TOKENS:]
    prompts = completions.new_full((len(MEASURED), *prompt_ids.shape), torch.nan)
    prompts[MEASURED.index("token_id")] = prompt_ids.float()
    prompts[MEASURED.index("completion")] = completions[MEASURED.index("completion"), :, :1]
    prompts[MEASURED.index("position")] = torch.arange(-prompt_ids.shape[1], 0, device=prompt_ids.device).float()
    prompts[MEASURED.index("turn")] = -1.0
    prompts[MEASURED.index("written")] = 0.0
    present = torch.cat(
        [inputs["prompt_mask"][rows, -PROMPT_TOKENS:], inputs["completion_mask"][rows, :WHOLE_TOKENS]], 1
    )
    block = torch.cat([torch.cat([prompts, completions], dim=2), present.float().unsqueeze(0)])
    return block.flatten(1)


class RecorderCallback(TrainerCallback):
    """Starts a recorder with the training, and has it write at the end."""

    def __init__(self, recorder: TokenRecorder, micro_per_rollout: int) -> None:
        self.recorder = recorder
        self._micro_per_rollout = micro_per_rollout

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        schedule = Schedule(args.gradient_accumulation_steps, self._micro_per_rollout, state.max_steps)
        self.recorder.start(state.global_step, schedule)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.recorder.flush()
