"""What an evaluation asks of its engine; its results are tested through the command, in `tests/commands`."""

from types import SimpleNamespace

import pytest

from trl_entropy.evaluation import measure


def test_the_engine_has_room_for_the_longest_of_several_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(measure, "_load", lambda arguments, checkpoint, longest: asked.append(longest))
    suites = [
        SimpleNamespace(missing=lambda: [(0, 0)], longest=longest, complete=lambda engine, batch_size: None)
        for longest in (40, 90, 60)
    ]
    measure._complete(SimpleNamespace(batch_size=8), SimpleNamespace(), suites)  # type: ignore[arg-type]
    assert asked == [90]
