"""Checks of configuration fields that several controls share."""

import math
from typing import Any


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
