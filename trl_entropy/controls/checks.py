"""Checks of configuration fields that several controls share."""

import math
from typing import Any


def check_not_negative(config: Any, name: str, published: str) -> None:
    """Refuse a field that is not a finite number of at least 0.

    Raises:
        ValueError: The message names the field, its value and what is `published`.
    """
    value = getattr(config, name)
    if not (value >= 0.0 and math.isfinite(value)):
        raise ValueError(f"{name}={value} must be finite and at least 0. Published: {published}.")


def check_between(config: Any, name: str, low: float, high: float, published: str) -> None:
    """Refuse a field that is not a number in `[low, high]`.

    Raises:
        ValueError: The message names the field, its value and what is `published`.
    """
    value = getattr(config, name)
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must be in [{low:g}, {high:g}]. Published: {published}.")
