"""The results as a page: `python -m tests.gpu.table` writes `results/README.md` from the files beside it.

A card's results are one file there, `<card>.json`: `python -m tests.gpu.table runs/gpu` puts them together from the
parts that `tests.gpu.run` left in that folder, and writes the page.
"""

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.book import Items, read
from trl_entropy.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
NOT_YET = "not measured yet"
AIMS = {"time": 1.02, "memory": 1.01}
"""Of all controls of `step_overhead.py` together, against TRL's own step."""


def tests_lines(items: Items) -> list[str]:
    """How many hold, and the largest error as a share of what is allowed."""
    errors = {name: item for name, item in items.items() if "error" in item}
    share = {n: i["error"] / i["tolerance"] if i["tolerance"] else float(i["error"] > 0) for n, i in errors.items()}
    skipped = sum("skipped" in item for item in items.values())
    worst = max(share, key=share.__getitem__, default="")
    told = (
        f"; largest error {errors[worst]['error']:.1e} of {errors[worst]['tolerance']:.1e} ({worst})" if worst else ""
    )
    held = len(items) - skipped - sum("failed" in item for item in items.values())
    return [f"{held} of {len(items) - skipped} hold, {skipped} skipped{told}"]


def overhead_lines(items: Items) -> list[str]:
    lines = []
    for row in (row for item in items.values() for row in item["rows"]):
        low, high = row["time_ratio_quartiles"]
        aims = f" (aims: {AIMS['time']:.2f}, {AIMS['memory']:.2f})" if row["arm"] == "all" else ""
        lines.append(
            f"{row['arm']}: {row['seconds_median']:.3f} s, time {row['time_ratio_median']:.3f} ({low:.3f} to "
            f"{high:.3f}), memory {row['memory_ratio_median']:.3f}{aims}"
        )
    return lines


def critics_lines(items: Items) -> list[str]:
    rounds: dict[str, dict[str, dict[str, Any]]] = {}
    for name, item in items.items():
        arm, _, index = name.rpartition("/")
        rounds.setdefault(arm, {})[index] = item
    lines, base = [], rounds.get("symmetric ppo", {})
    for arm, own in rounds.items():
        both = [index for index in own if index in base]
        ratios = [[own[index][key] / base[index][key] for index in both] for key in ("seconds", "peak_bytes") if both]
        against = " and ".join(f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios)
        peak = statistics.median(item["peak_bytes"] for item in own.values()) / 1e9
        seconds = statistics.median(item["seconds"] for item in own.values())
        lines.append(f"{arm}: {seconds:.2f} s, {peak:.2f} GB; time and memory of symmetric PPO's: {against or '-'}")
    return lines


def rounding_lines(items: Items) -> list[str]:
    """Shares of tokens outside ERC's bounds with the same weights, by what else was different."""
    return [
        f"{name}: " + ", ".join(f"{what} {found['erc']['all']:.1%}" for what, found in item["rounding"].items())
        for name, item in items.items()
    ]


def arms_lines(items: Items) -> list[str]:
    """Means over seeds: held-out pass@k, and reward and entropy of the last five rollouts."""
    lines, seeds = [], Counter(name.rpartition("/")[0] for name in items)
    for arm, count in seeds.items():
        runs = [item for name, item in items.items() if name.rpartition("/")[0] == arm]
        told = {key: [run["held_out"][key][0] for run in runs] for key in runs[0]["held_out"]}
        for key in ("reward", "entropy"):
            told[key] = [statistics.mean(entry[key] for entry in run["log"][-5:]) for run in runs]
        means = ", ".join(f"{key} {statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for key, v in told.items())
        lines.append(f"{arm}, {count} seed{'s' * (count > 1)}: {means}")
    return lines


LINES: dict[str, Callable[[Items], list[str]]] = {
    "exactness": tests_lines,
    "heads": tests_lines,
    "overhead": overhead_lines,
    "critics": critics_lines,
    "rounding": rounding_lines,
    "arms": arms_lines,
}


def part_lines(name: str, content: dict[str, Any]) -> list[str]:
    """What a part's file says, or that there is nothing yet, and what failed."""
    items = content.get("items", {})
    failed = {item: found["failed"].strip().splitlines()[-1] for item, found in items.items() if "failed" in found}
    shown = items if LINES[name] is tests_lines else {key: i for key, i in items.items() if key not in failed}
    told = LINES[name](shown) if shown else [NOT_YET] * (not failed)
    if shown and (missing := content.get("expected", len(items)) - len(items)):
        told[0] += f", {missing} not run"
    return [*told, *(f"FAILED {item}: {why[:150]}" for item, why in failed.items())]


def page(parts: dict[str, dict[str, Any]], ended: dict[str, str]) -> str:
    """Markdown: the machine, and a row a line.

    Args:
        parts: The content of the parts' files, by name.
        ended: What became of the parts that were made just now.
    """
    machine = next((content["machine"] for content in parts.values() if content), {})
    lines = [", ".join(f"{key} {value}" for key, value in machine.items()), "", "| part | result |", "|---|---|"]
    for name in LINES:
        became = f" ({ended[name]})" if ended.get(name, "finished") != "finished" else ""
        told = part_lines(name, parts.get(name, {}))
        lines += [f"| {name}{became * (i == 0)} | {line.replace('|', '/')} |" for i, line in enumerate(told)]
    return "\n".join(lines) + "\n"


def table(folder: Path, ended: dict[str, str]) -> str:
    """The page of the files that the parts have left in a folder."""
    return page({name: read(folder / f"{name}.json") for name in LINES}, ended)


def results_page(folder: Path) -> str:
    """The page of all cards of which there are results."""
    pages = [page(read(file), {}) for file in sorted(folder.glob("*.json"))]
    return "# Measured on NVIDIA GPUs\n\n" + ("\n".join(pages) or f"{NOT_YET.capitalize()}.\n")


def keep(folder: Path, results: Path) -> None:
    """Put the parts' files of a folder together as their card's results, in place of the parts that were there."""
    parts = {name: read(folder / f"{name}.json") for name in LINES}
    parts = {name: content for name, content in parts.items() if content}
    cards = {content["machine"]["device"] for content in parts.values()}
    if len(cards) != 1:
        raise SystemExit(f"{folder} has the results of {len(cards)} cards ({', '.join(sorted(cards))}), not of one.")
    file = results / (re.sub("[^a-z0-9]+", "-", cards.pop().lower()).strip("-") + ".json")
    write_json(file, {**read(file), **parts})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="results to keep, such as runs/gpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.folder:
        keep(options.folder, options.results)
    write_text(options.results / "README.md", results_page(options.results))


if __name__ == "__main__":
    main()
