"""The HTML report of one run, or of several side by side: one page that needs no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..controls.health import MIN_ENTRIES, WINDOW, Finding, long_enough
from ..files import write_text
from .completions import MARKS, Completion, completions_of
from .diagnosis import diagnose
from .figures import FIGURES, draw, require_plots
from .record import TokenRecord, read_record
from .runs import LoggedRun, read_runs
from .token_drawing import draw_tokens
from .token_figures import TOKEN_FIGURES, RecordedRun

ABSENT = "-"


@dataclass(frozen=True)
class DrawnFigure:
    """A figure as the page shows it: name, title, SVG element, reading, and what its numbers say."""

    name: str
    title: str
    svg: Markup
    reading: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TokenPage:
    """What the page shows of the recorded tokens; `completions` are by the runs' names, `marks` those that occur."""

    figures: list[DrawnFigure]
    completions: dict[str, list[Completion]]

    @property
    def marks(self) -> list[Any]:
        shown = [token for of_run in self.completions.values() for one in of_run for token in one.tokens]
        return [mark for mark in MARKS if any(mark in token.marks for token in shown)]


def write_report(
    folders: Sequence[str | Path], output: str | Path, title: str | None = None, note: str | None = None
) -> Path:
    """Write the page, and every figure as SVG, PNG and CSV in a folder beside it (`report_figures` for `report.html`).

    Args:
        folders: Run folders, as `read_runs` takes them.
        output: The HTML file; its folder is made if it is not there.
        title: Heading of the page; `None` for the name of the run, or the number of runs.
        note: What a reader should know of the runs, under the heading.

    Returns:
        `output`.

    Raises:
        ImportError: If matplotlib is not installed.
        FileNotFoundError: If a folder holds no run.
        ValueError: If a file of a run is not what its name says.
    """
    require_plots()
    runs, output = read_runs(folders), Path(output)
    figure_folder = output.with_name(f"{output.stem}_figures")
    figure_folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for figure in FIGURES:
        if svg := draw(figure, runs, figure_folder / figure.name):
            # matplotlib escapes the text that it writes into an SVG.
            figures.append(DrawnFigure(figure.name, figure.title, Markup(svg), figure.reading))
    title = title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared")
    page = _render(title, note, runs, figures, _token_page(runs, figure_folder), figure_folder.name)
    write_text(output, page)
    return output


def _token_page(runs: Sequence[LoggedRun], figure_folder: Path) -> TokenPage:
    records: dict[int, TokenRecord] = {}
    for index, run in enumerate(runs):
        record = read_record(run.folder) if run.folder else None
        if record is not None:
            records[index] = record
    recorded = [RecordedRun(index, runs[index].name, record.sampled) for index, record in records.items()]
    figures = []
    for figure in TOKEN_FIGURES:
        if drawn := draw_tokens(figure, recorded, figure_folder / figure.name):
            svg, notes = drawn
            figures.append(DrawnFigure(figure.name, figure.title, Markup(svg), figure.reading, notes))
    completions = {runs[index].name: completions_of(record) for index, record in records.items()}
    return TokenPage(figures, {name: found for name, found in completions.items() if found})


def _findings(runs: Sequence[LoggedRun]) -> dict[str, list[Finding]]:
    """The findings of each run that its log is long enough for."""
    return {run.name: diagnose(run.log_history) for run in runs if long_enough(run.log_history)}


def _render(
    title: str,
    note: str | None,
    runs: Sequence[LoggedRun],
    figures: Sequence[DrawnFigure],
    tokens: TokenPage,
    figure_folder: str,
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["value"] = _value
    shared, differing = _split_settings(runs)
    return environment.get_template("report.html.jinja").render(
        title=title,
        note=note,
        runs=runs,
        accuracies=[_accuracy_row(run) for run in runs if "accuracy_after" in run.result],
        num_problems=sorted({run.result["num_problems"] for run in runs if "num_problems" in run.result}),
        findings=_findings(runs),
        min_steps=2 * WINDOW,
        min_entries=MIN_ENTRIES,
        figures=figures,
        missing=[figure.title for figure in FIGURES if figure.name not in {drawn.name for drawn in figures}],
        tokens=tokens,
        marks=MARKS,
        figure_folder=figure_folder,
        shared=shared,
        differing=differing,
        versions=_unique([run.result["versions"] for run in runs if "versions" in run.result]),
    )


def _accuracy_row(run: LoggedRun) -> dict[str, str]:
    before, after = run.result.get("accuracy_before"), run.result["accuracy_after"]
    return {
        "name": run.name,
        "before": _accuracy(before),
        "before_ci95": _interval(run.result.get("accuracy_before_ci95")),
        "after": _accuracy(after),
        "after_ci95": _interval(run.result.get("accuracy_after_ci95")),
        "change": ABSENT if before is None else f"{after - before:+.3f}",
        "greedy_before": _accuracy(run.result.get("greedy_accuracy_before")),
        "greedy_after": _accuracy(run.result.get("greedy_accuracy_after")),
    }


def _accuracy(share: float | None) -> str:
    return ABSENT if share is None else f"{share:.3f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""


def _value(value: object) -> str:
    """A setting as a reader would write it."""
    if value is None:
        return ABSENT
    return f"{value:g}" if isinstance(value, float) else str(value)


def _split_settings(runs: Sequence[LoggedRun]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The settings that all runs share, and for each of the others its value in every run (`None` where not set)."""
    settings = [run.result.get("settings", {}) for run in runs]
    keys = dict.fromkeys(key for of_run in settings for key in of_run)
    values = {key: [of_run.get(key) for of_run in settings] for key in keys}
    shared = {key: of_runs[0] for key, of_runs in values.items() if len(_unique(of_runs)) == 1}
    return shared, {key: of_runs for key, of_runs in values.items() if key not in shared}


def _unique(values: Sequence[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
