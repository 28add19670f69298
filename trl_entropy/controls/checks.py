"""Checks that several controls share: of configuration fields, and of the shapes of what they are given."""

import math
from typing import Any

import torch
from torch import Tensor


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float; a bool is neither, and NaN is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def check_not_negative(config: Any, name: str, published: str) -> None:
    """Refuse a field that is not a finite number of at least 0.

    Raises:
        ValueError: The message names the field, its value and what is `published`.
    """
    value = getattr(config, name)
    if not (is_number(value) and 0.0 <= value < math.inf):
        raise ValueError(f"{name}={value!r} must be finite and at least 0. Published: {published}.")


def check_between(config: Any, name: str, low: float, high: float, published: str) -> None:
    """Refuse a field that is not a number in `[low, high]`.

    Raises:
        ValueError: The message names the field, its value and what is `published`.
    """
    value = getattr(config, name)
    if not (is_number(value) and low <= value <= high):
        raise ValueError(f"{name}={value!r} must be in [{low:g}, {high:g}]. Published: {published}.")


def check_positive(config: Any, name: str, published: str) -> None:
    """Refuse a field that is not a finite number above 0.

    Raises:
        ValueError: The message names the field, its value and what is `published`.
    """
    value = getattr(config, name)
    if not (is_number(value) and 0.0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a finite number above 0. Published: {published}.")


def check_shapes(**tensors: tuple[Tensor | None, str]) -> None:
    """Refuse tensors that do not fit each other, by shape and dtype alone: no device is waited for.

    Args:
        **tensors: Each with its axes, such as `"B T"`, `"B"` or `""` for a number. An axis has one length in all of
            them; `"T?"` may be 1 instead, which broadcasts. `None` for a tensor that is not there. A `mask` must be
            bool.

    Raises:
        ValueError: The message names every tensor, its axes and its shape.
    """
    given = {name: (tensor, axes.split()) for name, (tensor, axes) in tensors.items() if tensor is not None}
    lengths: dict[str, int] = {}
    for tensor, axes in given.values():
        fits = tensor.dim() == len(axes) and all(
            (axis.endswith("?") and length == 1) or lengths.setdefault(axis.rstrip("?"), length) == length
            for axis, length in zip(axes, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(f"{name} ({', '.join(of)})" for name, (_, of) in given.items())
            found = ", ".join(f"{name} {tuple(value.shape)}" for name, (value, _) in given.items())
            raise ValueError(f"These shapes do not fit: {found}. Wanted: {wanted.replace('?', ' or 1')}.")
    if "mask" in given and given["mask"][0].dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {given['mask'][0].dtype}. Give mask.bool().")
