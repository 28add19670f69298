"""Where the tests here compute, and how they say what they measured."""

import os
from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def device() -> str:
    """An NVIDIA GPU; with `GPU_TESTS_ON=cpu` the CPU, to try the tests."""
    chosen = os.environ.get("GPU_TESTS_ON", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return chosen


@pytest.fixture
def within(record_property: Callable[[str, object], None]) -> Callable[[float, float], None]:
    """`within(error, tolerance)`: assert it, with both in the test's record whichever way it goes."""

    def check(error: float, tolerance: float) -> None:
        record_property("error", error)
        record_property("tolerance", tolerance)
        assert error <= tolerance

    return check
