"""`trl-entropy methods [NAME ...] [--markdown | --metrics | --trainers]`: the controls, from their table."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields
from textwrap import indent, wrap
from typing import Any

from trl_entropy import AsyPPOConfig, EntropyRLOOConfig
from trl_entropy.controls import CONTROLS, Control
from trl_entropy.telemetry import staleness
from trl_entropy.trainers.async_controls import SUPPORTED as ASYNC_CONTROLS
from trl_entropy.trainers.config import EntropyControls, EntropyGRPOConfig
from trl_entropy.trainers.overrides import LIMITS

WIDTH = 100
OTHER_METRICS = (
    (
        "ppo_clip/low_fraction",
        "share of tokens",
        "`A < 0` and ratio below `1 - epsilon`, before any control",
        "0 at a rollout's first step, then below 0.01; 0.0002 in the papers",
    ),
    (
        "ppo_clip/high_fraction",
        "share of tokens",
        "`A > 0` and ratio above `1 + epsilon_high`, before any control",
        "0 at a rollout's first step, then below 0.01; 0.0002 in the papers",
    ),
    *staleness.METRICS,
    (
        "entropy/turn_<n>, entropy/turns_9_to_16, entropy/turns_17_to_32, entropy/turns_from_33",
        "nats",
        "mean entropy of the tokens of these turns; only where completions are episodes, also with no control set",
        "as `entropy`; one that rises towards the last turns: the policy is lost by then",
    ),
    (
        "episode/success_rate",
        "share of episodes",
        "solved within the turns and tokens allowed; discarded episodes do not count",
        "rises",
    ),
    (
        "episode/turns",
        "turns",
        "mean length of an episode",
        "falls as success rises, at the limit the policy wanders",
    ),
    ("episode/discarded_fraction", "share of episodes", "dropped because their simulator crashed", "0"),
    (
        "token_rewards",
        "reward",
        "mean total of a completion's token rewards; only where a function gives them",
        "rises",
    ),
    ("reward", "reward", "mean total reward of the rollout (TRL)", "rises"),
    (
        "entropy",
        "nats",
        "mean entropy of the policy (TRL)",
        "falls slowly and stays above zero",
    ),
    ("grad_norm", "-", "norm of the gradient before clipping (TRL)", "stays in one band"),
)
"""Metrics that no control logs."""


GRPO = "EntropyGRPOTrainer, entropy_controlled(MyGRPOTrainer)"
TRAINERS: dict[str, frozenset[str]] = {
    GRPO: frozenset(one.prefix for one in CONTROLS if one.known_to(EntropyGRPOConfig)),
    "AsyPPOTrainer": frozenset(
        one.prefix for one in CONTROLS if one.known_to(AsyPPOConfig) and not one.sets_advantages
    ),
    "EntropyPPOTrainer": frozenset(
        one.prefix for one in CONTROLS if one.known_to(EntropyControls) or one.comes_with_critics
    ),
    "EntropyRLOOTrainer, entropy_controlled(MyRLOOTrainer)": frozenset(
        one.prefix for one in CONTROLS if one.known_to(EntropyRLOOConfig)
    ),
    "EntropyAsyncGRPOTrainer": ASYNC_CONTROLS,
}
"""Prefixes of the controls of every trainer, by its names."""


def excluded(control: Control) -> list[str]:
    """The names of the controls that cannot be on beside one, whichever of the two says so."""
    pairs = {(one.prefix, prefix) for one in CONTROLS for prefix, _ in one.excludes}
    steering = [one for one in CONTROLS if one.steers_entropy or one.target_loop is not None]
    loops = [one for one in steering if one is not control and control in steering]
    found = [one for one in CONTROLS if {(control.prefix, one.prefix), (one.prefix, control.prefix)} & pairs]
    return [one.name for one in CONTROLS if one in found or one in loops]


def acts(control: Control) -> str:
    """When a control acts, in words."""
    if control.acts_on_policy:
        return "always"
    return "off-policy, or with vLLM" if control.reads_sampler else "off-policy"


def defaults(control: Control) -> dict[str, Any]:
    """Its fields with their defaults."""
    known = {field.name: field.default for config in (EntropyGRPOConfig, AsyPPOConfig) for field in fields(config)}
    return {name: known[name] for name in control.fields}


def described(control: Control) -> str:
    """A control in a paragraph for the terminal."""
    settings = ", ".join(f"{name} ({value})" for name, value in defaults(control).items())
    lines = [
        *wrap(control.summary.replace("`", ""), WIDTH),
        f"paper:     {control.paper} (arXiv {control.arxiv})",
        *wrap(f"fields:    {settings}", WIDTH, subsequent_indent=" " * 11),
        *wrap(f"published: {control.published.replace('`', '')}", WIDTH, subsequent_indent=" " * 11),
        f"acts:      {acts(control)}; at {' and '.join(control.levels)} level",
        *wrap(f"not with:  {', '.join(excluded(control)) or '-'}", WIDTH, subsequent_indent=" " * 11),
    ]
    return f"{control.name}\n{indent(chr(10).join(lines), '  ')}"


def markdown(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(map(_row, lines))


def _row(cells: Sequence[str]) -> str:
    if set(cells) == {"---"}:
        return f"|{'|'.join(cells)}|"
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def short_table() -> str:
    """A short table of methods, in Markdown: what each does, and the fields that switch it on.

    The README shows some of its rows.
    """

    def rows() -> Iterator[Sequence[str]]:
        for control in CONTROLS:
            paper = f"[{control.name}](https://arxiv.org/abs/{control.arxiv})"
            yield paper, _switched_on_by(control), acts(control), control.summary

    return markdown(("method", "switched on by", "acts", "what it does"), rows())


def methods_table() -> str:
    """The table of methods with all their fields, in Markdown."""
    head = ("method", "paper", "switched on by", "fields (default)", "published", "acts", "not with", "what it does")

    def rows() -> Iterator[Sequence[str]]:
        for control in CONTROLS:
            settings = ", ".join(f"`{name}` ({_default(value)})" for name, value in defaults(control).items())
            paper = f"[{control.arxiv}](https://arxiv.org/abs/{control.arxiv})"
            others, on = ", ".join(excluded(control)) or "-", _switched_on_by(control)
            yield control.name, paper, on, settings, control.published, acts(control), others, control.summary

    return markdown(head, rows())


def metrics_table() -> str:
    """The table of metrics, in Markdown."""

    def rows() -> Iterator[Sequence[str]]:
        for name, unit, meaning, healthy in OTHER_METRICS[:2]:
            yield _code(name), unit, meaning, healthy
        for control in CONTROLS:
            for metric in control.metrics:
                yield f"`{control.prefix}/{metric.name}`", metric.unit, metric.meaning, metric.healthy
        for name, unit, meaning, healthy in OTHER_METRICS[2:]:
            yield _code(name), unit, meaning, healthy

    return markdown(("key", "unit", "meaning", "a healthy run"), rows())


def _switched_on_by(control: Control) -> str:
    return control.switch or f"`{control.fields[0]}`"


def trainers_table() -> str:
    """Which trainer has which control, in Markdown, and the subclasses of TRL in which not every control can act."""

    def rows() -> Iterator[Sequence[str]]:
        for control in CONTROLS:
            yield control.name, *("yes" if control.prefix in known else "-" for known in TRAINERS.values())

    lines = [markdown(("control", *map(_code, TRAINERS)), rows()), ""]
    for name, (refused, records, reason) in LIMITS.items():
        left_out = [one.name for one in CONTROLS if one.prefix in TRAINERS[GRPO] and refused(one)]
        left_out += ["the record of tokens"] if records else []
        lines.append(f"- `{name}`, {reason}: without {', '.join(left_out)}.")
    return "\n".join(lines)


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _default(value: Any) -> str:
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy methods`.

    Args:
        argv: The command line without the command's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With a one-line message if the arguments are wrong.
    """
    parser = argparse.ArgumentParser(prog="trl-entropy methods", description="List the controls, with their papers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these, by name or prefix of fields")
    parser.add_argument("--markdown", action="store_true", help="as a table of Markdown")
    parser.add_argument("--metrics", action="store_true", help="the metrics instead, as a table of Markdown")
    parser.add_argument("--trainers", action="store_true", help="which trainer has which, as a table of Markdown")
    arguments = parser.parse_args(argv)
    known = {key.lower(): control for control in CONTROLS for key in (control.name, control.prefix)}
    if unknown := [name for name in arguments.names if name.lower() not in known]:
        names = ", ".join(control.name for control in CONTROLS)
        raise SystemExit(f"trl-entropy methods: error: {unknown[0]!r} is unknown. Choose from {names}.")
    if arguments.trainers:
        print(trainers_table())
    elif arguments.metrics:
        print(metrics_table())
    elif arguments.markdown:
        print(methods_table())
    else:
        chosen = [known[name.lower()] for name in arguments.names] or CONTROLS
        print("\n\n".join(map(described, chosen)))


if __name__ == "__main__":
    main()
