"""The figures of a report: metrics against the optimizer step, one line a run. Drawing needs the extra `plots`."""

import csv
import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..controls import CONTROLS
from ..controls.reporting import Figure, Panel
from . import staleness
from .runs import LoggedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's palette, distinct to colour-blind readers, without the yellow that is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
SMOOTHING = 0.6
MAX_NAME_LENGTH = 40
LEGEND_WIDTH = 42  # characters


FIGURES = (
    Figure(
        "reward",
        "Reward",
        (Panel("mean reward", ("reward",)),),
        "Healthy: rises, then levels off; a fall back to the start or below means that the updates are too large.",
    ),
    Figure(
        "entropy",
        "Entropy",
        (Panel("entropy (nats per token)", ("entropy",)),),
        "Healthy: falls slowly and stays above zero; a drop to zero is collapse (nothing is explored any more), a "
        "steep rise is a policy coming apart.",
    ),
    Figure(
        "grad_norm",
        "Gradient norm",
        (Panel("gradient norm", ("grad_norm",)),),
        "Healthy: stays in one band, without growth or spikes of several times its usual size; it is measured before "
        "clipping.",
        from_zero=True,
    ),
    Figure(
        "ppo_clip",
        "Tokens outside the PPO clip range",
        (
            Panel("below, A < 0", ("ppo_clip/low_fraction", "clip_ratio/low_mean")),
            Panel("above, A > 0", ("ppo_clip/high_fraction", "clip_ratio/high_mean")),
        ),
        "Healthy: a few per cent at most on either side, steady; fractions that keep growing call for a smaller "
        "learning rate or fewer updates per rollout. PPO-clip drops the gradient of these tokens.",
        from_zero=True,
    ),
    *staleness.FIGURES,
    *(figure for control in CONTROLS for figure in control.figures),
)

CSV_HEADER = ("panel", "run", "series", "x", "y")
Row = tuple[str, str, str, float | str, float]


def require_plots() -> None:
    """Check that figures can be drawn.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError('The report needs matplotlib. Install it with: pip install "trl_entropy[plots]"')


def series(log_history: Sequence[dict[str, Any]], keys: Sequence[str]) -> tuple[list[float], list[float]]:
    """Steps and finite values of a metric; entries without the metric, or with a value that is none, are left out."""
    points = []
    for entry in log_history:
        step = _number(entry.get("step"))
        value = _number(next((entry[key] for key in keys if key in entry), None))
        if step is not None and value is not None:
            points.append((step, value))
    return [step for step, _ in points], [value for _, value in points]


def draw(figure: Figure, runs: Sequence[LoggedRun], stem: Path) -> str | None:
    """Draw a figure and save it as `stem.svg` and `stem.png`, and its numbers as `stem.csv`.

    The thin line is the metric as logged, the thick one its exponential moving average, a dotted one a guide. A
    panel of which no run has anything is left out.

    Returns:
        The SVG element, to be put into a page, or `None` (and no file) if no run has any of the metrics.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    require_plots()
    from matplotlib import rc_context

    panels = tuple(panel for panel in figure.panels if any(_points(run, panel)[0] for run in runs))
    if not panels:
        return None
    figure = replace(figure, panels=panels)
    with rc_context(rc_settings(figure.name)):
        return save(_canvas(figure, runs), figure.title, stem, _rows(figure, runs))


def rc_settings(name: str) -> Any:
    """Matplotlib's settings for a figure."""
    # A fixed salt makes the same data the same file; its own per figure keeps the ids of a page apart.
    return {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}


