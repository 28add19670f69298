"""DPPO through the real trainer: gradients against the paper's loss, and what is refused."""

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
from tests.trainers.test_exact_gradients import BASE, LOSS_TYPES, random_batch
from tests.trainers.test_grpo import logged, trained
from trl_entropy.controls.dppo import DPPO, check

DELTAS = {"tv": (0.05, 0.08), "kl": (0.01, 0.02)}
TRUNCATION = 1.4


@pytest.fixture
def build(make_trainer, monkeypatch):
    stub_forward(monkeypatch)
    return partial(stubbed_trainer, make_trainer)


def fields(kind):
    low, high = DELTAS[kind]
    return {
        "dppo_divergence": kind,
        "dppo_delta_low": low,
        "dppo_delta_high": high,
        "dppo_truncation": TRUNCATION,
        "use_bias_correction_kl": False,
    }


def batch(seed, **kinds):
    """A random batch whose old log-probs are those of probabilities."""
    b, inputs = random_batch(seed, **kinds)
    b = replace(b, lp_old=b.lp_old.clamp(max=-0.02))
    return b, inputs | {"old_per_token_logps": b.lp_old}


def weight(b, kind, i, t, sampler):
    """M min(r, c) A of one token."""
    p, q = math.exp(b.lp[i, t].item()), math.exp(sampler[i, t].item())
    a = reference.advantage(b, i, t)
    distance = abs(p - q) if kind == "tv" else q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    low, high = DELTAS[kind]
    if (a > 0 and p > q and distance > high) or (a < 0 and p < q and distance > low):
        return 0.0
    return min(p / q, TRUNCATION) * a


def direct_loss(b, s, kind, sampler):
    """Gradient of -M min(r, c) A lp, where ERC keeps the token, plus the KL term."""
    losses = {}
    for i, t in reference.valid_tokens(b):
        kept = reference.keeps_gradient(b, s, i, t) and reference.off_policy_keep(b, s, i, t)
        losses[i, t] = -weight(b, kind, i, t, sampler) * kept * b.lp[i, t]
        if b.lp_ref is not None and s.beta:
            losses[i, t] = losses[i, t] + s.beta * reference.kl_term(b, s, i, t)
    return reference.aggregate(losses, b, s)


def check_gradients(trainer, s, b, inputs, kind, sampler):
    _, found = trainer_gradients(trainer, b, inputs)
    expected = gradients(direct_loss(b, s, kind, sampler), b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
    assert found[0].any()


def test_the_random_batches_reach_every_branch():
    for kind in DELTAS:
        seen = set()
        for seed in range(3):
            b, _ = batch(seed)
            for i, t in reference.valid_tokens(b):
                a, r = reference.advantage(b, i, t), (b.lp - b.lp_old)[i, t].exp().item()
                w = weight(b, kind, i, t, b.lp_old)
                seen.add((a > 0, "dropped" if w == 0 else "truncated" if r > TRUNCATION else "kept"))
        assert len(seen) == 6


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kind", DELTAS)
@pytest.mark.parametrize("erc", [None, (0.9, 1.3)])
def test_gradients_are_the_papers(build, kind, loss_type, erc):
    s = replace(BASE, loss_type=loss_type, erc=erc, beta=0.04 if loss_type == "grpo" else 0.0)
    trainer = build(s, **fields(kind))
    for seed in range(2):
        b, inputs = batch(seed, tools=bool(seed), per_token_advantages=bool(seed))
        check_gradients(trainer, s, b, inputs, kind, b.lp_old)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("kind", DELTAS)
def test_what_the_engine_sampled_by_comes_first(build, kind, on_policy):
    """Also where the rollout has no old log-probs; TRL's off-policy mask goes on reading the engine's."""
    s = replace(BASE, off_policy_threshold=0.2)
    b, _ = batch(1)
    g = torch.Generator().manual_seed(0)
    noise = 0.5 * torch.randn(b.lp.shape, generator=g, dtype=torch.float64)
    b = replace(b, lp_sampling=(b.lp.detach() - noise).clamp(max=-0.02), lp_old=None if on_policy else b.lp_old)
    check_gradients(build(s, **fields(kind)), s, b, trainer_inputs(b, b.mask), kind, b.lp_sampling)


def test_without_the_engines_number_the_trainers_own_is_taken(build):
    b, _ = batch(2)
    missing = torch.arange(b.lp.shape[1]) % 3 == 0
    sampling = torch.where(missing, math.nan, b.lp.detach() - 0.4)
    b = replace(b, lp_sampling=sampling)
    anchor = torch.where(missing, b.lp_old, b.lp.detach() - 0.4)
    check_gradients(build(BASE, **fields("tv")), BASE, b, trainer_inputs(b, b.mask), "tv", anchor)


def test_on_policy_without_an_engine_the_gradient_is_grpos(build):
    b, _ = batch(0)
    b = replace(b, lp_old=None)
    inputs = trainer_inputs(b, b.mask)
    _, plain = trainer_gradients(build(BASE), b, inputs)
    _, found = trainer_gradients(build(BASE, **fields("kl")), b, inputs)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)


