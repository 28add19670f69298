"""`entropy_controlled`: the controls for a subclass of TRL's trainer, with a configuration to match."""

import copyreg
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature, unwrap
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from .config import GRPOControls
from .contact import GRPOLoss
from .grpo import EntropyControlMixin, EntropyGRPOTrainer
from .overrides import stored_attributes
from .rloo import EntropyRLOOTrainer, RLOOControlMixin, RLOOControls, RLOOLoss


@dataclass(frozen=True)
class Family:
    """A trainer of TRL, and what puts the controls into its subclasses.

    Attributes:
        trainer: TRL's.
        config: Of its `args`.
        controls: The fields of the controls, before `config` among the bases.
        mixin: The controls, before the subclass.
        loss: After it.
        controlled: What the three make of TRL's own.
    """

    trainer: type
    config: type
    controls: type
    mixin: type
    loss: type
    controlled: Any

    @classmethod
    def of(cls, given: Any, kind: str) -> "Family | None":
        """The one whose `trainer` or `config` a class comes from; `None` for any other class or thing."""
        found = (one for one in FAMILIES if isinstance(given, type) and issubclass(given, getattr(one, kind)))
        return next(found, None)


FAMILIES = (
    Family(GRPOTrainer, GRPOConfig, GRPOControls, EntropyControlMixin, GRPOLoss, EntropyGRPOTrainer),
    Family(RLOOTrainer, RLOOConfig, RLOOControls, RLOOControlMixin, RLOOLoss, EntropyRLOOTrainer),
)


def entropy_controlled(trainer_class: type[Any], *, config_class: type[Any] | None = None) -> Any:
    """A subclass of a GRPO or RLOO trainer that has the entropy controls, named `Entropy` and the trainer's name.

    ```python
    EntropyMyTrainer = entropy_controlled(MyTrainer)
    args = EntropyMyTrainer.config_class(output_dir="run", erc_low=0.95, erc_high=1.05)
    ```

    Its `config_class` has the fields of the trainer's own configuration, with their defaults, and those of the
    controls. With no control set, training is bit for bit the trainer's own. The controls act on the advantages and
    old log-probs that TRL's loss gets from the trainer, whatever its methods made of them, and what they add to the
    loss is added to what the trainer's own `compute_loss` returns.

    Both classes are made once: a second call gives the same objects, and so does unpickling, in this process or in
    another that can import the trainer.

    Args:
        trainer_class: `trl.GRPOTrainer`, `trl.RLOOTrainer` or a subclass of one of them.
        config_class (*optional*): The dataclass of its `args`. By default it is found: in the annotation of `args` in
            the trainer's `__init__`, of the nearest base that has the argument; where that has none, the class
            `<Name>Config` in the module of a trainer `<Name>Trainer`.

    Returns:
        A subclass of `EntropyControlMixin` and `trainer_class`: `EntropyGRPOTrainer` and `EntropyRLOOTrainer` for
        TRL's own. One that has the controls is returned as it is.

    Raises:
        TypeError: If `trainer_class` is not such a class, if its configuration cannot be found or is not a dataclass
            that comes from TRL's, if a name of the controls has another meaning in one of the two, or if
            `config_class` is given with a trainer that has the controls already, and is not that trainer's.
    """
    family = Family.of(trainer_class, "trainer")
    if family is None:
        raise TypeError(
            f"{_name(trainer_class)} is not a subclass of trl.GRPOTrainer or trl.RLOOTrainer, on whose losses the "
            "controls act."
        )
    if issubclass(trainer_class, EntropyControlMixin):
        if config_class not in (None, trainer_class.config_class):
            raise TypeError(
                f"{_name(trainer_class)} has the controls already, with {_name(trainer_class.config_class)}: "
                f"config_class={_name(config_class)} would do nothing. Leave it out."
            )
        return trainer_class
    if trainer_class is family.trainer and config_class in (None, family.config):
        return family.controlled
    classes: tuple[Any, Any] = trainer_class, config_class or config_of(trainer_class)
    return _trainer(*classes)


class Made(type):
    """Of classes that are made from others: they are pickled as how they were made, a class below them by its name."""


def _reduce(cls: Made) -> tuple[Any, ...] | str:
    return vars(cls).get("_made") or cls.__qualname__


copyreg.pickle(Made, _reduce)


