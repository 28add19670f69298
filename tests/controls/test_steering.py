"""Loops on the mean entropy: the measurement, the controller and its state, the trace, the rule."""

import math

import pytest
import torch

from trl_entropy.controls import Context, Rollout
from trl_entropy.controls.health import needed_entries
from trl_entropy.controls.steering import EntropyLoop, held_at_bound, proportional_integral, rollout_entropy

MASK = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
ENTROPIES = torch.tensor([[1.0, 3.0, 99.0], [0.5, 0.5, 2.0]])


def rollout(entropies=ENTROPIES, mask=MASK):
    return Rollout(mask, torch.ones(len(mask)), torch.ones(len(mask)), None, entropies)


def test_mean_entropy_is_over_the_models_tokens():
    assert rollout_entropy(rollout(), Context(None)) == pytest.approx(7 / 5)


def test_mean_entropy_leaves_out_what_is_not_finite():
    entropies = ENTROPIES.clone()
    entropies[0, 1], entropies[1, 0] = math.nan, math.inf
    assert rollout_entropy(rollout(entropies), Context(None)) == pytest.approx((1.0 + 0.5 + 2.0) / 3)


def test_a_rollout_without_tokens_has_no_mean_entropy():
    assert rollout_entropy(rollout(mask=torch.zeros_like(MASK)), Context(None)) is None
    assert rollout_entropy(rollout(ENTROPIES * math.nan), Context(None)) is None


def test_a_rollout_without_entropies_is_refused():
    with pytest.raises(ValueError, match="entropies"):
        rollout_entropy(rollout(None), Context(None))


def test_processes_measure_the_mean_over_all_tokens():
    """Not the mean of their means: (4 / 2 + 3 / 3) / 2 = 1.5 here."""
    parts = [rollout(ENTROPIES[row : row + 1], MASK[row : row + 1]) for row in (0, 1)]
    totals = []
    for part in parts:
        rollout_entropy(part, Context(None, sum_over_processes=lambda own: totals.append(own) or own))
    means = [rollout_entropy(part, Context(None, sum_over_processes=lambda _: sum(totals))) for part in parts]
    assert means == [pytest.approx(7 / 5)] * 2


def test_the_controller_by_hand():
    # 2 x 0.1 + 0.5 x 0; the first error counts from the second step on: 2 x -0.2 + 0.5 x 0.1
    assert proportional_integral(0.1, 0.0, kp=2.0, ki=0.5) == (pytest.approx(0.2), pytest.approx(0.1))
    assert proportional_integral(-0.2, 0.1, kp=2.0, ki=0.5) == (pytest.approx(-0.35), pytest.approx(-0.1))


@pytest.mark.parametrize("side", [1, -1])
def test_the_sum_stands_still_while_the_actuator_is_at_its_bound(side):
    assert proportional_integral(side * 3.0, side * 5.0, kp=1.0, ki=0.1) == (side, side * 5.0)
    # at the bound by the sum alone, and the error pulls back: it counts
    assert proportional_integral(side * -0.5, side * 20.0, kp=1.0, ki=0.1) == (side, side * 19.5)
    assert proportional_integral(0.0, side * 20.0, kp=1.0, ki=0.1) == (side, side * 20.0)


def test_the_actuator_leaves_its_bound_when_the_error_turns():
    """After a hundred rollouts far too high, the first one that is too low is answered."""
    integral = 0.0
    for _ in range(100):
        actuator, integral = proportional_integral(5.0, integral, kp=1.0, ki=0.01)
        assert actuator == 1.0
    assert proportional_integral(-0.1, integral, kp=1.0, ki=0.01)[0] < 0.0


def test_an_evaluation_does_not_move_the_loop():
    loop = EntropyLoop()
    assert loop.measure(rollout(), Context(None, training=False)) is None
    assert loop.entropy is None
    assert loop.measure(rollout(), Context(None)) == loop.entropy == pytest.approx(1.4)
    assert loop.measure(rollout(mask=torch.zeros_like(MASK)), Context(None)) is None
    assert loop.entropy == pytest.approx(1.4)


def test_state_goes_on_where_it_was():
    loop, again = EntropyLoop(), EntropyLoop()
    loop.measure(rollout(), Context(None))
    loop.step(0.3, kp=1.0, ki=0.1)
    again.load_state_dict(loop.state_dict(), own=False)
    assert vars(again) == vars(loop)
    for one in (loop, again):
        one.step(-0.1, kp=1.0, ki=0.1)
    assert again.actuator == loop.actuator == pytest.approx(-0.1 + 0.03)


def test_trace():
    loop = EntropyLoop(0.5)
    assert loop.trace("x", 1.0, MASK) == {}
    loop.measure(rollout(), Context(None))
    values = {name: metric.totals() for name, metric in loop.trace("x", 1.0, MASK).items()}
    means = {name: (total / count).item() for name, (total, count) in values.items()}
    assert means == {
        "x/set_point": 1.0,
        "x/entropy": pytest.approx(1.4),
        "x/error": pytest.approx(0.4),
        "x/actuator": 0.5,
    }


@pytest.mark.parametrize(
    ("actuators", "error", "found"),
    [
        ([-1.0], -0.1, "0.1 nats below its target, and the actuator stays at its bound of -1"),
        ([2.0], 0.25, "0.25 nats above its target, and the actuator stays at its bound of 2"),
        ([2.0], -0.1, None),  # at the other bound, on its way
        ([-1.0, -0.9], -0.1, None),
        ([0.0], 0.1, None),
    ],
)
def test_a_loop_that_is_held_at_its_bound_is_found(actuators, error, found):
    rule = held_at_bound("x", "X", (-1.0, 2.0), "Try y.")
    entries = [{"x/actuator": actuators[i % len(actuators)], "x/error": error} for i in range(needed_entries([]))]
    finding = rule(entries)
    if found is None:
        assert finding is None
        return
    assert found in finding.seen
    assert (finding.rule, finding.remedy) == ("x_at_bound", "Try y.")
    assert rule(entries[1:]) is None
    assert rule([]) is None
