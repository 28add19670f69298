"""Reading the fields of a command from its YAML file and its command line, with every bad one refused by name.

TRL's parser takes what a YAML file has as it is: a date for a rate, a list for a number, the last of two equal keys.
"""

import math
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from trl_entropy.controls import CONTROLS
from trl_entropy.tasks.templates import shown

AT_LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_iterations": 1,
    "steps_per_generation": 1,
    "generation_batch_size": 1,
    "num_generations": 2,
    "num_generations_eval": 1,
    "max_completion_length": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "beta": 0,
    "epsilon": 0,
    "epsilon_high": 0,
    "top_k": -1,
    "top_p": 0,
    "min_p": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "eval_steps": 0,
    "max_steps": -1,
    "test_split_size": 0,
    "lora_r": 1,
    "lora_alpha": 1,
    "lora_dropout": 0,
    "seed": 0,
}
AT_MOST: dict[str, float] = {
    "adam_beta1": 1,
    "adam_beta2": 1,
    "top_p": 1,
    "min_p": 1,
    "lora_dropout": 1,
    "seed": 2**32 - 1,
}
ABOVE_0 = ("temperature", "num_train_epochs", "repetition_penalty", "delta", "top_p")
"""Ranges of fields that TRL or transformers take unchecked, or fail on with an error that does not name them."""
CHOICES = {"importance_sampling_level": ("token", "sequence"), "vllm_mode": ("server", "colocate")}
"""Likewise, for words."""


class FieldParser(TrlParser):
    """`trl.TrlParser` that checks types, ranges and names, and raises where it would print its usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` lists the fields.")

    def set_defaults_with_config(self, **values: Any) -> Any:
        hints = field_types(self.dataclass_types)
        for name, value in values.items():
            if name in hints and not _fits(value, hints[name]):
                raise ValueError(
                    f"{name}={shown(value)} is of type {type(value).__name__}, and {_words(hints[name])} is needed. "
                    "Correct it; text that YAML takes for something else needs quotes."
                )
        return super().set_defaults_with_config(**values)

    def parse_args_into_dataclasses(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        self.check(vars(self.parse_known_args(args)[0]))
        return super().parse_args_into_dataclasses(args, *more, **kwargs)

    def check(self, values: dict[str, Any]) -> None:
        """Refuse values before the dataclasses are built of them."""
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value) and (math.isnan(value) or name not in CHECKED):
                raise ValueError(f"{name}={value} is not a finite number. Set one, or leave {name} out.")


CHECKED = {name for control in CONTROLS for name in control.fields}
"""Fields whose own checks say whether infinity is a value of theirs."""


class TrainFieldParser(FieldParser):
    """With the ranges of the trainer's fields."""

    def check(self, values: dict[str, Any]) -> None:
        super().check(values)
        check_ranges(values)


def field_types(kinds: Iterable[Any]) -> dict[str, Any]:
    """The type of each field of some dataclasses."""
    hints = {kind: get_type_hints(kind) for kind in kinds}
    return {field.name: hints[kind][field.name] for kind in hints for field in fields(kind)}


def check_ranges(values: Mapping[str, Any]) -> None:
    """Refuse numbers outside the ranges above.

    Raises:
        ValueError: Names the field, its value and its range.
    """
    for name, choices in CHOICES.items():
        if values.get(name, choices[0]) not in choices:
            raise ValueError(f"{name}={values[name]!r} is unknown. Choose {' or '.join(choices)}.")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least, most = AT_LEAST.get(name, -math.inf), AT_MOST.get(name, math.inf)
        if not least <= value <= most or (name in ABOVE_0 and value <= 0):
            limits = [f"at least {least:g}"] if name in AT_LEAST and name not in ABOVE_0 else []
            limits += ["above 0"] if name in ABOVE_0 else []
            limits += [f"at most {most:g}"] if name in AT_MOST else []
            raise ValueError(f"{name}={value} must be {' and '.join(limits)}. Correct it, or leave it out.")


def read_fields(path: str) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        ValueError: If it is not a YAML mapping of names, or has one of them twice.
        OSError: If it cannot be read.
    """
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is not valid YAML: {reason}. Correct it.") from error
    if not isinstance(found, dict):
        kind = "is empty" if found is None else f"is a {type(found).__name__}"
        raise ValueError(f"{path} {kind}, and a mapping is needed: a line `field: value` for each field.")
    for name in found:
        if not isinstance(name, str):
            raise ValueError(f"{path} has the field {shown(name)}, which is no name. Correct it.")
    return found


class _Loader(yaml.SafeLoader):
    """Takes no key twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a YAML file may stand for a type. Text may for a number: the parser reads it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if kind is Any or origin is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return kind is Any or isinstance(value, str | int | float)
    if kind is type(None) or value is None:
        return value is None  # YAML's null leaves the field as it is
    if kind in (bool, int, float):
        return isinstance(value, str) or (value.__class__ in ((int, float) if kind is float else (kind,)))
    if origin is list or kind is list:
        items = arguments[0] if arguments else Any
        # one may stand for a list of one
        return all(_fits(item, items) for item in (value if isinstance(value, list) else [value]))
    if origin is dict or kind is dict:
        return isinstance(value, dict | str)
    if is_dataclass(kind):
        return _fits_fields(value, kind)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _fits_fields(value: Any, kind: Any) -> bool:
    """Whether a value may stand for a dataclass: a mapping of its fields, such as one of TRL's `datasets`."""
    hints = get_type_hints(kind)
    needed = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    is_mapping = isinstance(value, dict) and needed <= value.keys() <= hints.keys()
    return is_mapping and all(_fits(value[name], hints[name]) for name in value)


def _words(kind: Any) -> str:
    arguments = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return " or ".join(_word(one) for one in arguments if one is not type(None))


def _word(kind: Any) -> str:
    items = get_args(kind)
    if items and is_dataclass(items[0]):
        return f"a list of mappings of {', '.join(field.name for field in fields(items[0]))}"
    return str(kind) if items else getattr(kind, "__name__", str(kind))


def arguments_of(argv: list[str] | None) -> list[str]:
    """The arguments of the command line, with `--config FILE` for `--config=FILE`, the one form that TRL reads."""
    argv = sys.argv[1:] if argv is None else argv
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
