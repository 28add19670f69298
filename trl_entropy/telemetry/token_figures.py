"""The figures of what the controls did to the tokens, computed from the runs' records; `token_drawing` draws them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .record import TokenRecord

Floats = NDArray[np.float64]

RATIO_EDGES = np.geomspace(0.5, 2.0, 61)
"""Bins of a ratio; what lies beyond them counts in the outermost."""
ENTROPY_BINS = 30
MAX_POINTS = 400
"""Points of a kind in a panel: more hide each other, and make the page large."""
MIN_TURN_TOKENS = 10
"""A turn with fewer sampled tokens has no mean worth drawing."""
PUBLISHED_BOUNDS = (0.95, 1.05)
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
    adds `-(lp - E lp) pi A` with `E lp = -H`. `A` is weighted as the loss weighted it: by the importance ratio, by
    `alpha (1 -+ eps)` where CE-GPPO re-weighted the token, and by 0 where a control or PPO-clip dropped it.

    A token is HP if `lp > -H`, so that it is more probable than its state's tokens are on average, else LP; PA or NA
    by the sign of `A` (arXiv 2509.20712). PA&HP and NA&LP lower the entropy, PA&LP and NA&HP raise it.

    Returns:
        The contributions divided by the sum of their absolute values, and indices of `CLASSES` (-1 where `A = 0`).
    """
    settings, advantages = tokens.settings, tokens.column("A")
    lp, flags = tokens.column("lp"), {name: tokens.column(name) == 1.0 for name in ("ppo_low", "ppo_high")}
    weights = tokens.column("ratio")
    alphas = settings.get("ce_gppo_alpha1") or 0.0, settings.get("ce_gppo_alpha2") or 0.0
    weights = np.where(flags["ppo_low"], alphas[0] * (1 - settings["epsilon_low"]), weights)
    weights = np.where(flags["ppo_high"], alphas[1] * (1 + settings["epsilon_high"]), weights)
    for dropped in ("erc_clipped", "advantage_masked"):
        weights = np.where(tokens.column(dropped) == 1.0, 0.0, weights)
    above_average = lp + tokens.column("H")
    contributions = np.nan_to_num(-weights * advantages * np.exp(lp) * above_average)
    classes = 2 * (advantages < 0) + (above_average <= 0)
    return contributions / max(np.abs(contributions).sum(), 1e-12), np.where(advantages == 0, -1, classes)


def entropy_ratio_figure(runs: Sequence[RecordedRun]) -> Drawn:
    curves, notes = [], []
    for run in runs:
        ratios = run.tokens.column("entropy_ratio")
        curves.append(Curve(run.index, *_histogram_line(ratios, RATIO_EDGES)))
        low, high = run.tokens.settings.get("erc_low"), run.tokens.settings.get("erc_high")
        bounds = PUBLISHED_BOUNDS if low is None or high is None else (low, high)
        share = np.mean((ratios <= bounds[0]) | (ratios >= bounds[1]))
        notes.append(f"{run.name}: {share:.1%} of the tokens lie outside ({bounds[0]:g}, {bounds[1]:g}).")
    panel = TokenPanel("share of tokens", curves, log="xy", vertical=_erc_bounds(runs))
    return Drawn("entropy ratio, new / old", [panel], notes)


def erc_probability_figure(runs: Sequence[RecordedRun]) -> Drawn:
    panels = []
    for run in runs:
        clipped = run.tokens.column("erc_clipped") == 1.0
        x, y = np.exp(run.tokens.column("lp_old")), np.clip(run.tokens.column("entropy_ratio"), 0.25, 4.0)
        curves = [
            _points_curve(run, x, y, chosen, kind) for kind, chosen in (("kept", ~clipped), ("clipped", clipped))
        ]
        bounds = _erc_bounds([run])
        panels.append(TokenPanel("entropy ratio", curves, "points", log="y", horizontal=bounds, title=run.name))
    return Drawn("probability of the sampled token under the old policy", panels)


def erc_entropy_figure(runs: Sequence[RecordedRun]) -> Drawn:
    entropies = {run.index: run.tokens.column("H") for run in runs}
    top = max(float(np.nanquantile(values, 0.995)) for values in entropies.values())
    edges, panels, notes = np.linspace(0.0, max(top, 1e-3), ENTROPY_BINS + 1), [], []
    for label, wanted in (("clipped", 1.0), ("kept", 0.0)):
        curves = []
        for run in runs:
            chosen = entropies[run.index][run.tokens.column("erc_clipped") == wanted]
            if len(chosen):
                curves.append(Curve(run.index, *_histogram_line(chosen, edges), label))
        panels.append(TokenPanel(f"share of the {label}", curves))
    for run in runs:
        clipped = run.tokens.column("erc_clipped") == 1.0
        if clipped.any() and not clipped.all():
            medians = np.median(entropies[run.index][clipped]), np.median(entropies[run.index][~clipped])
            notes.append(f"{run.name}: median {medians[0]:.3g} nats for the clipped, {medians[1]:.3g} for the kept.")
    return Drawn("entropy (nats)", panels, notes)


