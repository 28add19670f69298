"""The figures of the recorded tokens: their numbers by hand, and that they are drawn."""

import csv
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.telemetry.made_record import make_record
from tests.telemetry.test_figures import texts
from trl_entropy.telemetry import token_figures
from trl_entropy.telemetry.completions import MARKS
from trl_entropy.telemetry.figures import CSV_HEADER
from trl_entropy.telemetry.token_drawing import draw_tokens
from trl_entropy.telemetry.token_figures import (
    CLASSES,
    MAX_POINTS,
    TOKEN_FIGURES,
    RecordedRun,
    entropy_contributions,
    histogram,
    thinned,
)

pytest.importorskip("matplotlib")

FIGURE = {figure.name: figure for figure in TOKEN_FIGURES}
ERC = {"erc_low": 0.95, "erc_high": 1.05}


def recorded(folder: Path, count: int, name: str = "mine", index: int = 0, **columns: Any) -> RecordedRun:
    return RecordedRun(index, name, make_record(folder / name, count, **columns).sampled)


def test_histogram_counts_what_lies_beyond_in_the_outermost_bins() -> None:
    shares = histogram(np.array([-5.0, 0.5, 1.5, 1.6, 9.0, np.nan]), np.array([0.0, 1.0, 2.0, 3.0]))
    assert shares.tolist() == [0.4, 0.4, 0.2]
    assert histogram(np.array([np.nan]), np.array([0.0, 1.0])).tolist() == [0.0]


def test_points_are_thinned_evenly() -> None:
    mask = np.arange(10 * MAX_POINTS) % 2 == 0
    indices = thinned(mask)
    assert len(indices) == MAX_POINTS
    assert mask[indices].all()
    assert (indices[0], indices[-1]) == (0, 10 * MAX_POINTS - 2)
    assert thinned(np.array([False, True])).tolist() == [1]
    assert thinned(np.array([False])).tolist() == []


def test_contributions_of_the_four_classes_by_hand(tmp_path: Path) -> None:
    # -g exp(lp) (lp + H), with H = 1 and g = A
    lp, advantage = [-0.5, -2.0, -0.5, -2.0, -0.5], [1.0, 1.0, -1.0, -1.0, 0.0]
    record = make_record(tmp_path, 5, lp=lp, A=advantage, gradient=advantage)
    high, low = math.exp(-0.5) * 0.5, math.exp(-2.0) * -1.0
    expected = np.array([-high, -low, high, low, 0.0])
    contributions, classes = entropy_contributions(record)
    assert [CLASSES[index] for index in classes[:4]] == ["PA&HP", "PA&LP", "NA&HP", "NA&LP"]
    assert classes[4] == -1
    np.testing.assert_allclose(contributions, expected / np.abs(expected).sum(), rtol=1e-6)
    assert contributions[0] < 0 < contributions[1]


def test_contributions_have_the_weights_of_the_loss(tmp_path: Path) -> None:
    weights = [1.1, 0.6, 0.0]
    record = make_record(tmp_path, 3, lp=-0.5, A=[1.0, -1.0, 1.0], gradient=[1.1, -0.6, 0.0])
    contributions, _ = entropy_contributions(record)
    signed = np.array(weights) * [-1.0, 1.0, -1.0]
    np.testing.assert_allclose(contributions, signed / np.abs(signed).sum(), rtol=1e-6)


def test_entropy_ratios_and_bounds(tmp_path: Path) -> None:
    ratios = [0.1, 0.94, 1.0, 1.0, 1.2]
    on = recorded(tmp_path, 5, "on", entropy_ratio=ratios, settings={"erc_low": 0.5, "erc_high": 1.1})
    off = recorded(tmp_path, 5, "off", index=3, entropy_ratio=ratios)
    drawn = FIGURE["token_entropy_ratio"].compute([on, off])
    assert drawn.notes == [
        "on: 40.0% of the tokens lie outside (0.5, 1.1).",
        "off: 60.0% of the tokens lie outside (0.95, 1.05).",
    ]
    (panel,) = drawn.panels
    assert panel.vertical == (0.5, 1.1)
    assert FIGURE["token_entropy_ratio"].compute([off]).panels[0].vertical == (0.95, 1.05)
    assert [curve.run for curve in panel.curves] == [0, 3]
    curve = panel.curves[0]
    assert sum(curve.y) == pytest.approx(1.0)
    assert curve.y[0] == pytest.approx(0.2)  # 0.1, below the bins
    assert max(zip(curve.y, curve.x, strict=True))[1] == pytest.approx(1.0, abs=0.02)


