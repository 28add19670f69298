"""How a control reports what it does: its metrics, its marks on tokens, and its figures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric that a control logs, as `<prefix>/<name>`.

    Attributes:
        name: After the prefix.
        unit: Such as "nats" or "share of tokens".
        meaning: A phrase.
        healthy: What a healthy run shows, a phrase.
    """

    name: str
    unit: str
    meaning: str
    healthy: str


@dataclass(frozen=True)
class Mark:
    """Something that can happen to a token.

    Attributes:
        column: The flag of the record that says so.
        letter: Stands beside the token, so that no colour is needed to tell.
        label: A few words.
        meaning: What they mean.
        style: Its look on the page: background, border's style and border's colour, in CSS.
        metric: The metric (with its prefix) whose value over the tokens the flag is; empty where the recorder computes
            the flag itself.
    """

    column: str
    letter: str
    label: str
    meaning: str
    style: tuple[str, str, str]
    metric: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        label: What the vertical axis shows, with its unit.
        keys: Metrics that hold it; the first that a log entry has is drawn.
        guides: Metrics of where it should be, drawn dotted; the panel is drawn for runs that have them.
        band: Metrics of a lower and an upper edge, shaded behind the lines; the panel is drawn for runs that have it.
    """

    label: str
    keys: tuple[str, ...]
    guides: tuple[str, ...] = ()
    band: tuple[str, str] | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of the report: metrics against the optimizer step.

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


@dataclass(frozen=True)
class TokenView:
    """A figure of the recorded tokens that a control asks for; `token_figures` has one way of drawing for each `kind`.

    Attributes:
        name: Stem of its files.
        title: Heading in the report.
        kind: `"histogram"` of `x` over all tokens, `"split"` for one histogram of those that a flag is set for and one
            of the others, or `"scatter"` of `y` against `x`, with the flagged tokens apart.
        x: Column of the record; its label is `token_figures.LABELS`'.
        y: Column of a scatter.
        flags: Flags of the record, and what to call the tokens where they are set.
        guides: Fields of the configuration at whose values a guide is drawn, with the value for runs without it.
        reading: One sentence on what a healthy run looks like.
    """

    name: str
    title: str
    kind: str
    x: str
    reading: str
    y: str = ""
    flags: tuple[tuple[str, str], ...] = ()
    guides: tuple[tuple[str, float], ...] = ()
