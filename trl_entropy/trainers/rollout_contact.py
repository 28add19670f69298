"""Where the controls touch how TRL makes and scores a rollout; `contact` has where they touch its loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import chain, repeat
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from ..controls import in_float32
from .contact_table import ROLLOUT, check_rollout
from .masked_vocabulary import finite_logits
from .overrides import described
from .resume import ExactResume
from .token_level import TokenCollector, TokenValues


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


class RolloutContact(ExactResume):
    """Before a GRPO trainer of TRL or a subclass of it: sees the rollouts that both make, and their forward passes."""

    base_class: ClassVar[type] = GRPOTrainer
    reward_funcs: list[Any]
    _rollout_forwards: list[RolloutForward] | None = None
    _rewards_per_func: Tensor | None = None
    _scored_ids: list[Any] | None = None
    _tool_masks: list[Any] | None = None
    _token_values: TokenCollector

    @classmethod
    def checked(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the names that this trainer's TRL has to have."""
        return names

    @property
    def hooks_active(self) -> bool:
        """Whether a subclass has anything to do: a control to run, tokens to record, turns to measure."""
        return False

    @property
    def reads_rollout(self) -> bool:
        """Whether a scored rollout is looked at."""
        return self.hooks_active

    @property
    def wants_old_entropies(self) -> bool:
        """Whether the rollout's forward pass shall also yield the entropies, as `inputs["old_entropies"]`."""
        return False

    @property
    def mode(self) -> str:
        """`"train"` or `"eval"`, as TRL tells them apart."""
        return "train" if self.model.training else "eval"

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

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        generated = super()._generate(*args, **kwargs)
        if isinstance(generated, tuple) and len(generated) > 2:  # as TRL's; an override may have what it likes
            self._tool_masks = generated[2]  # before TRL masks truncated completions
        return generated

    def written_tokens(self, like: Tensor) -> Tensor:
        """True for the tokens that the model wrote, bool `(B, T)` as `like`, in truncated completions too.

        Where TRL masks those, their group's mean is still with them, as in TRL's own advantages.
        """
        assert self._scored_ids is not None
        masks = self._tool_masks or [[1] * len(ids) for ids in self._scored_ids]
        rows = [torch.tensor([*mask, *[0] * (like.shape[1] - len(mask))]) for mask in masks]
        return torch.stack(rows).bool().to(like.device)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._rewards_per_func = self._scored_ids = self._tool_masks = None
        self._token_values = TokenCollector()
        self._rollout_forwards = [] if self.hooks_active and self.wants_old_entropies else None
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            forwards, self._rollout_forwards = self._rollout_forwards, None
        reads = self.hooks_active and self.reads_rollout
        found = self._token_values.found
        if self.hooks_active:
            check_rollout(output, self.checked(ROLLOUT))
        if reads or found:
            self._check_rows(output["completion_ids"])
        if found and self._scored_ids is not None:
            self.set_token_level(output, found, self._scored_ids)
        if reads:
            self._measure_rollout(output, forwards)
        return output

    def _measure_rollout(self, output: dict[str, Any], forwards: list[RolloutForward] | None) -> None:
        if forwards is not None and (forward := self._forward_of(output, forwards)) is not None:
            output["old_entropies"] = forward.entropies
            if forward.repeated is not None:
                self.on_repeat(output, *forward.repeated)
        self.on_rollout(output, self._local_rewards(len(output["completion_ids"])))

    def _forward_of(self, output: dict[str, Any], forwards: list[RolloutForward]) -> RolloutForward | None:
        """The forward pass whose log-probs are, by identity, the rollout's `old_per_token_logps`; `None` without."""
        old_logps = output.get("old_per_token_logps")
        if old_logps is None:
            return None
        for forward in forwards:
            if forward.logps is old_logps:
                return forward
        raise RuntimeError(
            f"{self._who_rolls_out()} does not take `old_per_token_logps` from `_get_per_token_logps_and_entropies` "
            f"as it is, so the rollout's entropies are unknown. {self._remedy()}"
        )

    def _who_rolls_out(self) -> str:
        return described(type(self), "_generate_and_score_completions") or f"TRL {trl.__version__}"

    def _remedy(self) -> str:
        if described(type(self), "_generate_and_score_completions") is None:
            return "Install a supported version of TRL."
        return "Call `super()._generate_and_score_completions` in it and keep the rows of what that returns, in order."

    def _check_rows(self, completion_ids: Tensor) -> None:
        """Refuse a rollout of other completions than those that were scored: their rewards and entropies are unknown.

        Raises:
            RuntimeError: Names the override that made it.
        """
        where = described(type(self), "_generate_and_score_completions")
        if where is None or self._scored_ids is None:
            return
        rows = completion_ids.tolist()
        scored = [list(ids) for ids in self._scored_ids]
        same = len(rows) == len(scored) and all(row[: len(ids)] == ids for row, ids in zip(rows, scored, strict=True))
        if not same:
            raise RuntimeError(
                f"{where} hands on other completions than `_calculate_rewards` scored last, so the rewards and "
                f"entropies of its rows are unknown to the entropy controls that need them. {self._remedy()}"
            )

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        self._scored_ids = completion_ids_list
        self._collect_from(inputs)
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _collect_from(self, inputs: Any) -> None:
        self._token_values = TokenCollector()
        if getattr(self, "rollout_func", None) is not None:
            self._token_values.take_from(inputs, "rollout_func")

    @contextmanager
    def watched_functions(self, inputs: Any) -> Iterator[None]:
        """While TRL calls the reward functions: keep what they say of single tokens; the last call counts."""
        self._collect_from(inputs)
        functions, weights = self.reward_funcs, chain(self.reward_weights.tolist(), repeat(1.0))
        named = zip(functions, self.reward_func_names, weights, strict=False)
        self.reward_funcs = [self._token_values.watch(*each) for each in named]
        try:
            yield
        finally:
            self.reward_funcs = functions

    def set_token_level(self, output: dict[str, Any], found: list[TokenValues], completion_ids: list[Any]) -> None:
        """Put what functions say of single tokens into a scored rollout."""

    def _local_rewards(self, num_completions: int) -> Tensor:
        """Weighted total reward of this process's completions, `(B,)`; NaN where no reward function scored one."""
        if self._rewards_per_func is None:
            raise RuntimeError(
                f"{self._who_rolls_out()} scores a rollout without `_calculate_rewards`, so its rewards are unknown. "
                f"{self._remedy()}"
            )
        start = self.accelerator.process_index * num_completions
        rewards = self._rewards_per_func[start : start + num_completions]
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return torch.where(rewards.isnan().all(dim=1), torch.nan, total)
