"""Drawing the figures of `token_figures`. It needs the extra `plots`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures import Row, add_legend, look, new_canvas, plain_text, rc_settings, require_plots, save, shorten
from .token_figures import Curve, Drawn, RecordedRun, TokenFigure, TokenPanel

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

KINDS = {
    "kept": ("#0072B2", "o"),
    "clipped": ("#D55E00", "x"),
    "masked": ("#009E73", "v"),
    "filtered": ("#D55E00", "^"),
}
"""Colour and marker of what happened to a token, in panels of points."""
OTHER_KIND = ("#D55E00", "+")

HATCHES = ("", "///", "...", "xxx")
"""Of bars, so that runs differ in more than their colour."""


def draw_tokens(figure: TokenFigure, runs: Sequence[RecordedRun], stem: Path) -> tuple[str, list[str]] | None:
    """Draw a figure and save it as `stem.svg`, `stem.png` and `stem.csv`.

    Args:
        figure: One of `TOKEN_FIGURES`.
        runs: The runs with a record; those that lack a column of the figure are left out.
        stem: Path without suffix.

    Returns:
        The SVG element and the notes, or `None` (and no file) if no run has the columns.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    require_plots()
    from matplotlib import rc_context

    chosen = [run for run in runs if len(run.tokens.table) and run.tokens.has(*figure.columns)]
    drawn = figure.compute(chosen) if chosen else None
    if drawn is None or not drawn.panels:
        return None
    names = {run.index: run.name for run in chosen}
    with rc_context(rc_settings(figure.name)):
        svg = save(_canvas(drawn, names), figure.title, stem, _rows(drawn, names))
    return svg, drawn.notes


def _canvas(drawn: Drawn, names: dict[int, str]) -> "Canvas":
    canvas, axes = new_canvas(len(drawn.panels))
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, drawn.panels, strict=True):
        for place, curve in enumerate(panel.curves):
            name = curve.series if panel.kind == "points" else names[curve.run]
            handles[name] = _draw_curve(axis, panel, curve, place)
        for position in panel.vertical:
            axis.axvline(position, color="#555555", linestyle=":", linewidth=1.0)
        for position in panel.horizontal:
            axis.axhline(position, color="#555555", linestyle=":", linewidth=1.0)
        for direction in panel.log:
            _log_scale(axis, direction, ratios=direction == "x" or panel.kind == "points")
        axis.set_ylabel(panel.label)
        if panel.title:
            plain_text(axis.set_title("run", fontsize=9, loc="left"), shorten(panel.title))
    axes[-1].set_xlabel(drawn.x_label)
    add_legend(canvas, list(handles.values()), list(handles))
    return canvas


def _draw_curve(axis: Any, panel: TokenPanel, curve: Curve, place: int) -> Any:
    if panel.kind == "points":
        colour, marker = KINDS.get(curve.series, OTHER_KIND)
        return axis.plot(curve.x, curve.y, marker, color=colour, markersize=3, alpha=0.5, markeredgewidth=0.8)[0]
    if panel.kind == "bars":
        width = 0.8 / len(panel.curves)
        positions = np.arange(len(curve.x)) - 0.4 + width * (place + 0.5)
        axis.set_xticks(range(len(curve.x)), curve.x)
        axis.axhline(0.0, color="#555555", linewidth=0.8)
        hatch = HATCHES[curve.run % len(HATCHES)]
        return axis.bar(
            positions, curve.y, width * 0.9, color=look(curve.run)["color"], hatch=hatch, edgecolor="white"
        )
    marker = "o" if len(curve.x) < 20 else ""
    return axis.plot(curve.x, curve.y, **look(curve.run), linewidth=1.5, marker=marker, markersize=3)[0]


def _log_scale(axis: Any, direction: str, ratios: bool) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    (axis.set_xscale if direction == "x" else axis.set_yscale)("log")
    if ratios:
        ticks = axis.xaxis if direction == "x" else axis.yaxis
        ticks.set_major_locator(FixedLocator([0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0]))
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_locator(NullLocator())
        ticks.set_minor_formatter(NullFormatter())


def _rows(drawn: Drawn, names: dict[int, str]) -> Iterator[Row]:
    for panel in drawn.panels:
        for curve in panel.curves:
            for x, y in zip(curve.x, curve.y, strict=True):
                yield panel.label, names[curve.run], curve.series, x, float(y)
