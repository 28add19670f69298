"""The figures: which points are drawn, and what is written."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from trl_entropy.telemetry import figures
from trl_entropy.telemetry.figures import FIGURES, Figure, Panel, draw, series
from trl_entropy.telemetry.runs import LoggedRun

Canvas = pytest.importorskip("matplotlib.figure").Figure

REWARD = next(figure for figure in FIGURES if figure.name == "reward")
SVG = "{http://www.w3.org/2000/svg}"


def run(name: str, *rewards: float) -> LoggedRun:
    return LoggedRun(name, [{"step": step, "reward": reward} for step, reward in enumerate(rewards, start=1)])


AxesOf = Callable[[Figure, list[LoggedRun]], list[Any]]


@pytest.fixture
def axes_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AxesOf:
    """The panels of what `draw` saves."""
    saved: list[Any] = []
    savefig = Canvas.savefig

    def spy(canvas: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(canvas)
        savefig(canvas, *args, **kwargs)

    monkeypatch.setattr(Canvas, "savefig", spy)

    def axes(figure: Figure, runs: list[LoggedRun]) -> list[Any]:
        assert draw(figure, runs, tmp_path / figure.name) is not None
        return saved[-1].axes

    return axes


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_series_leaves_out_what_is_not_a_finite_number() -> None:
    history: list[dict[str, Any]] = [
        {"step": 1, "reward": 0.5},
        {"step": 2, "loss": 0.1},
        {"step": 3, "reward": math.nan},
        {"step": 4, "reward": None},
        {"step": 5, "reward": "0.5"},
        {"step": 6, "reward": True},
        {"reward": 0.7},
        {"step": 8, "reward": 1},
    ]
    assert series(history, ("reward",)) == ([1.0, 8.0], [0.5, 1.0])


def test_series_takes_the_first_metric_that_an_entry_has() -> None:
    history = [{"step": 1, "new": 1.0, "old": 2.0}, {"step": 2, "old": 3.0}]
    assert series(history, ("new", "old")) == ([1.0, 2.0], [1.0, 3.0])


def test_clip_fractions_of_a_run_without_controls_are_trls() -> None:
    ppo_clip = next(figure for figure in FIGURES if figure.name == "ppo_clip")
    history = [{"step": 1, "clip_ratio/low_mean": 0.1, "clip_ratio/high_mean": 0.2}]
    assert [series(history, panel.keys)[1] for panel in ppo_clip.panels] == [[0.1], [0.2]]


def test_figure_is_written_as_svg_and_png(tmp_path: Path) -> None:
    svg = draw(REWARD, [run("first", 0.1, 0.2), run("second", 0.2, 0.1)], tmp_path / "v1.reward")
    assert (tmp_path / "v1.reward.png").read_bytes().startswith(b"\x89PNG")
    assert svg is not None
    assert svg.startswith("<svg")
    assert (tmp_path / "v1.reward.svg").read_text(encoding="utf-8").endswith(svg)
    assert {"first", "second", "mean reward", "optimizer step"} <= set(texts(svg))


def test_svg_says_in_words_what_it_shows(tmp_path: Path) -> None:
    svg = draw(REWARD, [run("<first>", 0.1, 0.4, 0.2), run("second", 0.3)], tmp_path / "reward")
    root = ElementTree.fromstring(svg or "")
    assert root.get("role") == "img"
    assert root.get("aria-label") == (
        "Reward; mean reward, <first>: 0.1 at 1, 0.2 at 3; mean reward, second: 0.3 at 1, 0.3 at 1"
    )


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([("0 to 1", 0.25), ("1 to 2", 0.5)], "Kind; share, a, ERC: 0 to 1 0.25, 1 to 2 0.5"),
        ([(2.0, 0.25), (1.0, 0.5), (3.0, 1.0)], "Kind; share, a, ERC: 3 points"),
        ([(1.0, 0.25), (1.0, 0.5), (3.0, 1.0)], "Kind; share, a, ERC: 0.25 at 1, 1 at 3"),
    ],
)
def test_text_alternative_tells_bars_points_and_lines_apart(points: list[Any], expected: str) -> None:
    rows = [("share", "a", "ERC", x, y) for x, y in points]
    assert figures.text_alternative("Kind", rows) == expected


def test_thin_line_is_the_metric_as_logged_and_thick_line_its_moving_average(axes_of: AxesOf) -> None:
    (axis,) = axes_of(REWARD, [run("one", 1.0, 0.0, 0.0)])
    raw, smooth = axis.lines
    assert np.asarray(raw.get_ydata()).tolist() == [1.0, 0.0, 0.0]
    assert np.asarray(smooth.get_ydata()) == pytest.approx([1.0, 0.6, 0.36])  # 0.6 of the last, 0.4 of the new
    assert raw.get_linewidth() < smooth.get_linewidth()


def test_runs_keep_their_colour_when_one_lacks_the_metric(axes_of: AxesOf) -> None:
    (axis,) = axes_of(REWARD, [LoggedRun("none", []), run("some", 0.1, 0.2)])
    assert {line.get_color() for line in axis.lines} == {figures.COLOURS[1]}


def test_no_two_of_many_runs_look_alike(axes_of: AxesOf) -> None:
    (axis,) = axes_of(REWARD, [run(str(index), 0.1, 0.2) for index in range(20)])
    looks = {(line.get_color(), line.get_linestyle()) for line in axis.lines[1::2]}
    assert len(looks) == 20


def test_one_point_is_visible(axes_of: AxesOf) -> None:
    (axis,) = axes_of(REWARD, [run("one", 0.5)])
    assert axis.lines[0].get_marker() == "o"


@pytest.mark.parametrize("name", ["_hidden", "cost $x^$", r"$\frac{1$", "<script>alert(1)</script>", "a & b", "ü"])
def test_name_of_a_run_is_shown_as_it_is(name: str, tmp_path: Path) -> None:
    svg = draw(REWARD, [run(name, 0.1, 0.2)], tmp_path / "reward")
    assert svg is not None
    assert "<script" not in svg
    assert name in texts(svg)


def test_long_name_is_shortened(tmp_path: Path) -> None:
    svg = draw(REWARD, [run("x" * 300, 0.1, 0.2)], tmp_path / "reward")
    assert svg is not None
    assert "x" * 39 + "…" in texts(svg)


def corridor_run(name: str, **metrics: float) -> LoggedRun:
    return LoggedRun(name, [{"step": step, "entropy": 0.5, **metrics} for step in (1, 2)])


def test_band_is_shaded_for_the_runs_that_have_it(axes_of: AxesOf) -> None:
    corridor = next(figure for figure in FIGURES if figure.name == "epo_corridor")
    edges = {"epo/corridor_low": 0.4, "epo/corridor_high": 0.7}
    (axis,) = axes_of(corridor, [corridor_run("none"), corridor_run("some", **edges)])
    assert {line.get_color() for line in axis.lines} == {figures.COLOURS[1]}
    bounds = axis.collections[-1].get_paths()[0].get_extents()
    assert (bounds.y0, bounds.y1) == pytest.approx((0.4, 0.7))


def test_guide_is_dotted_in_the_colour_of_its_run(tmp_path: Path, axes_of: AxesOf) -> None:
    loop = next(figure for figure in FIGURES if figure.name == "entropic")
    runs = [
        LoggedRun(name, [{"step": 1, "entropic/entropy": 0.5, "entropic/set_point": 0.3}]) for name in ("one", "two")
    ]
    (axis,) = axes_of(loop, runs)
    dotted = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in dotted] == [[0.3], [0.3]]
    assert [line.get_color() for line in dotted] == list(figures.COLOURS[:2])
    without_guide = LoggedRun("none", [{"step": 1, "entropic/entropy": 0.5}])
    assert draw(loop, [without_guide], tmp_path / "none") is None
    draw(loop, runs[:1], tmp_path / "loop")
    rows = list(csv.reader((tmp_path / "loop.csv").read_text(encoding="utf-8").splitlines()))[1:]
    assert [row[2:] for row in rows] == [["as logged", "1.0", "0.5"], ["entropic/set_point", "1.0", "0.3"]]


def test_numbers_are_written_beside_the_figure(tmp_path: Path) -> None:
    corridor = next(figure for figure in FIGURES if figure.name == "epo_corridor")
    edges = {"epo/corridor_low": 0.4, "epo/corridor_high": 0.7}
    assert draw(corridor, [corridor_run("mine, of course", **edges)], tmp_path / "epo") is not None
    header, *rows = csv.reader((tmp_path / "epo.csv").read_text(encoding="utf-8").splitlines())
    assert header == ["panel", "run", "series", "x", "y"]
    panel, name = "entropy (nats per token)", "mine, of course"
    assert rows == [
        [panel, name, series, step, value]
        for series, value in (("as logged", "0.5"), ("epo/corridor_low", "0.4"), ("epo/corridor_high", "0.7"))
        for step in ("1.0", "2.0")
    ]


def test_same_data_is_the_same_file(tmp_path: Path) -> None:
    first, second = (draw(REWARD, [run("one", 0.1, 0.2)], tmp_path / name) for name in ("a", "b"))
    assert first == second


def test_nothing_is_drawn_without_the_metric(tmp_path: Path) -> None:
    assert draw(REWARD, [LoggedRun("empty", [{"step": 1, "loss": 0.5}])], tmp_path / "reward") is None
    assert list(tmp_path.iterdir()) == []


def test_panels_are_drawn_below_each_other(axes_of: AxesOf) -> None:
    two = Figure("two", "Two", (Panel("upper", ("reward",)), Panel("lower", ("entropy",))), "Healthy: both.")
    upper, lower = axes_of(two, [run("one", 0.1, 0.2), LoggedRun("two", [{"step": 1, "entropy": 0.5}])])
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("upper", "lower")
    assert upper.get_position().y0 > lower.get_position().y0
    (alone,) = axes_of(two, [run("one", 0.1, 0.2)])
    assert alone.get_ylabel() == "upper"


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_label_of_a_panel_is_no_longer_than_the_panel(figure: Figure, axes_of: AxesOf) -> None:
    """But for the pixel or two that its neighbours leave room for: else it runs into them or off the figure."""
    keys = {key for panel in figure.panels for key in (panel.keys[0], *panel.guides, *(panel.band or ()))}
    drawn = axes_of(figure, [LoggedRun("run", [{"step": step, **dict.fromkeys(keys, step / 4)} for step in (1, 2)])])
    assert [axis.get_ylabel() for axis in drawn] == [panel.label for panel in figure.panels]
    drawn[0].figure.draw_without_rendering()  # saving has left the extents of another resolution
    for axis in drawn:
        label, box = axis.yaxis.label.get_window_extent(), axis.get_window_extent()
        assert label.height < 1.05 * box.height, axis.get_ylabel()


def test_every_figure_says_what_is_healthy() -> None:
    assert all(figure.reading.startswith("Healthy: ") and figure.reading.endswith(".") for figure in FIGURES)
    assert len({figure.name for figure in FIGURES}) == len(FIGURES)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'matplotlib\. Install it with: pip install "trl_entropy\[plots\]"'):
        draw(REWARD, [run("one", 0.1)], tmp_path / "reward")
