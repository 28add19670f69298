"""The completions of the page: which are chosen, and what is said of each token."""

from pathlib import Path

import numpy as np
import pytest

from tests.telemetry.made_record import make_record, write_record
from trl_entropy.telemetry.completions import MARKS, completions_of, printable
from trl_entropy.telemetry.record import FLAGS, read_record


def test_completion_has_its_prompt_tokens_and_counts(tmp_path: Path) -> None:
    record = make_record(
        tmp_path,
        5,
        whole=1,
        step=8,
        completion=3,
        position=[1, 0, -1, -2, 2],  # the page sorts
        token=["c", "b", "?", "1+", "obs"],
        written=[1, 1, 0, 0, 0],
        A=[1.0, 0.5, np.nan, np.nan, np.nan],
        erc_clipped=[1, 0, np.nan, np.nan, np.nan],
    )
    (completion,) = completions_of(record)
    assert (completion.step, completion.index, completion.advantage, completion.prompt) == (8, 3, 0.75, "1+?")
    assert [token.text for token in completion.tokens] == ["b", "c", "obs"]
    assert [[mark.letter for mark in token.marks] for token in completion.tokens] == [[], ["E"], []]
    assert completion.counts == ["1 of 2 clipped by ERC"]
    assert completion.tokens[2].detail == ""


def test_detail_has_the_numbers_that_there_are(tmp_path: Path) -> None:
    record = make_record(
        tmp_path,
        2,
        whole=1,
        lp_old=float(np.log(0.5)),
        lp=float(np.log(0.25)),
        H_old=[1.0, np.nan],
        ratio=0.5,
        value_mean=[0.125, np.nan],
        value_std=[0.25, np.nan],
        erc_clipped=[1, 0],
    )
    first, second = completions_of(record)[0].tokens
    assert first.detail == (
        "clipped by ERC: no gradient; probability 0.5 to 0.25, entropy 1 to 1 nats, advantage 1, ratio 0.5, entropy "
        "ratio 1, value 0.125, sigma 0.25"
    )
    assert second.detail == "probability 0.5 to 0.25, advantage 1, ratio 0.5, entropy ratio 1"


def test_a_token_that_ce_gppo_has_is_not_called_dropped(tmp_path: Path) -> None:
    flags = {
        "ppo_low": [1, 1, 0],
        "ce_gppo_low": [1, np.nan, 0],
        "ce_gppo_high": [0, np.nan, 0],
        "epo_above": [0, 1, 0],
    }
    tokens = completions_of(make_record(tmp_path, 3, whole=1, **flags))[0].tokens
    assert ["".join(mark.letter for mark in token.marks) for token in tokens] == ["1", "LA", ""]


def test_completions_are_spread_over_the_run(tmp_path: Path) -> None:
    rollouts = [rollout for rollout in range(20) for _ in range(2)]
    # the first five rollouts have no advantage: nothing happens to them
    write_record(
        tmp_path,
        40,
        whole=1,
        rollout=rollouts,
        step=[8 * rollout + 8 for rollout in rollouts],
        A=[float(rollout > 4) for rollout in rollouts],
        completion=[0.0, np.nan] * 20,
        position=0,
    )
    record = read_record(tmp_path)
    assert record is not None
    assert [one.step for one in completions_of(record, limit=3)] == [48, 104, 160]
    assert len(completions_of(record, limit=100)) == 15


def test_run_without_whole_completions_has_none(tmp_path: Path) -> None:
    assert completions_of(make_record(tmp_path, 3)) == []


def test_marks_are_told_apart_without_colour() -> None:
    assert len({mark.letter for mark in MARKS}) == len(MARKS)
    assert {mark.column for mark in MARKS} == set(FLAGS) - {"written"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\u23ce\nb"),
        ("a\r\nb", "a\u23ce\nb"),
        ("\x00\x1b[1m", "\u2400\u241b[1m"),
        ("\t<b>", "\t<b>"),
        ("\x7f", "\u2421"),
        ("", "\u00b7"),
    ],
)
def test_control_characters_are_visible(text: str, shown: str) -> None:
    assert printable(text) == shown