def _make(name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
    of_bases: Any = type(bases[1])  # such as ABCMeta
    metaclass = Made if of_bases is type else _metaclass(of_bases)
    return metaclass(name, bases, namespace)


@cache
def _metaclass(of_bases: type) -> Any:
    metaclass = type(f"Made{of_bases.__name__}", (Made, of_bases), {})
    copyreg.pickle(metaclass, _reduce)
    return metaclass


@cache
def _trainer(trainer_class: type[Any], config_class: Any) -> Any:
    family = _family(trainer_class, "trainer")
    if Family.of(config_class, "config") is not family:
        raise TypeError(f"config_class={_name(config_class)} is not a subclass of trl.{family.config.__name__}.")
    _check_names(trainer_class, family.mixin, family.trainer)
    namespace = {
        "__module__": trainer_class.__module__,
        "__doc__": f"`{trainer_class.__name__}` with the entropy controls; see `EntropyControlMixin`.",
        "_made": (_trainer, (trainer_class, config_class)),
        "_tag_names": [*getattr(trainer_class, "_tag_names", []), "trl-entropy"],
        "config_class": controlled_config(config_class),
    }
    return _make(f"Entropy{trainer_class.__name__}", (family.mixin, trainer_class, family.loss), namespace)


@cache
def controlled_config(config_class: type[Any]) -> Any:
    """A configuration with the fields of the controls beside those of a subclass of TRL's.

    Raises:
        TypeError: If `config_class` is not a dataclass that comes from TRL's, or if it gives a name of the
            controls another meaning.
    """
    family = Family.of(config_class, "config")
    if family is None:
        raise TypeError(f"config_class={_name(config_class)} is not a subclass of trl.GRPOConfig or trl.RLOOConfig.")
    if issubclass(config_class, family.controls):
        return config_class
    if config_class is family.config:
        return family.controlled.config_class
    if by_hand := [one.__name__ for one in _below(config_class, family.config) if _has_own_init(one)]:
        raise TypeError(
            f"{by_hand[0]}.__init__ is written by hand, and the fields of the controls have no place in it. Make "
            f"{by_hand[0]} a dataclass: `@dataclass` above it, its arguments as fields, the rest in `__post_init__`."
        )
    _check_names(config_class, family.controls, family.config)
    namespace = {
        "__module__": config_class.__module__,
        "__doc__": f"`{config_class.__name__}` with the fields of the entropy controls; see `GRPOControls`.",
        "_made": (controlled_config, (config_class,)),
    }
    return dataclass(_make(f"Entropy{config_class.__name__}", (family.controls, config_class), namespace))


def config_of(trainer_class: type[Any]) -> type[Any]:
    """The configuration class of a trainer, as `entropy_controlled` finds it.

    Raises:
        TypeError: If it cannot be found.
    """
    family = _family(trainer_class, "trainer")
    for cls in _below(trainer_class, family.trainer):
        init: Any = vars(cls).get("__init__")
        argument = signature(init).parameters.get("args") if init is not None else None
        if argument is None or argument.kind is Parameter.VAR_POSITIONAL:
            continue
        known = unwrap(init).__globals__  # the module need not be among those imported
        found = _annotated(known, argument, family.config) or _namesake(cls, known, family.config)
        if found is None:
            raise TypeError(
                f"The configuration class of {trainer_class.__name__} cannot be found: `args` of {cls.__name__}."
                f"__init__ is not annotated with a subclass of trl.{family.config.__name__}. Annotate it, or give the "
                f"class: entropy_controlled({trainer_class.__name__}, config_class=...)."
            )
        return found
    return family.config


def _family(given: type, kind: str) -> Family:
    found = Family.of(given, kind)
    assert found is not None
    return found


def _annotated(known: dict[str, Any], argument: Parameter, base: type) -> type | None:
    holder = SimpleNamespace(__annotations__={"args": argument.annotation})
    try:
        hint = get_type_hints(holder, known)["args"]
    except (NameError, TypeError, AttributeError):
        return None
    options = get_args(hint) or (hint,)
    return next((one for one in options if isinstance(one, type) and issubclass(one, base)), None)


def _namesake(cls: type, known: dict[str, Any], base: type) -> type | None:
    found = known.get(f"{cls.__name__.removesuffix('Trainer')}Config")
    return found if isinstance(found, type) and issubclass(found, base) else None


def _below(cls: type, base: type) -> Iterator[type]:
    """The classes that a subclass adds to a base, nearest first."""
    return (one for one in cls.__mro__ if one not in base.__mro__)


def _has_own_init(cls: type) -> bool:
    return "__init__" in vars(cls) and not ("__dataclass_params__" in vars(cls) and cls.__dataclass_params__.init)  # type: ignore[attr-defined]


def _names_of(cls: type) -> set[str]:
    """The names that a class gives a meaning: what it defines, annotates and stores on its objects."""
    defined = {*vars(cls), *vars(cls).get("__annotations__", ()), *stored_attributes(cls)}
    return {name for name in defined if name[:2] != "__"}


def _check_names(cls: type, controls: type, base: type) -> None:
    """Refuse a class in which a name of the controls means something else; what TRL has is there to be overridden."""
    package = __name__.partition(".")[0]
    own = (one for one in controls.__mro__ if one.__module__.partition(".")[0] == package)
    ours = set().union(*map(_names_of, own)).difference(*map(_names_of, base.__mro__))
    for one in _below(cls, base):
        if taken := sorted(_names_of(one) & ours):
            raise TypeError(
                f"{one.__name__} and the entropy controls both have {', '.join(taken)}, with another meaning. Rename "
                f"it in {one.__name__}."
            )


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)
