"""Each test counts the environments that it makes."""

import pytest

from tests.tasks.countdown import Countdown


@pytest.fixture(autouse=True)
def _fresh():
    Countdown.made = []
