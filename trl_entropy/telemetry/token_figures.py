"""The figures of what the controls did to the tokens, computed from the runs' records; `token_drawing` draws them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..controls import CONTROLS
from ..controls.reporting import TokenView
from .record import TokenRecord

Floats = NDArray[np.float64]

RATIO_EDGES = np.geomspace(0.5, 2.0, 61)
"""Bins of a ratio; what lies beyond them counts in the outermost."""
ENTROPY_BINS = 30
MAX_POINTS = 400
"""Points of a kind in a panel: more hide each other, and make the page large."""
MIN_TURN_TOKENS = 10
"""A turn with fewer sampled tokens has no mean worth drawing."""
CLASSES = ("PA&HP", "PA&LP", "NA&HP", "NA&LP")


@dataclass(frozen=True)
class Curve:
    """One run's numbers in a panel.

    Attributes:
        run: Its index among the runs of the page.
        x: Numbers, or names of categories.
        y: One number each.
        series: Which of the run's curves this is; a key of `token_drawing.KINDS` in panels of points.
    """

    run: int
    x: Sequence[float | str]
    y: Sequence[float]
    series: str = ""


@dataclass(frozen=True)
class TokenPanel:
    """One pair of axes.

    Attributes:
        label: What the vertical axis shows, with its unit.
        curves: What is drawn.
        kind: `line`, `points` or `bars`.
        log: Axes with a logarithmic scale: some of `x` and `y`.
        vertical: Where vertical guides are drawn.
        horizontal: Where horizontal guides are drawn.
        title: A run's name, where the panel is one run's.
    """

    label: str
    curves: list[Curve]
    kind: str = "line"
    log: str = ""
    vertical: tuple[float, ...] = ()
    horizontal: tuple[float, ...] = ()
    title: str = ""


@dataclass(frozen=True)
class Drawn:
    """A computed figure.

    Attributes:
        x_label: What the horizontal axis shows, with its unit.
        panels: Drawn below each other.
        notes: What the numbers say, a sentence a run.
    """

    x_label: str
    panels: list[TokenPanel]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RecordedRun:
    """A run with a record: its index among the runs of the page, its name, and its sampled tokens."""

    index: int
    name: str
    tokens: TokenRecord


@dataclass(frozen=True)
class TokenFigure:
    """A figure of the report; its reading is one sentence on what a healthy run looks like.

    `columns` are those that a run must have, and `compute` gets the runs that do, at least one.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    compute: Callable[[Sequence[RecordedRun]], Drawn]
    reading: str


def histogram(values: Floats, edges: Floats) -> Floats:
    """Share of the values in each bin; what lies beyond the edges counts in the outermost bins."""
    inside = np.clip(values[np.isfinite(values)], edges[0], edges[-1])
    return np.histogram(inside, edges)[0] / max(len(inside), 1)