def test_published_deltas_are_the_defaults(build):
    b, inputs = batch(0)
    for kind, delta in (("tv", 0.15), ("kl", 0.05)):
        _, default = trainer_gradients(build(BASE, dppo_divergence=kind), b, inputs)
        given = {"dppo_delta_low": delta, "dppo_delta_high": delta, "dppo_truncation": 10.0}
        _, same = trainer_gradients(build(BASE, dppo_divergence=kind, **given), b, inputs)
        torch.testing.assert_close(default, same, rtol=0, atol=0)


def test_a_training_logs_every_metric(make_trainer):
    trainer = trained(
        make_trainer(dppo_divergence="tv", dppo_delta_low=1e-3, dppo_delta_high=1e-3, learning_rate=3e-3)
    )
    for metric in DPPO.metrics:
        assert len(logged(trainer, f"dppo/{metric.name}")) == 4, metric.name
    assert logged(trainer, "dppo/divergence")[0] == 0.0
    assert logged(trainer, "dppo/divergence")[3] > 0.0
    dropped, low, high = (logged(trainer, f"dppo/{name}_fraction") for name in ("dropped", "low", "high"))
    assert dropped[3] == pytest.approx(low[3] + high[3])
    assert 0.0 < dropped[3] < 1.0


ON = {"dppo_divergence": "tv"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dppo_divergence": "js"}, "dppo_divergence='js' is unknown. Choose tv or kl"),
        ({"dppo_divergence": ["tv"]}, r"dppo_divergence=\['tv'\] is unknown"),
        ({"dppo_divergence": ""}, "dppo_divergence='' is unknown"),
        ({"dppo_delta_low": 0.1}, "dppo_delta_low=0.1 does nothing without dppo_divergence"),
        ({**ON, "dppo_delta_low": -0.1}, "dppo_delta_low=-0.1 must be finite and at least 0"),
        ({**ON, "dppo_delta_high": math.nan}, "dppo_delta_high=nan must be finite"),
        ({**ON, "dppo_delta_high": "0.1"}, "dppo_delta_high='0.1' must be finite"),
        ({**ON, "dppo_delta_high": True}, "dppo_delta_high=True must be finite"),
        ({**ON, "dppo_truncation": 0.5}, "dppo_truncation=0.5 must be at least 1"),
        ({**ON, "dppo_truncation": None}, "dppo_truncation=None must be at least 1"),
        ({**ON, "delta": 10.0}, "delta=10.0 bounds the ratio of PPO-clip.*Leave delta out"),
        ({**ON, "beta": 0.04, "use_bias_correction_kl": True}, "Set use_bias_correction_kl=False, or beta=0"),
        ({**ON, "use_vllm": True}, "Set vllm_importance_sampling_correction=False"),
        ({**ON, "importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'.*to one of token"),
        ({**ON, "loss_type": "cispo"}, "loss_type='cispo'.*no PPO clip"),
        ({**ON, "loss_type": "sapo"}, "loss_type='sapo'.*no PPO clip"),
        ({**ON, "loss_type": "vespo"}, "loss_type='vespo'.*no PPO clip"),
        (
            {**ON, "ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0},
            "dppo_divergence='tv' cannot be used with ce_gppo_alpha1=0.75, ce_gppo_alpha2=1.0.*Leave one",
        ),
    ],
)
def test_nonsense_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {**ON, "dppo_truncation": math.inf, "dppo_delta_low": 0.0},
        {**ON, "erc_low": 0.95, "erc_high": 1.05, "epo_coef": 0.001},
        {**ON, "beta": 0.04, "use_bias_correction_kl": False},
        {**ON, "use_vllm": True, "vllm_importance_sampling_correction": False, "steps_per_generation": 1},
    ],
)
def test_sense_is_accepted_without_a_warning(tmp_path, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert config(tmp_path, **settings).dppo_enabled


def test_on_policy_it_warns_unless_an_engine_samples(tmp_path):
    with pytest.warns(UserWarning, match="DPPO will do nothing"):
        config(tmp_path, **ON, steps_per_generation=1)


def test_a_configuration_without_trls_fields_is_checked_too():
    check(SimpleNamespace(dppo_divergence="kl", dppo_delta_low=None, dppo_delta_high=0.1, dppo_truncation=10.0))
