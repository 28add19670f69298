"""Where the controls touch TRL's asynchronous trainer.

Its loss reads the advantages and the old log-probs before its forward pass, and the controls need the forward pass to
decide what they shall be. So that loss is called twice around one forward pass: the first call ends at its forward
pass, whose outputs are kept, and the second gets these outputs and what the controls made of the inputs. No line of
that loss is repeated here, and nothing is assumed of what it does with the inputs before the forward pass.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import trl
from torch import Tensor

from .contact_table import check_async_batch, check_async_trainer, check_async_type, check_installed
from .masked_vocabulary import finite_logits

WHERE = (
    "trl",
    "trl.trainer.async_grpo_trainer",
    "trl.trainer.async_grpo_config",
    "trl.experimental.async_grpo",
)
"""Modules that may have TRL's asynchronous trainer and its configuration, the stable ones first."""


def find(name: str) -> Any:
    """A class of TRL's asynchronous trainer, wherever this release has it.

    Raises:
        ImportError: If it has none, or what it has cannot be imported: for another package that is not installed.
    """
    cause: Exception | None = None
    for module in WHERE:
        try:
            found = getattr(import_module(module), name, None)
        except (ImportError, RuntimeError) as error:
            if not (getattr(error, "name", None) or "").startswith("trl"):
                cause = error  # a module that TRL has, and that cannot be imported
            continue
        if found is not None:
            return found
    if cause is not None:
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        remedy = f" Asynchronous GRPO needs it: pip install {missing}" if missing else ""
        raise ImportError(f"TRL {trl.__version__}'s {name} cannot be imported: {cause}.{remedy}") from cause
    raise ImportError(
        f"TRL {trl.__version__} has no {name}: asynchronous GRPO needs a TRL that has it. Install one: pip install "
        "'trl==1.16.*'"
    )


AsyncGRPOTrainer: Any = find("AsyncGRPOTrainer")
AsyncGRPOConfig: Any = find("AsyncGRPOConfig")


@dataclass(frozen=True)
class Completions:
    """The trained tokens of a packed row, laid out as one row a completion.

    A completion's first trained token is in column 0. Between two of its turns there are columns without a token, as
    many as there are tokens that the model did not write.

    Attributes:
        packed: Where each of the `M` trained tokens stands among the columns of the packed row, `(M,)` each.
        rows: Its completion, `(M,)`.
        columns: Its column, `(M,)`.
        starts: Position of each completion's first trained token in its sample, `(S,)`; 0 for one without any.
        shape: Completions and columns, `(S, T)`.
    """

    packed: tuple[Tensor, ...]
    rows: Tensor
    columns: Tensor
    starts: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, inputs: dict[str, Tensor]) -> "Completions":
        """Those of a micro-batch of one process, as TRL's collator packs it."""
        packed = (inputs["token_index"] >= 0).nonzero(as_tuple=True)
        rows = inputs["segment_id"][packed]
        # a token is scored where the one before it stands
        positions = inputs["position_ids"].flatten()[inputs["token_index"][packed]] + 1
        starts = positions.new_zeros(int(rows.max()) + 1)
        starts = starts.scatter_reduce(0, rows, positions, "amin", include_self=False)
        columns = positions - starts[rows]
        return cls(packed, rows, columns, starts, (len(starts), int(columns.max()) + 1))

    @property
    def mask(self) -> Tensor:
        """True where there is a trained token, bool `(S, T)`."""
        return self.unpack(torch.ones_like(self.rows, dtype=torch.bool))

    def unpack(self, flat: Tensor, absent: float = 0.0) -> Tensor:
        """Values of the trained tokens, `(M,)`, as `(S, T)`; with their graph."""
        return flat.new_full(self.shape, absent).index_put((self.rows, self.columns), flat)

    def pack(self, dense: Tensor) -> Tensor:
        """The way back."""
        return dense.expand(self.shape)[self.rows, self.columns]


@dataclass
class AsyncLossCall:
    """One call of TRL's loss, after its forward pass.

    Attributes:
        model: The policy, in its wrapper.
        inputs: The micro-batch of this process as it is given, `(1, ...)`.
        run: The forward pass anew, with the same model inputs: returns the outputs.
        completions: Where the tokens are.
        outputs: Of the forward pass.
        shaped: What TRL's loss shall read instead of some of `inputs`.
    """

    model: Any
    inputs: dict[str, Any]
    run: Callable[[], Any]
    completions: Completions
    outputs: Any
    shaped: dict[str, Tensor]

    def unpacked(self, name: str) -> Tensor:
        """A column of the micro-batch, such as `"advantages"`, `(S, T)`."""
        return self.unpack(self.inputs[name])

    def unpack(self, column: Tensor) -> Tensor:
        """The same of a column at hand, `(1, M)`."""
        return self.completions.unpack(column[self.completions.packed])

    def read(self, outputs: Any, name: str) -> Tensor:
        """`"log_probs"` or `"entropy"` of some outputs at the trained tokens, `(S, T)`."""
        index = self.inputs["token_index"][self.completions.packed]
        return self.completions.unpack(getattr(outputs, name).flatten()[index])

    def shape(self, name: str, dense: Tensor) -> None:
        """Let TRL's loss read these values, `(S, T)`, as the column `name`."""
        column = self.inputs[name].clone()
        column[self.completions.packed] = self.completions.pack(dense).to(column.dtype)
        self.shaped[name] = column