def erc_region_figure(runs: Sequence[RecordedRun]) -> Drawn:
    panels, notes = [], []
    for label, wanted in (("clipped", 1.0), ("kept", 0.0)):
        curves = []
        for run in runs:
            chosen = run.tokens.column("ratio")[run.tokens.column("erc_clipped") == wanted]
            if len(chosen):
                curves.append(Curve(run.index, *_histogram_line(chosen, RATIO_EDGES), label))
        panels.append(TokenPanel(f"share of the {label}", curves, log="xy", vertical=_trust_region(runs)))
    for run in runs:
        clipped = run.tokens.column("erc_clipped") == 1.0
        if clipped.any():
            ratio, (low, high) = run.tokens.column("ratio")[clipped], _trust_region([run])
            inside = np.mean((ratio >= low) & (ratio <= high))
            notes.append(f"{run.name}: {inside:.0%} of the clipped tokens are inside the trust region.")
    return Drawn("importance ratio", panels, notes)


def classes_figure(runs: Sequence[RecordedRun]) -> Drawn:
    shares, changes, notes = [], [], []
    for run in runs:
        contributions, classes = entropy_contributions(run.tokens)
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


def disagreement_figure(runs: Sequence[RecordedRun]) -> Drawn:
    panels, notes = [], []
    for run in runs:
        x, y = run.tokens.column("H_old"), run.tokens.column("value_std")
        masked, filtered = (run.tokens.column(name) == 1.0 for name in ("advantage_masked", "entropy_filtered"))
        kinds = {"kept": ~masked & ~filtered, "masked": masked, "filtered": filtered}
        curves = [_points_curve(run, x, y, chosen, kind) for kind, chosen in kinds.items()]
        panels.append(TokenPanel("sigma of the values", curves, "points", title=run.name))
        if len(x) > 2 and x.std() > 0 and y.std() > 0:
            notes.append(f"{run.name}: correlation of sigma with entropy {np.corrcoef(x, y)[0, 1]:+.2f}.")
    return Drawn("entropy under the old policy (nats)", panels, notes)


TOKEN_FIGURES = (
    TokenFigure(
        "token_entropy_ratio",
        "Entropy ratio",
        ("entropy_ratio",),
        entropy_ratio_figure,
        "Healthy: a peak at 1 with thin tails; dotted: ERC's bounds, the published ones where ERC is off. Tails that "
        "grow fat call for a smaller learning rate or fewer updates per rollout.",
    ),
    TokenFigure(
        "token_erc_probability",
        "What ERC clips: probability against entropy ratio",
        ("erc_clipped", "entropy_ratio", "lp_old"),
        erc_probability_figure,
        "Healthy: the clipped tokens (crosses) are mostly probable ones, on the right, whose entropy is small, so "
        "that a small change is a large ratio.",
    ),
    TokenFigure(
        "token_erc_entropy",
        "Entropy of single tokens, clipped and kept by ERC",
        ("erc_clipped", "H"),
        erc_entropy_figure,
        "Healthy: the clipped lie further left, at lower entropy, as in the paper; the tokens that explore are kept.",
    ),
    TokenFigure(
        "token_erc_region",
        "What ERC clips, in and around the trust region",
        ("erc_clipped", "ratio"),
        erc_region_figure,
        "Healthy: the clipped are wider spread than the kept and crowd towards the trust region's edges (dotted); "
        "those inside are the ones that PPO-clip alone would have let through.",
    ),
    TokenFigure(
        "token_classes",
        "CE-GPPO's four classes of tokens",
        ("A", "lp", "H", "ratio"),
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
    TokenFigure(
        "token_disagreement",
        "AsyPPO's critics: disagreement against entropy",
        ("value_std", "H_old", "advantage_masked", "entropy_filtered"),
        disagreement_figure,
        "Healthy: no tight relation, else sigma only stands for entropy, and masking by entropy does worse in the "
        "paper, filtering by it collapses the policy. Low sigma: advantage masked; high: no entropy bonus.",
    ),
)


def _histogram_line(values: Floats, edges: Floats) -> tuple[list[float], list[float]]:
    """Centres and shares of the bins."""
    return ((edges[:-1] + edges[1:]) / 2).tolist(), histogram(values, edges).tolist()


def _points_curve(run: RecordedRun, x: Floats, y: Floats, chosen: NDArray[np.bool_], kind: str) -> Curve:
    indices = thinned(chosen & np.isfinite(x) & np.isfinite(y))
    return Curve(run.index, x[indices].tolist(), y[indices].tolist(), kind)


def _erc_bounds(runs: Sequence[RecordedRun]) -> tuple[float, ...]:
    """The bounds of the runs with ERC, or the published ones."""
    bounds = [run.tokens.settings.get(name) for run in runs for name in ("erc_low", "erc_high")]
    return tuple(sorted({bound for bound in bounds if bound is not None})) or PUBLISHED_BOUNDS


def _trust_region(runs: Sequence[RecordedRun]) -> tuple[float, ...]:
    """Edges of the runs' clip ranges."""
    low = {1 - run.tokens.settings["epsilon_low"] for run in runs}
    high = {1 + run.tokens.settings["epsilon_high"] for run in runs}
    return tuple(sorted(low | high))
