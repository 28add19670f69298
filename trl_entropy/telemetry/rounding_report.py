"""A probe of rounding as tables, as advice and as a figure. The figure needs the extra `plots`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .figures import Row, add_legend, look, new_canvas, rc_settings, require_plots, save
from .markdown import markdown_table
from .rounding import ALL, NOISE_SHARE

GATES = {
    "erc": "ERC",
    "ppo_clip": "PPO-clip's range",
    "ce_gppo_low": "CE-GPPO, A < 0",
    "ce_gppo_high": "CE-GPPO, A > 0",
}
"""What the tables call each control."""
NOTHING = 0.005
"""A share of tokens below which a control does nothing worth advice."""
TITLE = "Tokens outside ERC's bounds by rounding"


def tables(summary: dict[str, Any]) -> str:
    """Two Markdown tables: the same weights computed differently, and optimizer steps against float32."""
    bands = [band for band in summary["tokens"] if summary["tokens"][band]]
    counts = [f"{band} ({summary['tokens'][band]})" for band in bands[1:]]
    head = ["same weights", *(GATES[gate] for gate in GATES), *(f"ERC, {count} nats" for count in counts)]
    same = [
        [name, *(_share(by_gate[gate][ALL]) for gate in GATES), *(_share(by_gate["erc"][band]) for band in bands[1:])]
        for name, by_gate in summary["rounding"].items()
    ]
    steps_head = ["optimizer steps", "control", "tokens", "in float32", "precision", "recall"]
    kinds = ("share", "share_float32", "precision", "recall")
    steps = [
        [str(update["step"]), GATES[gate], *(_share(update[gate][ALL][kind]) for kind in kinds)]
        for update in summary["updates"]
        for gate in GATES
    ]
    left_out = summary["float32_left_out"]
    note = f"\n\nWithout float32: {left_out}." if left_out else ""
    total = f"{summary['tokens'][ALL]} tokens. Shares of tokens outside each control's bounds:"
    return f"{total}\n\n{markdown_table(head, same)}\n\n{markdown_table(steps_head, steps)}{note}"


def noise(summary: dict[str, Any], update: dict[str, Any], gate: str = "erc") -> float:
    """Which share of the tokens that a control acts on after an update is there by rounding.

    Those that it would not act on in float32. Where that is not known, or float32 is what is asked about: as many as
    another batch shape or padding alone brings out.
    """
    found = update[gate][ALL]
    if not found["share"]:
        return 0.0
    if found["precision"] is not None and not _in_float32(summary["settings"]):
        return 1.0 - found["precision"]
    layouts = [by_gate[gate][ALL] for name, by_gate in summary["rounding"].items() if name != "float32"]
    return min(1.0, max(layouts) / found["share"])


def advice(summary: dict[str, Any]) -> list[str]:
    """What to make of a probe, in a few sentences."""
    return [_on_erc(summary), _on_ppo_clip(summary)]


def _on_erc(summary: dict[str, Any]) -> str:
    worst = _noisiest(summary, "erc")
    if worst is None:
        return "ERC clips next to nothing in these steps, by rounding or otherwise."
    told = f"ERC clips {_told(summary, worst, 'erc')} rounding"
    if noise(summary, worst) <= NOISE_SHARE:
        return f"{told}: it measures the policy."
    return f"{told}: it drops tokens at random. {remedy(summary['settings'])}"


def remedy(settings: dict[str, Any]) -> str:
    """What to change so that ERC measures the policy."""
    if _in_float32(settings):
        return "Raise erc_entropy_floor, or the temperature: these entropies are too small for float32."
    if settings["autocast"] == "float16":
        return "Set cast_lm_head_to_fp32, raise erc_entropy_floor, or compute in float32 (bf16: false, fp16: false)."
    return (
        "Compute in float16 on a GPU (dtype: float32, bf16: false, fp16: true) or in float32 (bf16: false); where it "
        "must be bfloat16, set cast_lm_head_to_fp32 and raise erc_entropy_floor, or leave erc_low and erc_high out."
    )


def _in_float32(settings: dict[str, Any]) -> bool:
    return settings["dtype"] == "float32" and settings["autocast"] is None


def _on_ppo_clip(summary: dict[str, Any]) -> str:
    alone = max(by_gate["ppo_clip"][ALL] for by_gate in summary["rounding"].values())
    told = f"{_share(alone)} of the tokens leave PPO-clip's range, which CE-GPPO reads too, by rounding alone."
    worst = _noisiest(summary, "ppo_clip")
    if worst is None or noise(summary, worst, "ppo_clip") <= NOISE_SHARE:
        return told
    return f"{told} Outside are {_told(summary, worst, 'ppo_clip')} rounding."


def _noisiest(summary: dict[str, Any], gate: str) -> dict[str, Any] | None:
    """Of the updates after which a control acts, the one where most of that is rounding."""
    acting = [update for update in summary["updates"] if update[gate][ALL]["share"] >= NOTHING]
    return max(acting, key=lambda update: noise(summary, update, gate), default=None)


def _told(summary: dict[str, Any], update: dict[str, Any], gate: str) -> str:
    after = f"after {update['step']} optimizer step{'s' if update['step'] > 1 else ''}"
    share, of_noise = update[gate][ALL]["share"], noise(summary, update, gate)
    return f"{_share(share)} of the tokens {after}, and {_share(of_noise)} of these are"


def draw_rounding(summary: dict[str, Any], stem: Path) -> str:
    """Draw the shares outside ERC's bounds by band of entropy, and save it as `stem.svg`, `stem.png` and `stem.csv`.

    Returns:
        The SVG element, to be put into a page.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    require_plots()
    from matplotlib import rc_context

    with rc_context(rc_settings("rounding")):
        bands = [band for band in summary["tokens"] if band != ALL]
        canvas, axes = new_canvas(2)
        handles: dict[str, Any] = {}
        for axis, lines in zip(axes, (_same_weights(summary), _after_steps(summary)), strict=True):
            for name, shares in lines.items():
                points = [(bands.index(band), share) for band, share in shares.items() if share is not None]
                drawn = axis.plot(*zip(*points, strict=True), **look(len(handles)), marker="o", markersize=4)
                handles[name] = drawn[0]
            axis.set_ylim(bottom=0)
        axes[0].set_ylabel("share, same weights")
        axes[1].set_ylabel("share, after steps")
        axes[1].set_xticks(range(len(bands)), bands, fontsize=8)
        axes[1].set_xlabel("entropy (nats)")
        add_legend(canvas, list(handles.values()), list(handles))
        return save(canvas, TITLE, stem, _rows(summary))


def _same_weights(summary: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    return {name: _by_band(by_gate["erc"]) for name, by_gate in summary["rounding"].items()}


def _after_steps(summary: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    lines = {}
    for update in summary["updates"]:
        by_band = _by_band(update["erc"])
        lines[f"step {update['step']}"] = {band: found["share"] for band, found in by_band.items()}
        if summary["float32_left_out"] is None:
            true = {band: found["share_float32"] for band, found in by_band.items()}
            lines[f"step {update['step']}, float32"] = true
    return lines


def _by_band(values: dict[str, Any]) -> dict[str, Any]:
    return {band: value for band, value in values.items() if band != ALL}


def _rows(summary: dict[str, Any]) -> Iterator[Row]:
    for panel, lines in (("same weights", _same_weights(summary)), ("after steps", _after_steps(summary))):
        for name, shares in lines.items():
            for band, share in shares.items():
                if share is not None:
                    yield panel, name, "outside ERC's bounds", band, share


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
