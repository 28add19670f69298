"""FIPO through the real trainer: gradients against the formula, metrics, refusals."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests import reference
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients
from tests.trainers.test_exact_gradients import BASE, CE_GPPO, ERC, random_batch
from tests.trainers.test_grpo import assert_same_weights, logged, weights
from trl_entropy import EntropyGRPOConfig

SETTINGS = {"fipo_half_life": 3.0, "fipo_clip_range": 0.3, "fipo_max_ratio": 2.0, "fipo_safe_ratio": 1.2}


def weight(b, raise_only, i, t):
    """The formula of arXiv 2603.19835, token by token."""
    total = 0.0
    for k in range(t, b.mask.shape[1]):
        change = (b.lp[i, k] - b.lp_old[i, k]).item()
        if b.mask[i, k] and math.exp(change) <= 2.0:
            total += 2.0 ** (-(k - t) / 3.0) * change
    f = min(max(math.exp(total), 1.0 if raise_only else 0.7), 1.3)
    if reference.advantage(b, i, t) < 0 and math.exp((b.lp[i, t] - b.lp_old[i, t]).item()) > 1.2:
        f = min(max(f, 0.8), 1.0)
    return f


@pytest.mark.parametrize(
    ("loss_type", "clips"),
    [
        *itertools.product(["dapo", "grpo"], [{}, ERC, CE_GPPO, ERC | CE_GPPO]),
        *itertools.product(["cispo", "sapo"], [{}, ERC]),
    ],
)
@pytest.mark.parametrize("raise_only", [False, True])
def test_gradients_are_the_formulas(make_trainer, monkeypatch, clips, loss_type, raise_only):
    stub_forward(monkeypatch)
    s = replace(BASE, loss_type=loss_type, **clips)
    for seed in range(2):
        b, inputs = random_batch(seed, per_token_advantages=seed == 1, tools=True)
        trainer = stubbed_trainer(make_trainer, s, **SETTINGS, fipo_raise_only=raise_only)
        _, (found, _) = trainer_gradients(trainer, b, inputs)
        expected, _ = gradients(reference.weighted_loss(b, s, partial(weight, b, raise_only)), b)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
        assert not torch.allclose(found, gradients(reference.loss(b, s), b)[0])


def test_every_metric_is_logged_and_a_first_step_is_left_alone(make_trainer, tmp_path):
    settings = {"steps_per_generation": 2, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path / "fipo", fipo_half_life=32.0, max_steps=4, **settings)
    trainer.train()
    (row,) = trainer.active.controls
    assert all(len(logged(trainer, f"fipo/{metric.name}")) == 4 for metric in row.metrics)
    # float32 computes a rollout's first step twice
    assert logged(trainer, "fipo/weight")[::2] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert all(value > 1.001 for value in logged(trainer, "fipo/weight")[1::2])


def test_resumed_equals_uninterrupted(make_trainer, tmp_path):
    settings = {"fipo_half_life": 8.0, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fipo_half_life": 0.0}, "fipo_half_life=0.0 must be a finite number above 0. Published: 32"),
        ({"fipo_half_life": math.nan}, "fipo_half_life=nan must be a finite number above 0"),
        ({"fipo_half_life": 32.0, "fipo_clip_range": 1.5}, r"fipo_clip_range=1.5 must be in \[0, 1\]"),
        ({"fipo_half_life": 32.0, "fipo_raise_only": "yes"}, "fipo_raise_only='yes' must be True or False"),
        ({"fipo_half_life": 32.0, "fipo_max_ratio": 1.0}, "fipo_max_ratio=1.0 must be above 1"),
        ({"fipo_half_life": 32.0, "fipo_safe_ratio": math.nan}, "fipo_safe_ratio=nan must be above 1"),
        ({"fipo_half_life": 32.0, "loss_type": "vespo"}, "fipo_half_life=32.0.*loss_type='vespo'"),
        ({"fipo_half_life": 32.0, "importance_sampling_level": "sequence"}, "fipo_half_life=32.0.*one of token"),
    ],
)
def test_nonsense_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        EntropyGRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **fields)
