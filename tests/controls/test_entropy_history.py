"""The history of the mean entropy by hand."""

import math

import pytest
import torch

from trl_entropy.controls import EntropyHistory

# two turns of two and one tokens around an observation; one turn of three; nothing
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
ENTROPIES = torch.tensor([[1.0, 3.0, 99.0, 4.0], [1.0, 2.0, 6.0, 99.0], [99.0] * 4], dtype=torch.float64)


def identity(totals):
    return totals


def test_history_is_cumulative_and_weighted_by_tokens_within_a_step():
    history = EntropyHistory()
    assert history.mean("scalar", like=ENTROPIES) is None
    assert len(history) == 0
    history.add(ENTROPIES, MASK)
    assert len(history) == 0, "the running step is not part of its own history"
    history.finish_step(identity)
    # step 0: (1 + 3 + 4 + 1 + 2 + 6) / 6 = 17/6; turn 0: 13/5, turn 1: 4
    assert history.mean("scalar", like=ENTROPIES).item() == pytest.approx(17 / 6, rel=1e-14)
    history.add(torch.full((1, 2), 1.0), torch.ones(1, 2, dtype=torch.bool))
    history.add(torch.full((1, 1), 4.0), torch.ones(1, 1, dtype=torch.bool))
    history.finish_step(identity)
    # step 1: (1 + 1 + 4) / 3 = 2; no trajectory reached turn 1, so its mean stays 4
    assert history.mean("scalar", like=ENTROPIES).item() == pytest.approx((17 / 6 + 2) / 2)
    assert history.mean("per_turn", like=ENTROPIES).tolist() == pytest.approx([(13 / 5 + 2) / 2, 4.0])
    assert len(history) == 2


def test_history_sums_over_processes_and_skips_empty_steps():
    history = EntropyHistory()
    history.finish_step(identity)
    history.add(ENTROPIES, torch.zeros_like(MASK))
    history.finish_step(identity)
    assert len(history) == 0
    history.add(torch.full((1, 1), 1.0), torch.ones(1, 1, dtype=torch.bool))
    history.finish_step(lambda totals: totals + torch.tensor([[7.0, 3.0]]))
    assert history.steps == [2.0]


def test_history_survives_saving_with_a_step_under_way(tmp_path):
    whole, saved = EntropyHistory(), EntropyHistory()
    for history in (whole, saved):
        history.add(ENTROPIES, MASK)
        history.finish_step(identity)
        history.add(ENTROPIES * 2, MASK)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    resumed = EntropyHistory()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for history in (whole, resumed):
        history.add(ENTROPIES[:2, :3], MASK[:2, :3])
        history.finish_step(identity)
    assert resumed.steps == whole.steps
    assert resumed.turn_steps == whole.turn_steps
    assert len(whole) == 2


def test_history_leaves_out_what_is_no_number():
    # the turns stay those of the mask: 1 and 3 are one turn, and the second one's 5 is in the second place
    history = EntropyHistory()
    history.add(torch.tensor([[1.0, math.nan, 3.0, 9.0, 5.0]]), torch.tensor([[True, True, True, False, True]]))
    history.add(torch.tensor([[math.inf]]), torch.tensor([[True]]))
    history.finish_step(identity)
    assert history.steps == [3.0]
    assert history.turn_steps == [[2.0, 5.0]]


def test_history_of_bfloat16_entropies_is_kept_wider():
    history = EntropyHistory()
    history.load_state_dict({"steps": [0.3457], "turn_steps": [[0.3457]], "running": None})
    assert history.mean("scalar", like=torch.zeros(1, dtype=torch.bfloat16)).item() == pytest.approx(0.3457, rel=1e-6)
