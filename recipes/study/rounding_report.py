"""The tables of `rounding.md` between their markers, and its figures.

From the rows of `rounding.jsonl` and `rounding_cost.json`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from epo_oscillation import put_table
from matplotlib import rc_context

from trl_entropy.telemetry.figures import add_legend, look, new_canvas, rc_settings
from trl_entropy.telemetry.markdown import markdown_table
from trl_entropy.telemetry.rounding import ALL

FOLDER = Path(__file__).parent
PAGE = FOLDER / "rounding.md"
COST = FOLDER / "rounding_cost.json"
GATES = ("erc", "ppo_clip", "ce_gppo_low", "ce_gppo_high")
GATE_NAMES = ("PPO-clip's range", "CE-GPPO, A < 0", "CE-GPPO, A > 0")
FLOAT32 = ("float32", "LoRA in float32")
"""Ways to compute that agree with themselves."""
LAYOUTS = ("one by one, unpadded", "more padding", "float32")
STEPS_PER_ROLLOUT = 8
AIM = 0.9, 0.8
"""Precision and recall."""
EVERY_GATE = ("autocast", "autocast, float32 head")
"""Where every gate is shown; elsewhere `SHOWN_GATES`."""
SHOWN_GATES = ("published", "floor 0.01", "floor 0.05", "best floor and bounds")
DRAWN = {
    "arithmetic, 0.6": {arm: f"arithmetic/{arm}/0.6" for arm in ("autocast", "bfloat16", "float16")},
    "SmolLM2, 1": {
        **{arm: f"SmolLM2, off the grid/{arm}/1" for arm in ("autocast", "float16", "autocast, float32 head")},
        **{arm: f"SmolLM2/{arm}/1" for arm in ("bfloat16", "LoRA in autocast", "LoRA in float16")},
    },
}
"""Panels of the figures: the rows, by how they are computed."""
LEAST_TOKENS = 5
"""Of a band that is drawn."""
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
        "cost": _cost(json.loads(COST.read_text(encoding="utf-8"))["rows"]),
        "training": _training(results),
    }


def probed(results: Results) -> Results:
    """The rows that are probes, in the order of the page."""
    names = [name for name in results if not name.startswith("training/")]
    models = ("arithmetic", "SmolLM2", "SmolLM2, off the grid", "SmolLM2, 4-bit")
    arms = ("float32", "autocast", "autocast, float32 head", "bfloat16", "float16")

    def place(name: str) -> tuple[Any, ...]:
        model, arm, temperature = name.split("/")
        return models.index(model), -float(temperature), arms.index(arm) if arm in arms else len(arms), arm

    return {name: results[name] for name in sorted(names, key=place)}


def _same_weights(rows: Results) -> str:
    head = ["model", "computed in", "temperature", "tokens", *(f"ERC, {name}" for name in LAYOUTS)]
    head += GATE_NAMES
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
            if "exact" not in name
            for update in row["updates"]
        ],
    )


def _other_gates(rows: Results) -> str:
    """Of every gate but ERC: shares in training's precision and in float32, and the precision, by learning rate."""
    body = []
    for name, row in rows.items():
        if "exact" not in name and name.split("/")[1] not in FLOAT32:
            for gate, label in zip(GATES[1:], GATE_NAMES, strict=True):
                found = [update[gate][ALL] for update in row["updates"]]
                cells = [
                    f"{_share(one['share'])} / {_share(one['share_float32'])} ({_share(one['precision'], 2)})"
                    for one in found
                ]
                body.append([*name.split("/"), label, *cells])
    return markdown_table(["model", "computed in", "temperature", "tokens", *_rates(rows)], body)


def _remedies(rows: Results) -> str:
    """Precision / recall of every gate, a column for each learning rate; bold where it reaches `AIM`."""
    body = []
    for name, row in rows.items():
        arm = name.split("/")[1]
        if arm not in FLOAT32:
            for remedy in row["updates"][0]["remedies"]:
                if arm in EVERY_GATE or remedy in SHOWN_GATES:
                    cells = [_reached(update["remedies"][remedy]) for update in row["updates"]]
                    body.append([*name.split("/"), remedy, *cells])
    return markdown_table(["model", "computed in", "temperature", "gate", *_rates(rows)], body)


def _rates(rows: Results) -> list[str]:
    return [f"{update['learning_rate']:g}" for update in next(iter(rows.values()))["updates"]]


def _reached(found: dict[str, float | None]) -> str:
    precision, recall = found["precision"], found["recall"]
    cell = f"{_share(precision, 2)} / {_share(recall, 2)}"
    reached = precision is not None and recall is not None and precision >= AIM[0] and recall >= AIM[1]
    return f"**{cell}**" if reached else cell


def _cost(rows: list[dict[str, Any]]) -> str:
    body = [
        [row["arm"], str(row["rounds"]), f"{row['seconds']:.2f}", f"{row['ratio']:.3f}", _range(row["quartiles"])]
        for row in rows
    ]
    return markdown_table(["a step with", "rounds", "seconds", "time ratio", "quartiles"], body)


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
    canvas, axes = new_canvas(len(DRAWN))
    handles: dict[str, Any] = {}
    for axis, (panel, shown) in zip(axes, DRAWN.items(), strict=True):
        for arm, row in _drawn(rows, shown):
            shares = row["rounding"]["float32"]["erc"]
            points = [(at, shares[band]) for at, band in enumerate(bands) if row["tokens"][band] >= LEAST_TOKENS]
            handles[arm] = axis.plot(*zip(*points, strict=True), **_look(arm), marker="o", markersize=4)[0]
        axis.set_ylabel(f"share outside\n{panel}")
        axis.set_ylim(bottom=0)
    axes[-1].set_xticks(range(len(bands)), bands, fontsize=8)
    axes[-1].set_xlabel("entropy (nats)")
    add_legend(canvas, list(handles.values()), list(handles))
    canvas.set_size_inches(6.4, 5.6)
    return canvas


def draw_precision(rows: Results) -> Any:
    """Precision and recall of the published gate after the first optimizer step, by learning rate."""
    canvas, axes = new_canvas(2 * len(DRAWN))
    panels = [(panel, shown, kind) for panel, shown in DRAWN.items() for kind in ("precision", "recall")]
    handles: dict[str, Any] = {}
    for axis, (panel, shown, kind) in zip(axes, panels, strict=True):
        for arm, row in _drawn(rows, shown):
            found = [(update["learning_rate"], update["erc"][ALL][kind]) for update in row["updates"]]
            points = [(rate, value) for rate, value in found if value is not None]
            if points:
                handles[arm] = axis.plot(*zip(*points, strict=True), **_look(arm), marker="o", markersize=4)[0]
        axis.set_xscale("log")
        axis.set_ylim(-0.03, 1.03)
        axis.set_ylabel(f"{kind}\n{panel}")
    axes[-1].set_xlabel("learning rate")
    add_legend(canvas, list(handles.values()), list(handles))
    canvas.set_size_inches(6.4, 9.0)
    return canvas


def _drawn(rows: Results, shown: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    return [(arm, rows[name]) for arm, name in shown.items() if name in rows]


def _look(arm: str) -> dict[str, str]:
    """The same of an arm in every panel."""
    return look(list(dict.fromkeys(arm for shown in DRAWN.values() for arm in shown)).index(arm))


FIGURES: dict[str, Callable[[Results], Any]] = {"rounding_bands": draw_bands, "rounding_precision": draw_precision}


def _agreement(found: dict[str, float | None]) -> list[str]:
    return [_share(found[kind]) for kind in ("share", "share_float32", "precision", "recall")]


def _range(ends: list[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _share(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
