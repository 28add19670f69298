"""Entropy-based advantage shaping through the real trainer: gradients, composition, and what is refused."""

import itertools
import math
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests import reference
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients, trainer_inputs
from tests.trainers.test_config import config
from tests.trainers.test_exact_gradients import BASE, CE_GPPO, ERC, LOSS_TYPES, random_batch
from tests.trainers.test_grpo import logged, trained
from trl_entropy.controls.entropy_advantage import ENTROPY_ADVANTAGE, EntropyAdvantageFields, check

ALPHA, KAPPA = 0.3, 2.5
COMBINATIONS = {"alone": {}, "erc": ERC, "ce_gppo": CE_GPPO, "both": {**ERC, **CE_GPPO}}
ON = {"entropy_advantage_alpha": ALPHA, "entropy_advantage_kappa": KAPPA}


@pytest.fixture
def build(make_trainer, monkeypatch):
    stub_forward(monkeypatch)
    return partial(stubbed_trainer, make_trainer)


def grown(b):
    """The batch with the advantage of every token grown by min(alpha H, |A| / kappa)."""
    advantages = torch.zeros_like(b.lp.detach())
    for i, t in reference.valid_tokens(b):
        a = reference.advantage(b, i, t)
        advantages[i, t] = a + min(ALPHA * b.entropy[i, t].item(), abs(a) / KAPPA)
    return replace(b, advantages=advantages)


def check_gradients(trainer, s, b, inputs):
    _, found = trainer_gradients(trainer, b, inputs)
    expected = gradients(reference.loss(grown(b), s), b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
    assert found[0].any()
    assert bool(s.entropy_coef) or not found[1].any()  # no gradient of H


def test_the_random_batches_reach_both_sides_of_the_bound():
    b, _ = random_batch(0)
    seen = set()
    for i, t in reference.valid_tokens(b):
        a = reference.advantage(b, i, t)
        seen.add((a > 0, ALPHA * b.entropy[i, t].item() < abs(a) / KAPPA))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("controls", "loss_type"),
    [
        *itertools.product(("alone", "erc", "ce_gppo", "both"), LOSS_TYPES),
        *itertools.product(("alone", "erc"), ("cispo", "sapo")),
    ],
)
def test_gradients_are_the_papers(build, controls, loss_type):
    s = replace(BASE, loss_type=loss_type, eps_hi=1.3 if loss_type == "cispo" else 0.28, **COMBINATIONS[controls])
    trainer = build(s, **ON, use_bias_correction_kl=False)
    for seed in range(2):
        b, inputs = random_batch(seed, tools=bool(seed), per_token_advantages=bool(seed))
        check_gradients(trainer, s, b, inputs)


@pytest.mark.parametrize("extra", [{"dual_clip": 1.5}, {"entropy_coef": 0.01}, {"nll_coef": 0.1}])
def test_trl_options(build, extra):
    s = replace(BASE, **extra)
    check_gradients(build(s, **ON), s, *random_batch(1))


def test_on_policy(build):
    b, _ = random_batch(0)
    b = replace(b, lp_old=None, entropy_old=None)
    check_gradients(build(BASE, **ON), BASE, b, trainer_inputs(b, b.mask))


def test_dppo_weighs_the_grown_advantage(build):
    """At a distance of 0 with the sampler, DPPO's gradient is A' itself."""
    b, _ = random_batch(0)
    b = replace(b, lp_old=None, entropy_old=None)
    inputs = trainer_inputs(b, b.mask)
    _, alone = trainer_gradients(build(BASE, **ON), b, inputs)
    _, both = trainer_gradients(build(BASE, **ON, dppo_divergence="tv"), b, inputs)
    torch.testing.assert_close(both, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", [{}, {"steps_per_generation": 1}], ids=["off-policy", "on-policy"])
def test_a_training_logs_every_metric(make_trainer, schedule):
    trainer = trained(make_trainer(**ON, **schedule))
    for metric in ENTROPY_ADVANTAGE.metrics:
        values = logged(trainer, f"entropy_advantage/{metric.name}")
        assert len(values) == (4 if metric.name != "relative" or not schedule else 3)  # one rollout has no advantage
        assert all(math.isfinite(value) for value in values)
    assert all(0.0 < value <= 1 / KAPPA for value in logged(trainer, "entropy_advantage/relative"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_advantage_alpha": -0.1}, "entropy_advantage_alpha=-0.1 must be finite and at least 0"),
        ({"entropy_advantage_alpha": math.nan}, "entropy_advantage_alpha=nan must be finite"),
        ({"entropy_advantage_alpha": "0.4"}, "entropy_advantage_alpha='0.4' must be finite"),
        ({**ON, "entropy_advantage_kappa": 1.0}, "entropy_advantage_kappa=1.0 must be finite and above 1"),
        ({**ON, "entropy_advantage_kappa": math.inf}, "entropy_advantage_kappa=inf must be finite"),
        ({**ON, "entropy_advantage_kappa": None}, "entropy_advantage_kappa=None must be finite"),
        ({**ON, "importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'.*to one of token"),
        ({**ON, "loss_type": "vespo"}, "loss_type='vespo'.*couple the tokens"),
    ],
)
def test_nonsense_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {**ON, "steps_per_generation": 1},
        {**ON, "ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0, "erc_low": 0.95, "erc_high": 1.05},
        {**ON, "dppo_divergence": "kl", "stare_target_entropy": 0.3, "epo_coef": 0.001},
        {**ON, "use_adaptive_entropy": True, "loss_type": "cispo"},
    ],
)
def test_sense_is_accepted_without_a_warning(tmp_path, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert config(tmp_path, **settings).entropy_advantage_enabled


def test_a_configuration_without_trls_fields_is_checked_too():
    check(SimpleNamespace(**vars(EntropyAdvantageFields())))
