"""Ages of samples: what is counted of each, and what the report draws."""

from pathlib import Path

import pytest
import torch

from trl_entropy.telemetry.figures import draw
from trl_entropy.telemetry.metrics import TokenMeans
from trl_entropy.telemetry.runs import LoggedRun
from trl_entropy.telemetry.staleness import AGES, FIGURES, METRICS, clipped_by_age


def test_tokens_are_counted_by_age() -> None:
    #                     0  0  1  2  3  4  5  9 and one that does not count
    ages = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 9, 0]])
    clipped = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1, 1]]).bool()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0]]).bool()
    means = TokenMeans()
    means.add(clipped_by_age(ages, clipped, mask))
    means.close_window(lambda totals: totals)
    assert means.pop() == pytest.approx(
        {
            "staleness/age": 24 / 8,
            "staleness/clipped_age_0": 1 / 2,
            "staleness/clipped_age_1": 0.0,
            "staleness/clipped_age_2": 1.0,
            "staleness/clipped_ages_3_to_4": 1 / 2,
            "staleness/clipped_ages_from_5": 1.0,
            "staleness/tokens_age_0": 2 / 8,
            "staleness/tokens_age_1": 1 / 8,
            "staleness/tokens_age_2": 1 / 8,
            "staleness/tokens_ages_3_to_4": 2 / 8,
            "staleness/tokens_ages_from_5": 2 / 8,
        }
    )


def test_every_metric_is_explained() -> None:
    explained = {key for keys, *_ in METRICS for key in keys.split(", ")}
    counted = set(clipped_by_age(torch.zeros(1, 1), torch.zeros(1, 1).bool(), torch.ones(1, 1).bool()))
    assert explained == counted | {"staleness/behaviour_gap"}


def test_every_metric_by_age_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entry = {f"staleness/{what}_{name}": 0.1 for what in ("clipped", "tokens") for name in AGES}
    run = LoggedRun("run", [{"step": step, "staleness/age": 1.0, **entry} for step in (1, 2)])
    drawn = {key for figure in FIGURES for panel in figure.panels for key in panel.keys}
    assert drawn == {"staleness/age", *entry}
    for figure in FIGURES:
        assert draw(figure, [run], tmp_path / figure.name)
        assert draw(figure, [LoggedRun("other", [{"step": 1, "reward": 1.0}])], tmp_path / "other") is None
