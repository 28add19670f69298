"""The figures of a report: metrics against the optimizer step, one line a run. Drawing needs the extra `plots`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's palette, distinct to colour-blind readers, without the yellow that is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
SMOOTHING = 0.6
MAX_NAME_LENGTH = 40
LEGEND_WIDTH = 42  # characters


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        label: What the vertical axis shows, with its unit.
        keys: Metrics that hold it; the first that a log entry has is drawn.
    """

    label: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        name: Stem of its files.
        title: Heading in the report.
        panels: Drawn below each other, on one horizontal axis.
        reading: One sentence on what a healthy run looks like.
        from_zero: Whether the vertical axes start at 0.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    reading: str
    from_zero: bool = False


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
        "erc",
        "Tokens clipped by ERC",
        (Panel("fraction of tokens", ("erc/clip_fraction",)),),
        "Healthy: about 0.2 in the paper; near 0 the bounds do nothing, above 0.5 most of the rollout is thrown away "
        "and the learning rate or the number of updates per rollout is too large.",
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
    Figure(
        "ce_gppo",
        "Tokens given back a gradient by CE-GPPO",
        (Panel("below, alpha1", ("ce_gppo/low_fraction",)), Panel("above, alpha2", ("ce_gppo/high_fraction",))),
        "Healthy: as small and steady as the PPO clip fractions; growth below the range means that alpha1 pushes "
        "tokens further and further down, and calls for fewer updates per rollout, a smaller learning rate or a "
        "smaller alpha1.",
        from_zero=True,
    ),
    Figure(
        "erc_entropy",
        "Entropy of the tokens that ERC clips and keeps",
        (Panel("clipped (nats)", ("erc/entropy_clipped",)), Panel("kept (nats)", ("erc/entropy_kept",))),
        "Healthy: the clipped tokens have lower entropy (mostly so in the paper) or about the same; if it is far "
        "higher, ERC holds back the tokens that explore.",
    ),
)


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


def draw(figure: Figure, runs: Sequence[Run], stem: Path) -> str | None:
    """Draw a figure and save it as `stem.svg` and `stem.png`.

    The thin line is the metric as logged, the thick one its exponential moving average.

    Returns:
        The SVG element, to be put into a page, or `None` (and no file) if no run has any of the metrics.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    require_plots()
    from matplotlib import rc_context

    if not any(series(run.log_history, panel.keys)[0] for panel in figure.panels for run in runs):
        return None
    # A fixed salt makes the same data the same file; its own per figure keeps the ids of a page apart.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.name, "font.size": 10}):
        canvas = _canvas(figure, runs)
        svg_file = stem.parent / f"{stem.name}.svg"
        canvas.savefig(stem.parent / f"{stem.name}.png", dpi=160)
        canvas.savefig(svg_file, metadata={"Date": None, "Creator": None, "Title": figure.title})
    svg = svg_file.read_text(encoding="utf-8")
    return svg[svg.index("<svg") :]


def _canvas(figure: Figure, runs: Sequence[Run]) -> "Canvas":
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(4.6, 1.3 + 1.6 * len(figure.panels)), layout="constrained")
    axes = canvas.subplots(len(figure.panels), sharex=True, squeeze=False)[:, 0]
    shown: dict[int, Any] = {}
    for axis, panel in zip(axes, figure.panels, strict=True):
        for index, run in enumerate(runs):
            steps, values = series(run.log_history, panel.keys)
            if steps:
                colour, style = COLOURS[index % len(COLOURS)], LINE_STYLES[index % len(LINE_STYLES)]
                marker = "o" if len(steps) == 1 else ""
                axis.plot(steps, values, color=colour, alpha=0.35, linewidth=0.9, marker=marker)
                (shown[index],) = axis.plot(steps, _smooth(values), color=colour, linestyle=style, linewidth=1.8)
        if figure.from_zero:
            axis.set_ylim(bottom=0)
        axis.set_ylabel(panel.label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("optimizer step")
    names = [_shorten(runs[index].name) for index in shown]
    columns = max(1, LEGEND_WIDTH // max([1, *map(len, names)]))
    legend = canvas.legend(
        list(shown.values()), ["run"] * len(shown), loc="outside upper left", ncols=columns, frameon=False, fontsize=9
    )
    # A name is data: set it as plain text, or matplotlib reads formulas and hidden labels into it.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    return canvas


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average that starts at the first value."""
    smoothed = [values[0]]
    for value in values[1:]:
        smoothed.append(SMOOTHING * smoothed[-1] + (1 - SMOOTHING) * value)
    return smoothed


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"


def _number(value: object) -> float | None:
    """A finite number of a log entry, or `None` for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None
