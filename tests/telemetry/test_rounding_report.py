"""A probe's tables, its advice and its figure."""

import copy
import csv
from pathlib import Path
from typing import Any

import pytest

from trl_entropy.telemetry.rounding_report import advice, draw_rounding, noise, tables

SHARES = {"erc": 0.2, "ppo_clip": 0.01, "ce_gppo_low": 0.0, "ce_gppo_high": 0.0}
BANDS = ("all", "< 0.1", ">= 0.1")


def a_summary(**changes: Any) -> dict[str, Any]:
    """ERC acts on 0.2 of the tokens, of which it would act on a tenth in float32."""
    found = {"share": 0.2, "share_float32": 0.04, "precision": 0.1, "recall": 0.5}
    gates = {gate: {band: dict(found) for band in BANDS} for gate in SHARES}
    idle = {gate: {"all": 0.0, "< 0.1": 0.0, ">= 0.1": None} for gate in SHARES}
    summary: dict[str, Any] = {
        "settings": {"dtype": "float32", "autocast": "bfloat16"},
        "float32_left_out": None,
        "tokens": {"all": 100, "< 0.1": 100, ">= 0.1": 0},
        "rounding": {
            name: {gate: {"all": share, "< 0.1": share, ">= 0.1": None} for gate, share in SHARES.items()}
            for name in ("more padding", "float32")
        }
        | {"half batches": idle},
        "updates": [{"step": 1, **gates}],
    }
    return copy.deepcopy({**summary, **changes})


def test_tables_hold_every_comparison() -> None:
    page = tables(a_summary())
    assert "100 tokens." in page
    assert "| more padding | 0.200 | 0.010            | 0.000          | 0.000          |" in page
    assert "ERC, < 0.1 (100) nats" in page
    assert ">= 0.1" not in page  # no token has that entropy
    assert "| 1               | ERC              | 0.200  | 0.040      | 0.100     | 0.500  |" in page
    assert "Without float32" not in page


def test_what_was_left_out_is_said() -> None:
    page = tables(a_summary(float32_left_out="the weights are quantised"))
    assert page.endswith("Without float32: the weights are quantised.")


def test_noise_is_what_float32_does_not_confirm() -> None:
    summary = a_summary()
    assert noise(summary, summary["updates"][0]) == pytest.approx(0.9)


def test_without_float32_noise_is_what_another_shape_brings_out() -> None:
    summary = a_summary()
    summary["updates"][0]["erc"]["all"].update(precision=None, share=0.8)
    summary["rounding"]["float32"]["erc"]["all"] = 0.7  # not to be read
    assert noise(summary, summary["updates"][0]) == pytest.approx(0.25)


def test_a_run_in_float32_does_not_confirm_itself() -> None:
    summary = a_summary(settings={"dtype": "float32", "autocast": None})
    summary["updates"][0]["erc"]["all"]["precision"] = 1.0
    assert noise(summary, summary["updates"][0]) == 1.0


def test_advice_names_the_remedy() -> None:
    first, second = advice(a_summary())
    assert first.startswith("ERC clips 0.200 of the tokens after 1 optimizer step, and 0.900 of these are rounding")
    assert "bf16: false" in first
    assert second.startswith("0.010 of the tokens leave PPO-clip's range")
    assert second.endswith("Outside are 0.200 of the tokens after 1 optimizer step, and 0.900 of these are rounding.")


@pytest.mark.parametrize("kind", [{"precision": 0.8}, {"share": 0.001}])
def test_advice_on_ppo_clip_where_its_range_measures_the_policy(kind: dict[str, float]) -> None:
    summary = a_summary()
    summary["updates"][0]["ppo_clip"]["all"].update(kind)
    assert advice(summary)[1].endswith("by rounding alone.")


def test_advice_where_erc_measures_the_policy() -> None:
    summary = a_summary()
    summary["updates"][0]["erc"]["all"]["precision"] = 0.8
    assert advice(summary)[0].endswith("rounding: it measures the policy.")


def test_advice_where_erc_does_nothing() -> None:
    summary = a_summary()
    summary["updates"][0]["erc"]["all"]["share"] = 0.001
    assert "next to nothing" in advice(summary)[0]


def test_advice_is_on_the_worst_step_that_clips() -> None:
    summary = a_summary()
    better = copy.deepcopy(summary["updates"][0])
    better["step"], better["erc"]["all"]["precision"] = 4, 0.9
    idle = copy.deepcopy(summary["updates"][0])
    idle["step"] = 8
    idle["erc"]["all"].update(precision=0.0, share=0.001)
    summary["updates"] = [better, *summary["updates"], idle]
    assert "after 1 optimizer step, and 0.900" in advice(summary)[0]


def test_figure_and_its_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    svg = draw_rounding(a_summary(), tmp_path / "probe")
    assert svg.startswith("<svg")
    assert (tmp_path / "probe.png").stat().st_size > 1000
    with open(tmp_path / "probe.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert ["same weights", "more padding", "outside ERC's bounds", "< 0.1", "0.2"] in rows
    assert ["after steps", "step 1, float32", "outside ERC's bounds", "< 0.1", "0.04"] in rows
    assert not any(row[3] == ">= 0.1" and row[0] == "same weights" for row in rows)