def save(canvas: "Canvas", title: str, stem: Path, rows: Iterable[Row]) -> str:
    """Write `stem.png`, `stem.svg` and `stem.csv`; return the SVG element, with its text alternative."""
    svg_file, rows = stem.parent / f"{stem.name}.svg", list(rows)
    canvas.savefig(stem.parent / f"{stem.name}.png", dpi=160)
    canvas.savefig(svg_file, metadata={"Date": None, "Creator": None, "Title": title})
    with open(stem.parent / f"{stem.name}.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([CSV_HEADER, *rows])
    text = html.escape(text_alternative(title, rows))
    svg = svg_file.read_text(encoding="utf-8").replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
    svg_file.write_text(svg, encoding="utf-8")
    return svg[svg.index("<svg") :]


def text_alternative(title: str, rows: Sequence[Row]) -> str:
    """What a figure shows, in words: of every line its ends, of bars their heights, of a cloud of points how many."""
    lines = [title]
    for (panel, run, name), of_line in groupby(rows, key=lambda row: row[:3]):
        points = [(x, y) for *_, x, y in of_line]
        what = f"{panel}, {run}" if name == "as logged" else f"{panel}, {run}, {name}"
        if any(isinstance(x, str) for x, _ in points):
            lines.append(f"{what}: " + ", ".join(f"{x} {y:.3g}" for x, y in points))
        elif any(float(x) < float(before) for (before, _), (x, _) in pairwise(points)):
            lines.append(f"{what}: {len(points)} points")
        else:
            (first, start), (last, end) = points[0], points[-1]
            lines.append(f"{what}: {start:.3g} at {first:.3g}, {end:.3g} at {last:.3g}")
    return "; ".join(lines)


def look(index: int) -> dict[str, str]:
    """Colour and line style of a run, the same in every figure."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINE_STYLES[index % len(LINE_STYLES)]}


def new_canvas(num_panels: int, share_x: bool = True) -> tuple["Canvas", list[Any]]:
    """A canvas with panels below each other, and their axes."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(4.6, 1.3 + 1.6 * num_panels), layout="constrained")
    axes = list(canvas.subplots(num_panels, sharex=share_x, squeeze=False)[:, 0])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def add_legend(canvas: "Canvas", handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend above the panels."""
    names = [shorten(name) for name in names]
    columns = max(1, LEGEND_WIDTH // max([1, *map(len, names)]))
    legend = canvas.legend(
        list(handles), ["run"] * len(names), loc="outside upper left", ncols=columns, frameon=False, fontsize=9
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        plain_text(text, name)


def plain_text(text: Any, name: str) -> None:
    """Set a name as it is: it is data, in which matplotlib would read formulas and hidden labels."""
    text.set_parse_math(False)
    text.set_text(name)


def _canvas(figure: Figure, runs: Sequence[LoggedRun]) -> "Canvas":
    canvas, axes = new_canvas(len(figure.panels))
    shown: dict[int, Any] = {}
    for axis, panel in zip(axes, figure.panels, strict=True):
        for index, run in enumerate(runs):
            steps, values = _points(run, panel)
            if steps:
                colour, marker = COLOURS[index % len(COLOURS)], "o" if len(steps) == 1 else ""
                axis.plot(steps, values, color=colour, alpha=0.35, linewidth=0.9, marker=marker)
                (shown[index],) = axis.plot(steps, _smooth(values), **look(index), linewidth=1.8)
            for key in panel.guides:
                axis.plot(*series(run.log_history, (key,)), color=look(index)["color"], linestyle=":", linewidth=1.2)
            if panel.band:
                axis.fill_between(
                    *_band(run, panel.band), color=COLOURS[index % len(COLOURS)], alpha=0.15, linewidth=0
                )
        if figure.from_zero:
            axis.set_ylim(bottom=0)
        axis.set_ylabel(panel.label)
    axes[-1].set_xlabel("optimizer step")
    add_legend(canvas, list(shown.values()), [runs[index].name for index in shown])
    return canvas


def _points(run: LoggedRun, panel: Panel) -> tuple[list[float], list[float]]:
    """What a panel shows of a run; nothing if the run lacks the panel's band or a guide."""
    if panel.band and not _band(run, panel.band)[0]:
        return [], []
    if not all(series(run.log_history, (key,))[0] for key in panel.guides):
        return [], []
    return series(run.log_history, panel.keys)


def _band(run: LoggedRun, keys: tuple[str, str]) -> tuple[list[float], list[float], list[float]]:
    """Steps, lower and upper edge, where a log entry has both."""
    both = [entry for entry in run.log_history if all(key in entry for key in keys)]
    low, high = (dict(zip(*series(both, (key,)), strict=True)) for key in keys)
    steps = [step for step in low if step in high]
    return steps, [low[step] for step in steps], [high[step] for step in steps]


def _rows(figure: Figure, runs: Sequence[LoggedRun]) -> Iterator[Row]:
    for panel in figure.panels:
        for run in runs:
            for step, value in zip(*_points(run, panel), strict=True):
                yield panel.label, run.name, "as logged", step, value
            for key in panel.guides:
                for step, value in zip(*series(run.log_history, (key,)), strict=True):
                    yield panel.label, run.name, key, step, value
            if panel.band:
                steps, *edges = _band(run, panel.band)
                for key, values in zip(panel.band, edges, strict=True):
                    for step, value in zip(steps, values, strict=True):
                        yield panel.label, run.name, key, step, value


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average that starts at the first value."""
    smoothed = [values[0]]
    for value in values[1:]:
        smoothed.append(SMOOTHING * smoothed[-1] + (1 - SMOOTHING) * value)
    return smoothed


def shorten(name: str) -> str:
    """A name that fits a legend."""
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"


def _number(value: object) -> float | None:
    """A finite number of a log entry, or `None` for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None
