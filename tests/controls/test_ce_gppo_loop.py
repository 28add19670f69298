"""The loop on CE-GPPO's weights by hand."""

import pytest
import torch

from tests.controls.test_compose import tokens
from trl_entropy.controls import micro_batch
from trl_entropy.controls.ce_gppo import ce_gppo
from trl_entropy.controls.ce_gppo_loop import CE_GPPO_LOOP, steered_alphas
from trl_entropy.controls.control import Context
from trl_entropy.controls.steering import EntropyLoop


@pytest.mark.parametrize(
    ("actuator", "alphas"), [(0.0, (0.75, 1.0)), (0.5, (1.125, 0.5)), (-1.0, (0.0, 2.0)), (1.0, (1.5, 0.0))]
)
def test_too_high_an_entropy_strengthens_the_side_that_lowers_it(actuator, alphas):
    assert steered_alphas(0.75, 1.0, actuator) == pytest.approx(alphas)


class Settings:
    ce_gppo_loop_target = 0.5
    ce_gppo_alpha1, ce_gppo_alpha2 = 0.75, 1.0


@pytest.mark.parametrize("actuator", [-0.5, 0.25])
def test_it_is_ce_gppo_with_other_weights(actuator):
    before = tokens([-0.3, 0.3, 0.3, -0.3, 0.1, -0.3], [-2.0, 2.0, -2.0, 2.0, 1.0, 0.0])
    batch = micro_batch(before, torch.ones(1, 6), None, "token")
    clip = {"eps_low": 0.2, "eps_high": 0.2}
    of_papers, _ = ce_gppo(before, batch.log_weight, alpha1=0.75, alpha2=1.0, **clip)
    alpha1, alpha2 = steered_alphas(0.75, 1.0, actuator)
    expected, _ = ce_gppo(before, batch.log_weight, alpha1=alpha1, alpha2=alpha2, **clip)
    loop = EntropyLoop(actuator)
    loop.entropy = 0.7
    assert CE_GPPO_LOOP.shape is not None
    shaped, metrics = CE_GPPO_LOOP.shape(batch, of_papers, Context(Settings), loop)
    torch.testing.assert_close(shaped.advantages, expected.advantages)
    assert torch.equal(shaped.old_logps, expected.old_logps)
    assert metrics["ce_gppo_loop/alpha2"].totals()[0].item() == pytest.approx(6 * alpha2)
    assert metrics["ce_gppo_loop/error"].totals()[0].item() == pytest.approx(6 * 0.2)