def thinned(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """At most `MAX_POINTS` of the indices where `mask` is True, evenly spaced."""
    found = np.flatnonzero(mask)
    return found[np.linspace(0, len(found) - 1, min(MAX_POINTS, len(found))).astype(int)]


def entropy_contributions(tokens: TokenRecord) -> tuple[Floats, Floats]:
    """Each token's share in the change of the entropy, to first order, and its class.

    Under a policy-gradient step, `dH = -eta Cov(log pi, pi A)` (arXiv 2505.22617, theorem 1), to which a sampled token
    adds `-(lp - E lp) pi A` with `E lp = -H`. In place of `A` is the record's `gradient`: the advantage as the loss
    weighted it, by the importance ratio and by every control, 0 where one of them or PPO-clip dropped the token.

    A token is HP if `lp > -H`, so that it is more probable than its state's tokens are on average, else LP; PA or NA
    by the sign of `A` (arXiv 2509.20712). PA&HP and NA&LP lower the entropy, PA&LP and NA&HP raise it.

    Returns:
        The contributions divided by the sum of their absolute values, and indices of `CLASSES` (-1 where `A = 0`).
    """
    advantages, lp = tokens.column("A"), tokens.column("lp")
    above_average = lp + tokens.column("H")
    contributions = np.nan_to_num(-tokens.column("gradient") * np.exp(lp) * above_average)
    classes = 2 * (advantages < 0) + (above_average <= 0)
    return contributions / max(np.abs(contributions).sum(), 1e-12), np.where(advantages == 0, -1, classes)


def histogram_figure(view: TokenView, runs: Sequence[RecordedRun]) -> Drawn:
    edges, log = _edges(view, runs)
    curves, notes = [], []
    for run in runs:
        values = _values(run, view.x)
        curves.append(Curve(run.index, *_histogram_line(values, edges)))
        if len(bounds := _guides(view, [run])) == 2:
            share = np.mean((values <= bounds[0]) | (values >= bounds[1]))
            notes.append(f"{run.name}: {share:.1%} of the tokens lie outside ({bounds[0]:g}, {bounds[1]:g}).")
    panel = TokenPanel("share of tokens", curves, log=log, vertical=_guides(view, runs))
    return Drawn(LABELS[view.x], [panel], notes)


def split_figure(view: TokenView, runs: Sequence[RecordedRun]) -> Drawn:
    """One histogram of the tokens where the flag is set, and one of the others."""
    (flag, label), (edges, log) = view.flags[0], _edges(view, runs)
    vertical, panels, notes = _guides(view, runs), [], []
    for name, wanted in ((label, 1.0), ("kept", 0.0)):
        curves = []
        for run in runs:
            chosen = _values(run, view.x)[run.tokens.column(flag) == wanted]
            if len(chosen):
                curves.append(Curve(run.index, *_histogram_line(chosen, edges), name))
        panels.append(TokenPanel(f"share of the {name}", curves, log=log, vertical=vertical))
    for run in runs:
        values, flagged = _values(run, view.x), run.tokens.column(flag) == 1.0
        if view.x == "ratio" and flagged.any():
            low, high = _trust_region([run])
            inside = np.mean((values[flagged] >= low) & (values[flagged] <= high))
            notes.append(f"{run.name}: {inside:.0%} of the {label} tokens are inside the trust region.")
        elif view.x != "ratio" and flagged.any() and not flagged.all():
            medians = np.median(values[flagged]), np.median(values[~flagged])
            unit = UNITS.get(view.x, "")
            notes.append(f"{run.name}: median {medians[0]:.3g}{unit} for the {label}, {medians[1]:.3g} for the kept.")
    return Drawn(LABELS[view.x], panels, notes)


def scatter_figure(view: TokenView, runs: Sequence[RecordedRun]) -> Drawn:
    """The tokens of every run as points; those with a flag look different."""
    panels, notes = [], []
    for run in runs:
        x, y = _values(run, view.x), _values(run, view.y)
        flagged = {label: run.tokens.column(flag) == 1.0 for flag, label in view.flags}
        kinds = {"kept": ~np.any(list(flagged.values()), axis=0), **flagged}
        shown = np.clip(y, 0.25, 4.0) if view.y in RATIOS else y
        curves = [_points_curve(run, x, shown, chosen, kind) for kind, chosen in kinds.items()]
        log, bounds = "y" if view.y in RATIOS else "", _guides(view, [run])
        panels.append(TokenPanel(LABELS[view.y], curves, "points", log=log, horizontal=bounds, title=run.name))
        if view.y not in RATIOS and len(x) > 2 and x.std() > 0 and y.std() > 0:
            correlation = np.corrcoef(x, y)[0, 1]
            notes.append(f"{run.name}: correlation of {LABELS[view.y]} with {LABELS[view.x]} {correlation:+.2f}.")
    return Drawn(LABELS[view.x], panels, notes)


KINDS: dict[str, Callable[[TokenView, Sequence[RecordedRun]], Drawn]] = {
    "histogram": histogram_figure,
    "split": split_figure,
    "scatter": scatter_figure,
}
"""How each kind of `TokenView` is drawn."""

LABELS = {
    "p_old": "probability of the sampled token under the old policy",
    "H": "entropy (nats)",
    "H_old": "entropy under the old policy (nats)",
    "ratio": "importance ratio",
    "entropy_ratio": "entropy ratio, new / old",
    "value_std": "sigma of the values",
}
"""Of the columns that a `TokenView` may show."""
RATIOS = ("ratio", "entropy_ratio")
UNITS = {"H": " nats", "H_old": " nats"}


def figure_of(view: TokenView) -> TokenFigure:
    """A control's figure, as the page draws it."""
    columns = {"lp_old" if name == "p_old" else name for name in (view.x, view.y) if name}
    flags = (flag for flag, _ in view.flags)
    return TokenFigure(view.name, view.title, (*columns, *flags), partial(KINDS[view.kind], view), view.reading)


def classes_figure(runs: Sequence[RecordedRun]) -> Drawn:
    shares, changes, notes = [], [], []
    for run in runs:
        contributions, classes = entropy_contributions(run.tokens.where(run.tokens.table["gradient"].is_valid()))
        members = [classes == index for index in range(len(CLASSES))]
        change = [float(contributions[member].sum()) for member in members]
        shares.append(Curve(run.index, CLASSES, [float(member.mean()) for member in members]))
        changes.append(Curve(run.index, CLASSES, change))
        notes.append(f"{run.name}: all together {sum(change):+.0%}, {'down' if sum(change) < 0 else 'up'}.")
    panels = [TokenPanel("share of tokens", shares, "bars"), TokenPanel("entropy change (share)", changes, "bars")]
    return Drawn("sign of the advantage & probability of the token", panels, notes)


def turns_figure(runs: Sequence[RecordedRun]) -> Drawn:
    curves = []
    for run in runs:
        turns, entropies = run.tokens.column("turn"), run.tokens.column("H")
        found = [turn for turn in np.unique(turns) if (turns == turn).sum() >= MIN_TURN_TOKENS]
        means = [float(np.nanmean(entropies[turns == turn])) for turn in found]
        if len(found) > 1:
            curves.append(Curve(run.index, [float(turn) + 1 for turn in found], means))
    return Drawn("turn", [TokenPanel("mean entropy (nats)", curves)] if curves else [])


TOKEN_FIGURES = (
    TokenFigure(
        "token_classes",
        "The four classes of tokens (CE-GPPO's)",
        ("A", "lp", "H", "gradient"),
        classes_figure,
        "Healthy: the two that lower the entropy (PA&HP, NA&LP) and the two that raise it (PA&LP, NA&HP) nearly "
        "balance. P and N: sign of the advantage; H and L: more or less probable than its state's tokens on average. "
        "Below: first-order change of the entropy, as a share of all changes.",
    ),
    TokenFigure(
        "token_turns",
        "Entropy by turn",
        ("turn", "H"),
        turns_figure,
        "Healthy: about level; entropy that grows from turn to turn is what EPO's corridor is to hold.",
    ),
    *(figure_of(view) for control in CONTROLS for view in control.token_views),
)


def _values(run: RecordedRun, name: str) -> Floats:
    """A column that a view shows."""
    return np.exp(run.tokens.column("lp_old")) if name == "p_old" else run.tokens.column(name)


def _edges(view: TokenView, runs: Sequence[RecordedRun]) -> tuple[Floats, str]:
    """Bins of a histogram, and which of its axes are logarithmic."""
    if view.x in RATIOS:
        return RATIO_EDGES, "xy"
    top = max(float(np.nanquantile(_values(run, view.x), 0.995)) for run in runs)
    return np.linspace(0.0, max(top, 1e-3), ENTROPY_BINS + 1), ""


def _histogram_line(values: Floats, edges: Floats) -> tuple[list[float], list[float]]:
    """Centres and shares of the bins."""
    return ((edges[:-1] + edges[1:]) / 2).tolist(), histogram(values, edges).tolist()


def _points_curve(run: RecordedRun, x: Floats, y: Floats, chosen: NDArray[np.bool_], kind: str) -> Curve:
    indices = thinned(chosen & np.isfinite(x) & np.isfinite(y))
    return Curve(run.index, x[indices].tolist(), y[indices].tolist(), kind)


def _guides(view: TokenView, runs: Sequence[RecordedRun]) -> tuple[float, ...]:
    """Where a view draws guides: at the runs' settings of its fields or the published ones, or the trust region."""
    if not view.guides:
        return _trust_region(runs) if view.x == "ratio" else ()
    found = [run.tokens.settings.get(name) for run in runs for name, _ in view.guides]
    set_in_a_run = {value for value in found if value is not None}
    return tuple(sorted(set_in_a_run or {value for _, value in view.guides}))


def _trust_region(runs: Sequence[RecordedRun]) -> tuple[float, ...]:
    """Edges of the runs' clip ranges."""
    low = {1 - run.tokens.settings["epsilon_low"] for run in runs}
    high = {1 + run.tokens.settings["epsilon_high"] for run in runs}
    return tuple(sorted(low | high))