class _ForwardDone(Exception):
    """Ends TRL's loss at its forward pass."""


class AsyncContact(AsyncGRPOTrainer):
    """TRL's asynchronous trainer with places for a subclass to act.

    A subclass acts in `on_forward`, `added_loss`, `add_columns` and `control_metrics`. Where
    `hooks_active` is False none of them is called and every step is TRL's own.
    """

    synced = 0
    """How often the weights have been handed over since this trainer was made, the same on all processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_installed()
        check_async_type(AsyncGRPOTrainer)
        super().__init__(*args, **kwargs)
        check_async_trainer(self)

    @property
    def hooks_active(self) -> bool:
        """Whether a control is on, or there are tokens to record."""
        return False

    def on_forward(self, call: AsyncLossCall) -> None:
        """Shape what TRL's loss reads."""

    def added_loss(self, call: AsyncLossCall) -> Tensor | None:
        """A scalar to add to TRL's loss, or `None`."""
        return None

    def on_sync(self) -> None:
        """The weights have been handed over as version `synced`."""

    def tag(self, sample: Any) -> None:
        """Look at a sample that has come out of the rollout queue; only `sample.metrics` goes further with it."""

    def add_columns(self, rows: Any, batch: dict[str, Any]) -> None:
        """Add columns `(processes, ...)`, or dicts of them, to a micro-batch that was made of packed `rows`.

        Called on the main process.
        """

    def control_metrics(self) -> dict[str, float]:
        """The controls' metrics since they were last logged."""
        return {}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self.hooks_active:
            return super().compute_loss(model, inputs, *args, **kwargs)
        check_async_batch(inputs)
        call, seconds = self._first_call(model, inputs, *args, **kwargs)
        self.on_forward(call)
        loss = super().compute_loss(lambda *_, **__: call.outputs, {**inputs, **call.shaped}, *args, **kwargs)
        self._step_forward_s += seconds
        added = self.added_loss(call)
        return loss if added is None else loss + added

    def _first_call(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[AsyncLossCall, float]:
        """TRL's loss up to its forward pass, and the seconds that this took."""
        made = []

        def forward(*model_args: Any, **model_kwargs: Any) -> Any:
            def run() -> Any:
                with finite_logits(model, self.temperature):
                    return model(*model_args, **model_kwargs)

            start = time.time()
            made.append((run(), run, time.time() - start))
            raise _ForwardDone

        try:
            super().compute_loss(forward, inputs, *args, **kwargs)
        except _ForwardDone:
            outputs, run, seconds = made[0]
            return AsyncLossCall(model, inputs, run, Completions.of(inputs), outputs, {}), seconds
        raise RuntimeError(
            f"TRL {trl.__version__} computes its asynchronous loss without calling the model that it is given, so the "
            "entropy controls cannot act. Install a supported version of TRL."
        )

    def _sync_weight(self) -> None:
        super()._sync_weight()
        self.synced += 1
        self.on_sync()

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self.hooks_active and self.accelerator.is_main_process:
            self._rollout_dataset.queue = _TaggedQueue(self._rollout_dataset.queue, self.tag)
            inner = getattr(loader, "base_dataloader", loader)
            inner.collate_fn = _WithColumns(inner.collate_fn, self.add_columns)
        return loader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.hooks_active:
            for name, value in self.control_metrics().items():
                self._metrics["train"][name].append(value)
        super().log(logs, start_time)


class _TaggedQueue:
    """A rollout queue that shows every sample to `tag` before it hands it on."""

    def __init__(self, queue: Any, tag: Callable[[Any], None]) -> None:
        self._queue, self._tag = queue, tag

    def get(self, *args: Any, **kwargs: Any) -> Any:
        sample = self._queue.get(*args, **kwargs)
        self._tag(sample)
        return sample

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class _WithColumns:
    """A collator that adds columns to what another one makes."""

    def __init__(self, collate: Callable[[Any], dict[str, Tensor]], add_columns: Callable[..., None]) -> None:
        self._collate, self._add_columns = collate, add_columns

    def __call__(self, examples: Any) -> dict[str, Tensor]:
        batch = self._collate(examples)
        self._add_columns(examples[0], batch)
        return batch