def test_erc_figures_tell_clipped_from_kept(tmp_path: Path) -> None:
    values = {
        "erc_clipped": [1, 1, 0, 0],
        "H": [0.1, 0.3, 1.0, 3.0],
        "ratio": [1.0, 1.5, 1.0, 1.0],
        "lp_old": [math.log(0.9), math.log(0.8), -1.0, -1.0],
        "entropy_ratio": [0.8, 1.2, 1.0, 1.0],
    }
    run = recorded(tmp_path, 4, settings=ERC, **values)
    assert FIGURE["token_erc_entropy"].compute([run]).notes == [
        "mine: median 0.2 nats for the clipped, 2 for the kept."
    ]
    region = FIGURE["token_erc_region"].compute([run])
    assert region.notes == ["mine: 50% of the clipped tokens are inside the trust region."]
    assert region.panels[0].vertical == (0.8, 1.2)
    (panel,) = FIGURE["token_erc_probability"].compute([run]).panels
    kept, clipped = panel.curves
    assert (kept.series, clipped.series) == ("kept", "clipped")
    assert clipped.x == pytest.approx([0.9, 0.8])
    assert clipped.y == pytest.approx([0.8, 1.2])
    assert panel.horizontal == (0.95, 1.05)


def test_turns_have_their_means(tmp_path: Path) -> None:
    turns = [0] * 10 + [1] * 10 + [2] * 9
    run = recorded(tmp_path, 29, turn=turns, H=[1.0] * 5 + [2.0] * 5 + [3.0] * 19)
    (curve,) = token_figures.turns_figure([run]).panels[0].curves
    assert (curve.x, curve.y) == ([1.0, 2.0], [1.5, 3.0])  # the third turn has too few tokens
    assert token_figures.turns_figure([recorded(tmp_path, 20, "single")]).panels == []


def test_disagreement_shows_what_was_masked(tmp_path: Path) -> None:
    run = recorded(
        tmp_path,
        3,
        H_old=[0.0, 1.0, 2.0],
        value_std=[0.1, 0.2, 0.3],
        advantage_masked=[1, 0, 0],
        entropy_filtered=[0, 0, 1],
    )
    drawn = FIGURE["token_disagreement"].compute([run])
    found = {curve.series: (curve.x, curve.y) for curve in drawn.panels[0].curves}
    assert {kind: x for kind, (x, _) in found.items()} == {"kept": [1.0], "masked": [0.0], "filtered": [2.0]}
    assert found["masked"][1] == pytest.approx([0.1])
    assert drawn.notes == ["mine: correlation of sigma of the values with entropy under the old policy (nats) +1.00."]


EVERYTHING = {
    **{mark.column: [1, 0, 0, 0] * 10 for mark in MARKS},
    "erc_clipped": [0, 1] * 20,
    "turn": [0] * 20 + [1] * 20,
    "value_std": [0.1, 0.2] * 20,
    "advantage_masked": [1, 0, 0, 0] * 10,
    "entropy_filtered": [0, 0, 0, 1] * 10,
    "A": [1.0, -1.0] * 20,
    "gradient": [1.0, -1.0] * 20,
    "H": [0.5, 1.5] * 20,
    "settings": ERC,
}


@pytest.mark.parametrize("figure", TOKEN_FIGURES, ids=lambda figure: figure.name)
def test_figure_is_written_with_its_numbers(figure: Any, tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "$x^$"]
    runs = [recorded(tmp_path, 40, f"run{index}", index=index, **EVERYTHING) for index in range(2)]
    runs = [RecordedRun(run.index, name, run.tokens) for run, name in zip(runs, names, strict=True)]
    drawn = draw_tokens(figure, runs, tmp_path / "figure")
    assert drawn is not None
    svg, _ = drawn
    assert "<script" not in svg
    assert set(names) <= set(texts(svg))
    ElementTree.fromstring(svg)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    header, *rows = csv.reader((tmp_path / "figure.csv").read_text(encoding="utf-8").splitlines())
    assert header == list(CSV_HEADER)
    assert {row[1] for row in rows} == set(names)
    assert all(math.isfinite(float(row[4])) for row in rows)


def test_runs_that_lack_the_columns_are_left_out(tmp_path: Path) -> None:
    bare = recorded(tmp_path, 40, "bare")
    assert draw_tokens(FIGURE["token_erc_region"], [bare], tmp_path / "figure") is None
    assert not list(tmp_path.glob("figure*"))
    full = recorded(tmp_path, 40, "full", index=1, **EVERYTHING)
    drawn = draw_tokens(FIGURE["token_erc_region"], [bare, full], tmp_path / "figure")
    assert drawn is not None
    assert "bare" not in texts(drawn[0])


def test_every_figure_says_what_is_healthy() -> None:
    assert all(figure.reading.startswith("Healthy: ") and figure.reading.endswith(".") for figure in TOKEN_FIGURES)
    assert len(FIGURE) == len(TOKEN_FIGURES)
