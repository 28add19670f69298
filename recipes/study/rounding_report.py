"""The tables of `rounding.md` between their markers, and its figures, from the rows of `rounding.jsonl`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from epo_oscillation import put_table
from matplotlib import rc_context

from trl_entropy.telemetry.figures import add_legend, look, new_canvas, rc_settings
from trl_entropy.telemetry.results import markdown_table
from trl_entropy.telemetry.rounding import ALL

FOLDER = Path(__file__).parent
PAGE = FOLDER / "rounding.md"
GATES = ("erc", "ppo_clip", "ce_gppo_low", "ce_gppo_high")
LAYOUTS = ("one by one, unpadded", "more padding", "float32")
STEPS_PER_ROLLOUT = 8
Results = dict[str, dict[str, Any]]


def report(results: Results) -> None:
    """Write the tables and draw the figures of what there is."""
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        page = put_table(page, name, table)
    PAGE.write_text(page, encoding="utf-8")
    for name, draw in FIGURES.items():
        with rc_context(rc_settings(name)):
            draw(probed(results)).savefig(FOLDER / f"{name}.png", dpi=160)


def tables(results: Results) -> dict[str, str]:
    """Every table, by the name of its marker."""
    rows = probed(results)
    return {
        "same weights": _same_weights(rows),
        "bands": _bands(rows),
        "updates": _updates(rows),
        "other gates": _other_gates(rows),
        "remedies": _remedies(rows),
        "cost": _cost(rows),
        "training": _training(results),
    }


def probed(results: Results) -> Results:
    """The rows that are probes, in the order of the page."""
    names = [name for name in results if not name.startswith("training/")]
    models = ("arithmetic", "SmolLM2", "SmolLM2, off the grid", "SmolLM2, 4-bit")
    arms = ("float32", "autocast", "autocast, float32 head", "bfloat16")

    def place(name: str) -> tuple[Any, ...]:
        model, arm, temperature = name.split("/")
        return models.index(model), -float(temperature), arms.index(arm) if arm in arms else len(arms), arm

    return {name: results[name] for name in sorted(names, key=place)}


def _same_weights(rows: Results) -> str:
    head = ["model", "computed in", "temperature", "tokens", *(f"ERC, {name}" for name in LAYOUTS)]
    head += ["PPO-clip's range", "CE-GPPO, A < 0", "CE-GPPO, A > 0"]
    body = []
    for name, row in rows.items():
        erc = [_share(row["rounding"][layout]["erc"][ALL]) for layout in LAYOUTS]
        others = [_share(max(row["rounding"][layout][gate][ALL] for layout in LAYOUTS)) for gate in GATES[1:]]
        body.append([*name.split("/"), str(row["tokens"][ALL]), *erc, *others])
    return markdown_table(head, body)


def _bands(rows: Results) -> str:
    shown = {name: row for name, row in rows.items() if "float32" not in name.split("/")[1].split(",")[0]}
    bands = [band for band in next(iter(rows.values()))["tokens"] if band != ALL]
    body = []
    for name, row in shown.items():
        shares = row["rounding"]["float32"]["erc"]
        cells = [f"{_share(shares[band])} ({row['tokens'][band]})" for band in bands]
        body.append([*name.split("/"), *cells])
    return markdown_table(["model", "computed in", "temperature", *(f"{band} nats" for band in bands)], body)


def _updates(rows: Results) -> str:
    return markdown_table(
        ["model", "computed in", "temperature", "learning rate", "clipped", "in float32", "precision", "recall"],
        [
            [*name.split("/"), f"{update['learning_rate']:g}", *_agreement(update["erc"][ALL])]
            for name, row in rows.items()
            for update in row["updates"]
        ],
    )


def _other_gates(rows: Results) -> str:
    head = ["model", "computed in", "temperature", "learning rate"]
    head += [f"{gate}{suffix}" for gate in ("PPO-clip", "A < 0", "A > 0") for suffix in ("", ", in float32")]
    body = []
    for name, row in rows.items():
        for update in row["updates"]:
            pairs = [(update[gate][ALL]["share"], update[gate][ALL]["share_float32"]) for gate in GATES[1:]]
            body.append(
                [*name.split("/"), f"{update['learning_rate']:g}", *(_share(x) for pair in pairs for x in pair)]
            )
    return markdown_table(head, body)


def _remedies(rows: Results) -> str:
    """Precision / recall of every gate, a column for each learning rate."""
    shown = {name: row for name, row in rows.items() if name.split("/")[1] not in ("float32", "LoRA in float32")}
    rates = [update["learning_rate"] for update in next(iter(rows.values()))["updates"]]
    body = []
    for name, row in shown.items():
        for remedy in row["updates"][0]["remedies"]:
            found = [update["remedies"][remedy] for update in row["updates"]]
            cells = [f"{_share(one['precision'], 2)} / {_share(one['recall'], 2)}" for one in found]
            body.append([*name.split("/"), remedy, *cells])
    return markdown_table(["model", "computed in", "temperature", "gate", *(f"{rate:g}" for rate in rates)], body)


def _cost(rows: Results) -> str:
    body = [
        [*name.split("/")[:2], f"{row['pass_seconds']:.2f}"]
        for name, row in rows.items()
        if name.endswith("/1") and row["pass_seconds"] is not None and "exact" not in name
    ]
    return markdown_table(["model", "computed in", "seconds of one forward pass"], body)


def _training(results: Results) -> str:
    head = ["computed in", "learning rate", "steps 2 to 8", "steps 10 to 16"]
    body = []
    for name, row in results.items():
        if name.startswith("training/"):
            shares = row["clip_fraction"]
            halves = shares[1:STEPS_PER_ROLLOUT], shares[STEPS_PER_ROLLOUT + 1 :]
            assert shares[0] == shares[STEPS_PER_ROLLOUT] == 0.0
            body.append([*name.split("/")[1:], *(f"{min(half):.2f} to {max(half):.2f}" for half in halves)])
    return markdown_table(head, sorted(body, key=lambda line: (line[0], float(line[1]))))


def draw_bands(rows: Results) -> Any:
    """Share outside ERC's bounds with the same weights, against float32, by band of entropy."""
    bands = [band for band in next(iter(rows.values()))["tokens"] if band != ALL]
    canvas, (axis,) = new_canvas(1)
    shown = [name for name in rows if name.split("/")[1] in ("autocast", "bfloat16", "autocast, float32 head")]
    handles = []
    for index, name in enumerate(shown):
        shares = rows[name]["rounding"]["float32"]["erc"]
        points = [(at, shares[band]) for at, band in enumerate(bands) if shares[band] is not None]
        handles += axis.plot(*zip(*points, strict=True), **look(index), marker="o", markersize=4)
    axis.set_xticks(range(len(bands)), bands, fontsize=8)
    axis.set_xlabel("entropy (nats)")
    axis.set_ylabel("share outside")
    axis.set_ylim(bottom=0)
    add_legend(canvas, handles, shown)
    canvas.set_size_inches(6.4, 4.4)
    return canvas


