"""Clip-Cov through the real trainer: gradients against its loss written out, the draw, logs and resume."""

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
from trl_entropy.controls.clip_cov import CLIP_COV

FIELDS = {"clip_cov_fraction": 0.1, "clip_cov_low": 0.05, "clip_cov_high": 0.8}


@pytest.fixture
def build(make_trainer, monkeypatch):
    stub_forward(monkeypatch)
    return partial(stubbed_trainer, make_trainer)


def candidates(b, logps):
    """The valid tokens with 0.05 < (A - mean A) (lp - mean lp) < 0.8."""
    tokens = reference.valid_tokens(b)
    mean_a = sum(reference.advantage(b, i, t) for i, t in tokens) / len(tokens)
    mean_lp = sum(logps[i, t].item() for i, t in tokens) / len(tokens)
    scores = [(reference.advantage(b, i, t) - mean_a) * (logps[i, t].item() - mean_lp) for i, t in tokens]
    return [place for place, score in zip(tokens, scores, strict=True) if 0.05 < score < 0.8]


def released_choice(b, s, lots):
    """Of the candidates that PPO-clip keeps, those with the smallest lots: a tenth of the valid tokens, at least 1."""
    kept = []
    for i, t in candidates(b, b.lp):
        r, a = reference.ratio(b, s, i, t).item(), reference.advantage(b, i, t)
        clipped = (a < 0 and r < 1 - s.eps_lo) or (a > 0 and r > 1 + s.eps_hi)
        if s.loss_type in ("cispo", "sapo") or not clipped:
            kept.append((i, t))
    count = max(1, int(0.1 * len(reference.valid_tokens(b)) + 1e-9))
    return sorted(kept, key=lambda place: lots[place].item())[:count]


def loss(b, s, dropped):
    """The loss of every token, times 0 where it is dropped."""
    losses = reference.token_losses(b, replace(s, beta=0.0))
    for place, term in losses.items():
        losses[place] = term * (0.0 if place in dropped else 1.0)
        if s.beta:
            losses[place] = losses[place] + s.beta * reference.kl_term(b, s, *place)
    return reference.aggregate(losses, b, s)


def flag(b, places):
    found = torch.zeros(b.mask.shape, dtype=torch.bool)
    for place in places:
        found[place] = True
    return found


@pytest.mark.parametrize(
    ("controls", "loss_type", "beta"),
    [
        *(({}, loss_type, 0.0) for loss_type in (*LOSS_TYPES, "cispo", "sapo")),
        ({}, "dapo", 0.04),
        (ERC, "dapo", 0.0),
        (CE_GPPO, "grpo", 0.0),
        (ERC | CE_GPPO, "dapo", 0.04),
    ],
)
@pytest.mark.parametrize("selection", ["rollout", "micro_batch"])
def test_gradients(build, selection, controls, loss_type, beta):
    bound = 1.3 if loss_type == "cispo" else 0.28
    s = replace(BASE, loss_type=loss_type, eps_hi=bound, beta=beta, **controls)
    trainer = build(s, use_bias_correction_kl=False, clip_cov_selection=selection, **FIELDS)
    for seed in range(2):
        for per_token in (False, True):
            b, inputs = random_batch(seed, tools=bool(seed), per_token_advantages=per_token)
            if selection == "rollout":
                dropped = candidates(b, b.lp_old)[::2]
                inputs["clip_cov_dropped"] = flag(b, dropped)
            else:
                draw = torch.Generator().manual_seed(seed)
                inputs["clip_cov_lots"] = torch.rand(b.mask.shape, generator=draw)
                dropped = released_choice(b, s, inputs["clip_cov_lots"])
            assert len(dropped) > 2
            value, (found, _) = trainer_gradients(trainer, b, inputs)
            expected = loss(b, s, dropped)
            wanted, _ = gradients(expected, b)
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13 * wanted.abs().max().item())
            if s.erc is None:
                torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-14)


def test_it_acts_on_policy(build):
    b, _ = random_batch(0)
    b = replace(b, lp_old=None, entropy_old=None)
    inputs, dropped = trainer_inputs(b, b.mask), candidates(b, b.lp)
    inputs["clip_cov_dropped"] = flag(b, dropped)
    _, (found, _) = trainer_gradients(build(BASE, **FIELDS), b, inputs)
    expected, _ = gradients(loss(b, BASE, dropped), b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-16)
    assert not found[flag(b, dropped)].any()


def generate(trainer):
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])


@pytest.mark.parametrize("steps", [1, 4])  # with 1, TRL makes no log-probs of the rollout
def test_a_rollout_draws_by_its_own_log_probs(make_trainer, monkeypatch, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it acts with one update per rollout
        trainer = make_trainer(steps_per_generation=steps, **FIELDS)
    passes = []
    rollout_pass = trainer.rollout_pass
    monkeypatch.setattr(trainer, "rollout_pass", lambda output: passes.append(rollout_pass(output)) or passes[-1])
    output = generate(trainer)
    assert len(passes) == (steps == 1)
    logps = passes[0][0] if steps == 1 else output["old_per_token_logps"]
    b = reference.Batch(logps, logps, output["completion_mask"], output["advantages"], 1.0)
    found = [tuple(place) for place in output["clip_cov_dropped"].nonzero().tolist()]
    assert len(found) == max(1, int(0.1 * b.mask.sum()))
    assert set(found) <= set(candidates(b, logps))


@pytest.mark.parametrize("selection", ["rollout", "micro_batch"])
def test_metrics_are_logged(make_trainer, selection):
    trainer = make_trainer(clip_cov_selection=selection, **FIELDS)
    trainer.train()
    for metric in CLIP_COV.metrics:
        assert logged(trainer, f"clip_cov/{metric.name}"), metric.name
    fractions = logged(trainer, "clip_cov/clip_fraction")
    assert 0.05 < sum(fractions) / len(fractions) < 0.15
    assert min(logged(trainer, "clip_cov/candidate_fraction")) > 0.0


@pytest.mark.parametrize("selection", ["rollout", "micro_batch"])
def test_resumed_in_the_middle_of_a_rollout(make_trainer, tmp_path, selection):
    fields = {**FIELDS, "clip_cov_selection": selection}
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2, **fields}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "run", "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    other = make_trainer(tmp_path / "run", **settings | {"clip_cov_low": 0.06})
    with pytest.warns(UserWarning, match=r"clip_cov_low=0.05 \(now 0.06\).*generated anew"):
        other.train(resume_from_checkpoint=os.path.join(tmp_path, "run", "checkpoint-3"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "vespo"}, "loss_type='vespo'.*couple the tokens"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'.*drops single tokens"),
        ({"clip_cov_low": 2.0}, "clip_cov_low=2.0 and clip_cov_high=0.8"),
    ],
)
def test_refusals(make_trainer, fields, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{**FIELDS, **fields})
