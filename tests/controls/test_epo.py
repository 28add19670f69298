"""EPO by hand."""

import math

import pytest
import torch

from trl_entropy.controls import EntropyHistory, epo, epo_beta
from trl_entropy.controls.epo import corridor_penalty

# two turns of two and one tokens around an observation; one turn of three; nothing
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
ENTROPIES = torch.tensor([[1.0, 3.0, 99.0, 4.0], [1.0, 2.0, 6.0, 99.0], [99.0] * 4], dtype=torch.float64)
SETTINGS = {"beta": 2.0, "kappa_low": 0.5, "kappa_high": 1.5, "penalty": 0.1, "form": "hinge", "num_trajectories": 2.0}


def test_first_step_is_not_smoothed():
    # L_H = mean of (mean of 2 and 4, mean of 1, 2 and 6) = (3 + 3) / 2
    loss, metrics = epo(ENTROPIES, MASK, None, **SETTINGS)
    assert loss.item() == pytest.approx(-3.0)
    assert set(metrics) == {"epo/beta"}


def test_hinge_by_hand():
    # history 2: corridor [1, 3]. Only 4 (by 1) and 6 (by 3) lie outside:
    # L_smooth = 0.1 x (0.5 x 1 + (1/3) x 3) / 2 = 0.075; loss = -(3 - 2 x 0.075)
    entropies = ENTROPIES.clone().requires_grad_()
    loss, metrics = epo(entropies, MASK, torch.tensor(2.0, dtype=torch.float64), **SETTINGS)
    assert loss.item() == pytest.approx(-2.85)
    loss.backward()
    # d/dH = -w/2, and + beta alpha w/2 = + 0.2 w/2 above the corridor
    expected = [[-0.125, -0.125, 0.0, -0.25 + 0.05], [-1 / 6, -1 / 6, -1 / 6 + 0.2 / 6, 0.0], [0.0] * 4]
    torch.testing.assert_close(entropies.grad, torch.tensor(expected, dtype=torch.float64))
    means = {name: (m.totals()[0] / m.totals()[1]).item() for name, m in metrics.items()}
    assert means == {
        "epo/beta": 2.0,
        "epo/history": 2.0,
        "epo/corridor_low": 1.0,
        "epo/corridor_high": 3.0,
        "epo/below_fraction": 0.0,
        "epo/inside_fraction": pytest.approx(4 / 6),
        "epo/above_fraction": pytest.approx(2 / 6),
        "epo/outside_fraction": pytest.approx(2 / 6),
        "epo/penalty": pytest.approx(4 / 6),
    }


def test_below_the_corridor_the_hinge_pushes_up():
    entropies = torch.tensor([[0.25]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, metrics = epo(entropies, mask, torch.tensor(1.0), **SETTINGS | {"num_trajectories": 1.0})
    # -(0.25 - 2 x 0.1 x (0.5 - 0.25)) and its slope -(1 + 0.2)
    assert loss.item() == pytest.approx(-0.2)
    loss.backward()
    assert entropies.grad.item() == pytest.approx(-1.2)
    assert metrics["epo/below_fraction"].totals().tolist() == [1.0, 1.0]


def test_indicator_is_reported_and_has_no_gradient():
    low, high = torch.tensor(1.0), torch.tensor(3.0)
    entropies = torch.tensor([[0.5, 1.0, 3.0, 3.5]], requires_grad=True)
    assert corridor_penalty(entropies, low, high, "indicator").tolist() == [[1.0, 0.0, 0.0, 1.0]]
    mask = torch.ones(1, 4, dtype=torch.bool)
    smoothed, _ = epo(entropies, mask, torch.tensor(2.0), **SETTINGS | {"form": "indicator"})
    (gradient,) = torch.autograd.grad(smoothed, entropies)
    (bonus_only,) = torch.autograd.grad(epo(entropies, mask, None, **SETTINGS)[0], entropies)
    assert torch.equal(gradient, bonus_only)
    # the value has it: 2 x 0.1 x (2 of 4 tokens) / 2 trajectories
    assert (smoothed - epo(entropies, mask, None, **SETTINGS)[0]).item() == pytest.approx(0.05)


def test_per_turn_history_smooths_only_turns_that_have_one():
    # turn 0 has history 2 (corridor [1, 3]), turn 1 none: the 4 of row 0 is not smoothed, the 6 of row 1 is
    history = torch.tensor([2.0], dtype=torch.float64)
    loss, metrics = epo(ENTROPIES, MASK, history, **SETTINGS)
    assert loss.item() == pytest.approx(-(3.0 - 2 * 0.1 * (1 / 3) * 3 / 2))
    assert metrics["epo/above_fraction"].totals().tolist() == [1.0, 5.0]
    # with history 8 for turn 1, its corridor is [4, 12] and the 4 lies inside
    both = torch.tensor([2.0, 8.0], dtype=torch.float64)
    assert epo(ENTROPIES, MASK, both, **SETTINGS)[0].item() == pytest.approx(loss.item())


@pytest.mark.parametrize(
    ("schedule", "first", "middle", "last"),
    [
        ("decay", 2.0, 1 + math.exp(-3), 1 + math.exp(-6)),
        ("grow", 1.0, 2 - math.exp(-3), 2 - math.exp(-6)),
        ("constant", 1.0, 1.0, 1.0),
    ],
)
def test_schedules(schedule, first, middle, last):
    # K = 101, so k_mid = floor(50.5) = 50
    values = [epo_beta(k, 101, gamma=3.0, schedule=schedule) for k in (0, 50, 100)]
    assert values == pytest.approx([first, middle, last], rel=1e-12)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="epo_schedule='cosine'"):
        epo_beta(0, 1, gamma=3.0, schedule="cosine")
    with pytest.raises(ValueError, match="epo_form='soft'"):
        corridor_penalty(ENTROPIES, torch.tensor(0.0), torch.tensor(1.0), "soft")


@pytest.mark.parametrize("form", ["hinge", "indicator"])
def test_bfloat16_entropies_give_the_loss_of_the_same_numbers_in_float32(form):
    generator = torch.Generator().manual_seed(0)
    entropies = torch.rand(3, 1500, generator=generator).bfloat16().requires_grad_()
    mask = torch.rand(3, 1500, generator=generator) < 0.9
    history = EntropyHistory()
    history.load_state_dict({"steps": [0.3457], "turn_steps": [[0.3457]], "running": None})
    wide = entropies.detach().double().requires_grad_()
    losses = [
        epo(values, mask, history.mean("scalar", like=wide.detach()), **SETTINGS | {"form": form})[0]
        for values in (entropies, wide)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(entropies.grad.double(), wide.grad, rtol=1e-2, atol=1e-9)
