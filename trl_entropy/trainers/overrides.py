"""What a subclass of a TRL trainer overrides, and whether its override hands on to TRL's own method."""

import dis
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from types import CodeType
from typing import Any

from ..controls import Control, controls_of
from .config import ControlChecks


def _acts_in_the_loss(control: Control) -> bool:
    """Whether it shapes what TRL's loss reads, or leaves the work to an option of that loss."""
    return control.shape is not None or control.target_loop is not None


def _reads_the_rollout(control: Control) -> bool:
    return any((control.on_rollout, control.on_repeat, control.needs_old_entropies, control.needs_rollout_pass))


Limit = tuple[Callable[[Control], bool], bool, str]
LIMITS: dict[str, Limit] = {
    "GMPOTrainer": (
        _acts_in_the_loss,
        False,
        "whose loss takes one advantage and one ratio per completion and has no entropy bonus",
    ),
    "GRPOWithReplayBufferTrainer": (
        _reads_the_rollout,
        True,
        "which puts completions of earlier rollouts among the new ones, without their rewards and entropies",
    ),
}
"""Trainers of TRL that not every control can act in: which cannot, whether the record of tokens cannot, and why. None
of them has a place for what functions say of single tokens."""


def check_reach(trainer_class: Any, config: ControlChecks) -> None:
    """Refuse the controls that cannot act in a trainer.

    Raises:
        ValueError: Names the settings, the trainer and the reason.
    """
    own = own_loss(trainer_class)
    for control in () if trainer_class.has_critics else controls_of(config):
        if control.comes_with_critics:
            _refuse(config.settings_text(control), f"{trainer_class.__name__}, which has no critics")
    for where, (refused, recording, _) in _limits(trainer_class):
        for control in filter(refused, controls_of(config)):
            _refuse(config.settings_text(control), where)
        if recording and config.recording_enabled:
            _refuse(f"record_tokens={config.record_tokens}", where)
    for control in controls_of(config) if own else ():
        if control.target_loop is not None and control.shape is None and control.loss is None:
            _refuse(config.settings_text(control), f"{own}, which takes the place of TRL's entropy bonus")
    if own and config.recording_enabled:
        warnings.warn(
            f"record_tokens={config.record_tokens}: the recorded weight of a token is that in TRL's loss, which {own} "
            "takes the place of.",
            UserWarning,
            stacklevel=4,
        )


def refuse_token_level(trainer_class: type, given: str) -> None:
    """Refuse what a function says of single tokens where a trainer has no place for it.

    Raises:
        ValueError: Names the field and its function, the trainer and the reason.
    """
    for where, _ in _limits(trainer_class):
        _refuse(given, where)


def _limits(trainer_class: type) -> Iterator[tuple[str, Limit]]:
    """The limits of a trainer, each with the trainer and the reason in words."""
    for cls in trainer_class.__mro__:
        if cls.__name__ in LIMITS and cls.__module__.startswith("trl."):
            yield f"{cls.__name__}, {LIMITS[cls.__name__][2]}", LIMITS[cls.__name__]


def _refuse(settings: str, where: str) -> None:
    raise ValueError(f"{settings} cannot be used with {where}. Leave it out, or use another trainer.")


def own_loss(trainer_class: type) -> str | None:
    """The method of a subclass that takes the place of TRL's loss, as `Class.method`; `None` for none."""
    return own_method(trainer_class, "_compute_loss") or own_method(trainer_class, "compute_loss", "_compute_loss")


def overrides(trainer_class: type, name: str) -> Iterator[tuple[str, Any]]:
    """The methods of this name that stand before TRL's own, outermost first, each as `Class.method` with its function.

    Those of this package, which all hand on, are left out.
    """
    for cls in trainer_class.__mro__:
        if cls.__module__.startswith(("trl.trainer.", "transformers.")):
            return
        if name in vars(cls) and cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
            yield f"{cls.__name__}.{name}", vars(cls)[name]


def own_method(trainer_class: type, name: str, *onward: str) -> str | None:
    """The override that takes the place of TRL's method, as `Class.method`; `None` where all hand on to it.

    A method hands on where its code names itself, as `super().name(...)` does, or one of the methods `onward`.
    """
    found = overrides(trainer_class, name)
    return next((where for where, method in found if not _names(method, {name, *onward})), None)


def described(trainer_class: type, *names: str) -> str | None:
    """The overrides of these methods, in words; `None` for none."""
    found = [where for name in names for where, _ in overrides(trainer_class, name)]
    return " and ".join(found) or None


def _names(method: Any, names: set[str]) -> bool:
    """Whether the code of a method has one of these names; True where there is no code to read."""
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    return code is None or any(names & set(each.co_names) for each in _codes(code))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def stored_attributes(cls: type) -> set[str]:
    """The attributes that the methods of a class store on its objects, as `self.name = ...` does."""
    methods = (value for value in vars(cls).values() if callable(value) and not isinstance(value, staticmethod))
    codes = (getattr(inspect.unwrap(method), "__code__", None) for method in methods)
    return {name for code in codes if code is not None and code.co_argcount for name in _stored(code)}


@cache
def _stored(method: CodeType) -> frozenset[str]:
    return frozenset(_stores(method, method.co_varnames[0]))


def _stores(code: CodeType, this: str) -> Iterator[str]:
    # a large number of a name is a step of its own before the one that it belongs to
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for before, step in pairwise(steps):
        # some releases of Python load two variables in one step
        loaded = before.argval if isinstance(before.argval, tuple) else (before.argval,)
        if step.opname == "STORE_ATTR" and this in loaded[-1:]:
            yield step.argval
    for inner in code.co_consts:
        # in a function within it this name may be another object's
        if isinstance(inner, CodeType) and this in inner.co_freevars:
            yield from _stores(inner, this)