def draw_precision(rows: Results) -> Any:
    """Precision and recall of ERC after the first optimizer step, by learning rate."""
    canvas, axes = new_canvas(2)
    shown = [name for name in rows if "exact" not in name and name.split("/")[1] not in ("float32", "LoRA in float32")]
    handles: dict[str, Any] = {}
    for axis, kind in zip(axes, ("precision", "recall"), strict=True):
        for index, name in enumerate(shown):
            found = [(update["learning_rate"], update["erc"][ALL][kind]) for update in rows[name]["updates"]]
            points = [(rate, value) for rate, value in found if value is not None]
            if points:
                handles[name] = axis.plot(*zip(*points, strict=True), **look(index), marker="o", markersize=4)[0]
        axis.set_xscale("log")
        axis.set_ylim(-0.03, 1.03)
        axis.set_ylabel(kind)
    axes[-1].set_xlabel("learning rate")
    add_legend(canvas, list(handles.values()), list(handles))
    canvas.set_size_inches(6.4, 5.6)
    return canvas


FIGURES: dict[str, Callable[[Results], Any]] = {"rounding_bands": draw_bands, "rounding_precision": draw_precision}


def _agreement(found: dict[str, float | None]) -> list[str]:
    return [_share(found[kind]) for kind in ("share", "share_float32", "precision", "recall")]


def _share(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
