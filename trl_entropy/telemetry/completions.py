"""Whole completions of a record for the page: each token with what happened to it, in letters, words and numbers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..controls import CONTROLS
from ..controls.reporting import Mark
from .record import TokenRecord

MAX_COMPLETIONS = 6
"""Completions of a run on the page, spread evenly over its rollouts."""


PPO_CLIP_MARKS = (
    Mark(
        "ppo_low",
        "L",
        "below the trust region",
        "below the trust region, A < 0: dropped by PPO-clip",
        ("#e4e4e4", "3px double", "#444"),
    ),
    Mark(
        "ppo_high",
        "H",
        "above the trust region",
        "above the trust region, A > 0: dropped by PPO-clip",
        ("#f8dcec", "3px dashed", "#8f3a6b"),
    ),
)
GATES = tuple(mark for control in CONTROLS[::-1] if control.shape is not None for mark in control.marks)
OTHERS = tuple(mark for control in CONTROLS if control.shape is None for mark in control.marks)
MARKS = (*GATES, *PPO_CLIP_MARKS, *OTHERS)
"""In the order of their precedence, the controls that act last first: a token has the colour of its first mark and the
letters of all."""
REPLACES_PPO_CLIP = tuple(mark.column for control in CONTROLS if control.replaces_ppo_clip for mark in control.marks)

NUMBERS = (
    ("probability {} to {}", ("p_old", "p")),
    ("entropy {} to {} nats", ("H_old", "H")),
    ("advantage {}", ("A",)),
    ("ratio {}", ("ratio",)),
    ("entropy ratio {}", ("entropy_ratio",)),
    ("value {}, sigma {}", ("value_mean", "value_std")),
)
"""What a token's detail says where the record has it."""


@dataclass(frozen=True)
class Token:
    """One token of the page.

    Attributes:
        text: Printable, as the reader shall see it.
        marks: What happened to it.
        detail: The numbers and the marks' meanings, in words; empty for a token that the model did not write.
    """

    text: str
    marks: tuple[Mark, ...]
    detail: str


@dataclass(frozen=True)
class Completion:
    """One completion of the page.

    Attributes:
        step: The optimizer step that the marks and numbers are of.
        index: Its index in the rollout.
        advantage: Mean advantage of its tokens, before any control.
        counts: How many of its tokens have a mark, in words, mark by mark.
        prompt: The end of its prompt.
        tokens: Its first tokens.
    """

    step: int
    index: int
    advantage: float
    counts: list[str]
    prompt: str
    tokens: list[Token]


def completions_of(record: TokenRecord, limit: int = MAX_COMPLETIONS) -> list[Completion]:
    """The completions of a run that the page shows, in the order of their steps; at most `limit`.

    Those with an advantage go first: without one, an update does nothing to a completion.
    """
    whole = record.whole.where(record.whole.table["completion"].is_valid())
    keys = np.stack([whole.column(name) for name in ("rollout", "process", "completion")], axis=1)
    trained_on = np.nan_to_num(whole.column("A")) != 0.0
    found = np.unique(keys[trained_on] if trained_on.any() else keys, axis=0)
    chosen = found[np.unique(np.linspace(0, len(found) - 1, min(limit, len(found))).round().astype(int))]
    return [_completion(whole.where((keys == key).all(axis=1))) for key in chosen]


def _completion(record: TokenRecord) -> Completion:
    columns = {name: record.column(name) for name in record.table.column_names}
    columns |= {"p_old": np.exp(columns["lp_old"]), "p": np.exp(columns["lp"])}
    order = np.argsort(columns["position"], kind="stable")
    rows = [{name: values[index] for name, values in columns.items()} for index in order]
    tokens = [_token(row) for row in rows if row["position"] >= 0]
    written = [row for row in rows if row["written"] == 1.0]
    return Completion(
        step=int(rows[0]["step"]),
        index=int(rows[0]["completion"]),
        advantage=float(np.mean([row["A"] for row in written])) if written else 0.0,
        counts=_counts(tokens, len(written)),
        prompt="".join(printable(row["token"]) for row in rows if row["position"] < 0),
        tokens=tokens,
    )


def _counts(tokens: list[Token], written: int) -> list[str]:
    counts = {mark: sum(mark in token.marks for token in tokens) for mark in MARKS}
    return [f"{count} of {written} {mark.label}" for mark, count in counts.items() if count]


def _token(row: Mapping[str, Any]) -> Token:
    if row["written"] != 1.0:
        return Token(printable(row["token"]), (), "")
    marks = tuple(mark for mark in MARKS if row[mark.column] == 1.0 and not _superseded(mark, row))
    numbers = [
        text.format(*(f"{row[name]:.3g}" for name in names))
        for text, names in NUMBERS
        if not any(np.isnan(row[name]) for name in names)
    ]
    return Token(printable(row["token"]), marks, "; ".join([*(mark.meaning for mark in marks), ", ".join(numbers)]))


def _superseded(mark: Mark, row: Mapping[str, Any]) -> bool:
    """Whether another control decided instead of PPO-clip, which alone would have dropped the token."""
    return mark in PPO_CLIP_MARKS and not all(np.isnan(row[column]) for column in REPLACES_PPO_CLIP)


def printable(text: str) -> str:
    """Text with its control characters made visible; a line break stays one, behind a sign."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text.replace("\r\n", "\n"))
    return text.replace("\x7f", "\u2421").replace("\n", "\u23ce\n") or "\u00b7"
