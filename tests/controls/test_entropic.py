"""EntroPIC by hand."""

import math

import pytest
import torch

from trl_entropy.controls import PolicyTokens, entropic

# probabilities 0.99, 0.96, 0.94, 0.5, of which the last is not the model's
LOGPS = torch.tensor([[0.99, 0.96, 0.94, 0.99]], dtype=torch.float64).log()
MASK = torch.tensor([[1, 1, 1, 0]]).bool()


def tokens(*advantages):
    values = torch.tensor([advantages], dtype=torch.float64)
    return PolicyTokens(LOGPS, LOGPS - 0.5, values, MASK)


@pytest.mark.parametrize("actuator", [0.25, -0.25, 1.0, -1.0])
def test_probable_tokens_weigh_by_the_sign_of_their_advantage(actuator):
    before = tokens(2.0, -2.0, 2.0, 2.0)
    after, metrics = entropic(before, actuator=actuator, probability=0.95)
    expected = [[2.0 * (1 + actuator), -2.0 * (1 - actuator), 2.0]]
    torch.testing.assert_close(after.advantages[:, :3], torch.tensor(expected, dtype=torch.float64))
    assert after.old_logps is before.old_logps
    assert metrics["entropic/weighted_fraction"].totals().tolist() == [2.0, 3.0]


def test_an_actuator_of_zero_changes_nothing():
    before = tokens(2.0, -2.0, 0.0, 1.0)
    after, metrics = entropic(before, actuator=0.0, probability=0.95)
    assert torch.equal(after.advantages, before.advantages)
    assert metrics["entropic/weighted_fraction"].totals().tolist() == [0.0, 3.0]


def test_the_probability_itself_is_not_above_it():
    exact = PolicyTokens(torch.full((1, 1), math.log(0.5)), torch.zeros(1, 1), torch.ones(1, 1), MASK[:, :1])
    assert entropic(exact, actuator=0.5, probability=0.5)[0].advantages.item() == 1.0
    assert entropic(exact, actuator=0.5, probability=0.49)[0].advantages.item() == 1.5
    assert entropic(exact, actuator=0.5, probability=0.0)[0].advantages.item() == 1.5


def test_an_advantage_of_zero_stays_zero_and_is_not_counted():
    after, metrics = entropic(tokens(0.0, 0.0, 0.0, 0.0), actuator=0.5, probability=0.95)
    assert torch.equal(after.advantages, torch.zeros(1, 4, dtype=torch.float64))
    assert metrics["entropic/weighted_fraction"].totals().tolist() == [0.0, 3.0]
