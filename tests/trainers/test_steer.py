"""STEER through the real trainer: gradients against its loss written out, the scale, logs and resume."""

import math
import os
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests import reference
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients, trainer_inputs
from tests.trainers.test_exact_gradients import BASE, CE_GPPO, ERC, LOSS_TYPES, random_batch
from tests.trainers.test_grpo import assert_same_weights, logged, weights
from trl_entropy.controls.steer import STEER

FIELDS = {"steer_min_weight": 0.6}


@pytest.fixture
def build(make_trainer, monkeypatch):
    stub_forward(monkeypatch)
    return partial(stubbed_trainer, make_trainer)


def change(a, lp, lp_old, entropy):
    """|(A / q) p (1 - p) (log p + H)|."""
    p, q = math.exp(lp), math.exp(lp_old)
    return abs(a / q * p * (1 - p) * (lp + entropy))


def weight(b, i, t, scale):
    """exp(-k |O|) with k = -log(0.6) / max(scale, 0.02), between 0.6 and 1."""
    lp, old = b.lp[i, t].item(), (b.lp if b.lp_old is None else b.lp_old)[i, t].item()
    k = -math.log(0.6) / max(scale, 0.02)
    found = math.exp(-k * change(reference.advantage(b, i, t), lp, old, b.entropy[i, t].item()))
    return min(max(found, 0.6), 1.0)


def loss(b, s, scale):
    losses = reference.token_losses(b, replace(s, beta=0.0))
    for place, term in losses.items():
        losses[place] = weight(b, *place, scale) * term
        if s.beta:
            losses[place] = losses[place] + s.beta * reference.kl_term(b, s, *place)
    return reference.aggregate(losses, b, s)


@pytest.mark.parametrize(
    ("controls", "loss_type", "beta"),
    [
        *(({}, loss_type, 0.0) for loss_type in (*LOSS_TYPES, "cispo", "sapo")),
        ({}, "dapo", 0.04),
        ({"dual_clip": 1.5}, "dapo", 0.0),
        (ERC, "dapo", 0.0),
        (CE_GPPO, "grpo", 0.0),
        (ERC | CE_GPPO, "dapo", 0.04),
    ],
)
def test_gradients(build, controls, loss_type, beta):
    bound = 1.3 if loss_type == "cispo" else 0.28
    s = replace(BASE, loss_type=loss_type, eps_hi=bound, beta=beta, **controls)
    trainer = build(s, use_bias_correction_kl=False, **FIELDS)
    for seed in range(2):
        for per_token in (False, True):
            b, inputs = random_batch(seed, tools=bool(seed), per_token_advantages=per_token)
            inputs["steer_scale"] = torch.tensor(0.9, dtype=torch.float64)
            found_weights = {weight(b, i, t, 0.9) for i, t in reference.valid_tokens(b)}
            assert min(found_weights) == 0.6
            assert len(found_weights) > 10
            value, (found, _) = trainer_gradients(trainer, b, inputs)
            expected = loss(b, s, 0.9)
            wanted, _ = gradients(expected, b)
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13 * wanted.abs().max().item())
            if s.erc is None and s.dual_clip is None:
                torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-14)


def test_it_acts_on_policy(build):
    b, _ = random_batch(0)
    b = replace(b, lp_old=None, entropy_old=None)
    inputs = trainer_inputs(b, b.mask) | {"steer_scale": torch.tensor(0.9, dtype=torch.float64)}
    _, (found, _) = trainer_gradients(build(BASE, **FIELDS), b, inputs)
    expected, _ = gradients(loss(b, BASE, 0.9), b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("steps", [1, 4])  # with 1, TRL makes no log-probs of the rollout
def test_the_scale_is_that_of_the_rollout(make_trainer, monkeypatch, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it acts with one update per rollout
        trainer = make_trainer(steps_per_generation=steps, **FIELDS)
    passes = []
    rollout_pass = trainer.rollout_pass
    monkeypatch.setattr(trainer, "rollout_pass", lambda output: passes.append(rollout_pass(output)) or passes[-1])
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    logps, entropies = passes[0] if steps == 1 else (output["old_per_token_logps"], output["old_entropies"])
    changes = [
        change(output["advantages"][i].item(), lp, lp, entropies[i, t].item())
        for i, row in enumerate(logps.tolist())
        for t, lp in enumerate(row)
        if output["completion_mask"][i, t]
    ]
    assert output["steer_scale"].item() == pytest.approx(max(changes), rel=1e-4)


def test_metrics_are_logged(make_trainer):
    trainer = make_trainer(learning_rate=1e-2, **FIELDS)
    trainer.train()
    for metric in STEER.metrics:
        assert logged(trainer, f"steer/{metric.name}"), metric.name
    assert all(0.6 <= mean < 1.0 for mean in logged(trainer, "steer/weight"))
    scales = logged(trainer, "steer/scale")
    assert scales == pytest.approx([scales[0]] * 4, rel=1e-5)  # one rollout


def test_resumed_in_the_middle_of_a_rollout(make_trainer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2, **FIELDS}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "run", "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "vespo"}, r"loss_type='vespo'.*couple the tokens"),
        ({"importance_sampling_level": "sequence"}, r"importance_sampling_level='sequence'.*weighs single tokens"),
        ({"steer_min_weight": 0.0}, "steer_min_weight=0.0 must be"),
    ],
)
def test_refusals(make_trainer, fields, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{**FIELDS, **fields})
