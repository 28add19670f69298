"""Every method that overrides one of TRL's or transformers' takes what that takes.

mypy skips TRL, whose annotations differ between releases, and so sees no override of a method of it.
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from inspect import Parameter, Signature
from typing import Any

import pytest

from tests.test_package import MODULES

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def package_classes() -> Iterator[type]:
    """The classes of this package, where their modules can be imported."""
    for name in MODULES:
        try:
            module = import_module(name)
        except ImportError:  # an extra, or PPO on a TRL without PPOTrainer
            continue
        yield from (cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == name)


def overrides() -> dict[str, tuple[Any, Any]]:
    """Functions of this package, those of mix-ins too, with those of other packages that they override."""
    found = {}
    for cls in package_classes():
        for place, owner in enumerate(cls.__mro__):
            if not owner.__module__.startswith("trl_entropy."):
                continue
            ours_or_torch = ("trl_entropy", "typing", "torch", "builtins")
            foreign = [each for each in cls.__mro__[place:] if each.__module__.split(".")[0] not in ours_or_torch]
            for name, own in vars(owner).items():
                base = next((vars(each)[name] for each in foreign if name in vars(each)), None)
                if inspect.isfunction(own) and inspect.isfunction(base) and not name.startswith("__"):
                    found[f"{owner.__qualname__}.{name} of {base.__module__}"] = (own, base)
    return found


OVERRIDES = overrides()


def differences(own: Signature, base: Signature) -> list[str]:
    """What a call that `base` takes could give and `own` would not take, or would take for something else."""
    kinds = {parameter.kind for parameter in own.parameters.values()}
    takes_all = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD} <= kinds
    ours = [each for each in own.parameters.values() if each.kind in POSITIONAL]
    theirs = [each for each in base.parameters.values() if each.kind in POSITIONAL]
    found = []
    for index, expected in enumerate(theirs):
        given = ours[index] if index < len(ours) else None
        if given is None and not takes_all:
            found.append(f"{expected.name} is not taken")
        elif given is not None and given.name != expected.name:
            found.append(f"{expected.name} is {given.name}")
        elif given is not None and given.default != expected.default:
            found.append(f"{expected.name} is {given.default} rather than {expected.default} by default")
    named = [each for each in own.parameters.values() if each.kind is Parameter.KEYWORD_ONLY]
    added = [*ours[len(theirs) :], *(each for each in named if each.name not in base.parameters)]
    found += [f"{each.name} is asked for" for each in added if each.default is Parameter.empty]
    for each in base.parameters.values():
        if each.kind is Parameter.KEYWORD_ONLY and each.name not in own.parameters and not takes_all:
            found.append(f"{each.name} is not taken")
        if each.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) and each.kind not in kinds:
            found.append(f"*{each.name} is not taken")
    return found


@pytest.mark.parametrize("name", OVERRIDES)
def test_it_takes_what_it_overrides_takes(name: str) -> None:
    own, base = map(inspect.signature, OVERRIDES[name])
    assert not differences(own, base), f"{own}, of the base {base}"


def test_the_overrides_are_found() -> None:
    expected = {"GRPOContact.compute_loss", "ExactResume.train", "AsyPPOTrainer._prepare_inputs"}
    assert expected <= {name.partition(" ")[0] for name in OVERRIDES}


def test_each_difference_is_seen() -> None:
    def base(self: Any, model: Any, trial: Any = None, *, key: int = 0, **kwargs: Any) -> None: ...
    def renamed(self: Any, network: Any, trial: Any = None, *, key: int = 0, **kwargs: Any) -> None: ...
    def other_default(self: Any, model: Any, trial: Any = 1, *, key: int = 0, **kwargs: Any) -> None: ...
    def asks(self: Any, model: Any, trial: Any = None, *, key: int = 0, more: int, **kwargs: Any) -> None: ...
    def shorter(self: Any, model: Any, *, key: int = 0, **kwargs: Any) -> None: ...
    def closed(self: Any, model: Any, trial: Any = None, *, key: int = 0) -> None: ...
    def without_key(self: Any, model: Any, trial: Any = None) -> None: ...
    def passes_on(self: Any, *args: Any, **kwargs: Any) -> None: ...

    expected = inspect.signature(base)
    assert differences(inspect.signature(renamed), expected) == ["model is network"]
    assert differences(inspect.signature(other_default), expected) == ["trial is 1 rather than None by default"]
    assert differences(inspect.signature(asks), expected) == ["more is asked for"]
    assert differences(inspect.signature(shorter), expected) == ["trial is not taken"]
    assert differences(inspect.signature(closed), expected) == ["*kwargs is not taken"]
    assert differences(inspect.signature(without_key), expected) == ["key is not taken", "*kwargs is not taken"]
    assert differences(inspect.signature(passes_on), expected) == []
