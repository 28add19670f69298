"""What rounding does to the controls' decisions: every number by hand."""

import math

import pytest
import torch

from trl_entropy.telemetry.rounding import (
    Gates,
    Measurement,
    Pass,
    Updated,
    agreement,
    entropy_bands,
    summarise,
)

MASK = torch.tensor([[True, True, True], [True, True, False]])
ADVANTAGES = torch.tensor([[1.0], [-1.0]]).expand(2, 3)


def a_pass(entropies: list[list[float]], ratios: list[list[float]] | None = None) -> Pass:
    """The log-probs are those of the importance ratios to a pass with log-probs of -1; all 1 if left out."""
    ratios = ratios or [[1.0] * 3] * 2
    return Pass(torch.tensor(ratios).log() - 1, torch.tensor(entropies))


OLD = a_pass([[2.0, 1.0, 0.05], [0.001, 1e-5, 9.0]])
NEW = a_pass([[2.08, 1.06, 0.04], [0.001, 2e-5, 1.0]], [[1.1, 1.3, 0.7], [1.3, 0.7, 9.0]])


def test_tokens_outside_the_bounds() -> None:
    # rho is 1.04, 1.06, 0.8, 1, 2 and, padding, 1/9
    found = Gates().outside(NEW, OLD, ADVANTAGES, MASK)
    assert found["erc"].tolist() == [[False, True, True], [False, True, False]]
    assert found["ppo_clip"].tolist() == [[False, True, True], [True, True, False]]
    # A < 0 in the second row, A > 0 in the first
    assert found["ce_gppo_low"].tolist() == [[False] * 3, [False, True, False]]
    assert found["ce_gppo_high"].tolist() == [[False, True, False], [False] * 3]


def test_bounds_are_the_runs() -> None:
    wide = Gates(erc_low=0.7, erc_high=1.05, eps_low=0.35, eps_high=0.25)
    found = wide.outside(NEW, OLD, ADVANTAGES, MASK)
    assert found["erc"].tolist() == [[False, True, False], [False, True, False]]
    assert found["ppo_clip"].tolist() == [[False, True, False], [True, False, False]]


def test_floor_is_added_to_both_entropies() -> None:
    # the third token's rho is (0.04 + 0.5) / (0.05 + 0.5) = 0.98, the second's 1.56 / 1.5 = 1.04
    assert not Gates(erc_floor=0.5).outside(NEW, OLD, ADVANTAGES, MASK)["erc"].any()


def test_sequence_level_reads_the_sequences_ratio() -> None:
    found = Gates(level="sequence").outside(NEW, OLD, ADVANTAGES, MASK)
    # the first sequence's is (1.1 * 1.3 * 0.7) ** (1 / 3) = 1.0003, the second's (1.3 * 0.7) ** (1 / 2) = 0.95
    assert not found["ppo_clip"].any()
    assert found["erc"].sum() == 3


def test_bands_part_the_tokens() -> None:
    entropies = torch.tensor([[2.0, 1.0, 0.05], [0.001, -1e-7, 9.0]])
    bands = entropy_bands(entropies, MASK)
    assert {name: int(band.sum()) for name, band in bands.items()} == {
        "all": 5,
        "< 0.0001": 1,
        "0.0001 to 0.01": 1,
        "0.01 to 0.1": 1,
        "0.1 to 1": 0,
        ">= 1": 2,
    }
    assert sum(band.int() for name, band in bands.items() if name != "all").tolist() == MASK.int().tolist()


def test_precision_and_recall() -> None:
    found = torch.tensor([True, True, True, False, False])
    true = torch.tensor([True, False, False, True, False])
    every = torch.ones(5, dtype=torch.bool)
    assert agreement(found, true, every) == {
        "share": 3 / 5,
        "share_float32": 2 / 5,
        "precision": 1 / 3,
        "recall": 1 / 2,
    }
    assert agreement(found, None, every) == {
        "share": 3 / 5,
        "share_float32": None,
        "precision": None,
        "recall": None,
    }
    nothing = torch.zeros(5, dtype=torch.bool)
    assert agreement(nothing, true, every)["precision"] is None
    assert agreement(found, nothing, every)["recall"] is None
    assert agreement(found, true, nothing)["share"] is None


def test_summary_compares_each_pass_with_its_own_precision() -> None:
    # in float32 the third token was at 0.04 before the step too, so that its change is rounding; the second's band is
    # another than in bfloat16
    exact_old = a_pass([[2.0, 0.999, 0.04], [0.001, 1e-5, 9.0]])
    measured = Measurement(MASK, ADVANTAGES, OLD, {"other shape": NEW}, exact_old, (Updated(3, NEW, NEW),))
    found = summarise(measured, Gates())
    assert found["tokens"] == {
        "all": 5,
        "< 0.0001": 1,
        "0.0001 to 0.01": 1,
        "0.01 to 0.1": 1,
        "0.1 to 1": 1,
        ">= 1": 1,
    }
    assert list(found["rounding"]) == ["other shape", "float32"]
    assert found["rounding"]["other shape"]["erc"]["all"] == 3 / 5
    # OLD / exact_old: 1.25 for the third token alone
    assert found["rounding"]["float32"]["erc"]["all"] == 1 / 5
    assert found["rounding"]["float32"]["erc"]["0.01 to 0.1"] == 1.0
    assert found["rounding"]["float32"]["erc"]["0.1 to 1"] == 0.0
    (update,) = found["updates"]
    assert update["step"] == 3
    assert update["erc"]["all"] == {
        "share": 3 / 5,
        "share_float32": 2 / 5,
        "precision": pytest.approx(2 / 3),
        "recall": 1.0,
    }


def test_summary_without_float32() -> None:
    measured = Measurement(MASK, ADVANTAGES, OLD, {"other shape": OLD}, None, (Updated(1, NEW, None),))
    found = summarise(measured, Gates())
    assert list(found["rounding"]) == ["other shape"]
    assert found["rounding"]["other shape"]["erc"]["all"] == 0.0
    assert found["updates"][0]["erc"]["all"]["precision"] is None


def test_nan_counts_as_outside() -> None:
    broken = Pass(OLD.logps, torch.full_like(OLD.entropies, math.nan))
    assert Gates().outside(broken, OLD, ADVANTAGES, MASK)["erc"].tolist() == MASK.tolist()
