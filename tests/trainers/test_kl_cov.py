"""KL-Cov through the real trainer: gradients against its loss written out, selection, logs and resume."""

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
from trl_entropy.controls.kl_cov import KL_COV

FIELDS = {"kl_cov_coef": 0.7, "kl_cov_fraction": 0.2}


@pytest.fixture
def build(make_trainer, monkeypatch):
    stub_forward(monkeypatch)
    return partial(stubbed_trainer, make_trainer)


def largest_covariances(b, fraction, logps):
    """The valid tokens with the largest (A - mean A) (lp - mean lp); at least one."""
    tokens = reference.valid_tokens(b)
    a = {(i, t): reference.advantage(b, i, t) for i, t in tokens}
    lp = {(i, t): logps[i, t].item() for i, t in tokens}
    mean_a, mean_lp = sum(a.values()) / len(tokens), sum(lp.values()) / len(tokens)
    ranked = sorted(tokens, key=lambda place: -(a[place] - mean_a) * (lp[place] - mean_lp))
    return ranked[: max(1, int(fraction * len(tokens) + 1e-9))]


def loss(b, s, selected, coef, ppo_clip):
    """`-r A + beta |lp - lp_old|` on the selected, on the others `-r A` or PPO-clip; ERC gates `-r A` alone."""
    losses = {}
    old = b.lp.detach() if b.lp_old is None else b.lp_old
    for i, t in reference.valid_tokens(b):
        r, a = torch.exp(b.lp[i, t] - old[i, t]), reference.advantage(b, i, t)
        chosen = (i, t) in selected
        clipped = s.alphas is not None or (ppo_clip and not chosen)
        term = reference.policy_term(r, a, s) if clipped else -r * a
        if not reference.keeps_gradient(b, s, i, t):
            term = term.detach()
        if chosen:
            term = term + coef * (b.lp[i, t] - old[i, t]).abs()
        if s.beta:
            term = term + s.beta * reference.kl_term(b, s, i, t)
        losses[i, t] = term
    return reference.aggregate(losses, b, s)


def check(trainer, s, b, inputs, selected, ppo_clip):
    _, (found, _) = trainer_gradients(trainer, b, inputs)
    expected, _ = gradients(loss(b, s, selected, FIELDS["kl_cov_coef"], ppo_clip), b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13 * expected.abs().max().item())


def flag(b, selected):
    found = torch.zeros(b.mask.shape, dtype=torch.bool)
    for place in selected:
        found[place] = True
    return found


@pytest.mark.parametrize("ppo_clip", [False, True])
@pytest.mark.parametrize(
    ("controls", "loss_type", "beta"),
    [
        *(({}, loss_type, 0.0) for loss_type in LOSS_TYPES),
        ({}, "dapo", 0.04),
        (ERC, "dapo", 0.0),
        (ERC, "grpo", 0.04),
        (CE_GPPO, "dapo", 0.0),
        (ERC | CE_GPPO, "grpo", 0.0),
    ],
)
@pytest.mark.parametrize("selection", ["rollout", "micro_batch"])
def test_gradients(build, selection, controls, loss_type, beta, ppo_clip):
    s = replace(BASE, loss_type=loss_type, beta=beta, **controls)
    trainer = build(
        s,
        use_bias_correction_kl=False,
        kl_cov_selection=selection,
        kl_cov_ppo_clip=ppo_clip,
        **FIELDS,
    )
    for seed in range(2):
        for per_token in (False, True):
            b, inputs = random_batch(seed, tools=bool(seed), per_token_advantages=per_token)
            selected = largest_covariances(b, 0.2, b.lp_old if selection == "rollout" else b.lp)
            assert len(selected) > 4
            if selection == "rollout":
                inputs["kl_cov_selected"] = flag(b, selected)
            check(trainer, s, b, inputs, selected, ppo_clip)


def test_dual_clip_acts_on_the_others(build):
    s = replace(BASE, dual_clip=1.5)
    trainer = build(s, kl_cov_ppo_clip=True, kl_cov_selection="micro_batch", **FIELDS)
    b, inputs = random_batch(1, per_token_advantages=True)
    check(trainer, s, b, inputs, largest_covariances(b, 0.2, b.lp), ppo_clip=True)


@pytest.mark.parametrize("ppo_clip", [False, True])
def test_on_policy_it_does_nothing(build, ppo_clip):
    b, _ = random_batch(0)
    b = replace(b, lp_old=None, entropy_old=None)
    inputs = trainer_inputs(b, b.mask)
    _, plain = trainer_gradients(build(BASE), b, inputs)
    inputs["kl_cov_selected"] = flag(b, reference.valid_tokens(b))
    _, found = trainer_gradients(build(BASE, kl_cov_ppo_clip=ppo_clip, **FIELDS), b, inputs)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 4])  # with 1, TRL makes no log-probs of the rollout
def test_a_rollout_selects_from_its_own_log_probs(make_trainer, monkeypatch, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = make_trainer(steps_per_generation=steps, **FIELDS)
    passes = []
    rollout_pass = trainer.rollout_pass
    monkeypatch.setattr(trainer, "rollout_pass", lambda output: passes.append(rollout_pass(output)) or passes[-1])
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    assert len(passes) == (steps == 1)
    logps = passes[0][0] if steps == 1 else output["old_per_token_logps"]
    b = reference.Batch(logps, logps, output["completion_mask"], output["advantages"], 1.0)
    found = [tuple(place) for place in output["kl_cov_selected"].nonzero().tolist()]
    assert sorted(found) == sorted(largest_covariances(b, 0.2, logps))


@pytest.mark.parametrize("selection", ["rollout", "micro_batch"])
def test_metrics_are_logged(make_trainer, selection):
    trainer = make_trainer(kl_cov_selection=selection, learning_rate=3e-2, **FIELDS)
    trainer.train()
    for metric in KL_COV.metrics:
        assert logged(trainer, f"kl_cov/{metric.name}"), metric.name
    fractions = logged(trainer, "kl_cov/penalised_fraction")
    assert fractions[0] == 0.0
    assert max(fractions) > 0.1
    assert logged(trainer, "kl_cov/ppo_clip_fraction") == [0.0] * 4
    pairs = zip(logged(trainer, "kl_cov/covariance"), logged(trainer, "kl_cov/covariance_selected"), strict=True)
    assert all(mean < selected for mean, selected in pairs)


def test_resumed_in_the_middle_of_a_rollout(make_trainer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2, **FIELDS}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "run", "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    other = make_trainer(tmp_path / "run", **settings | {"kl_cov_fraction": 0.5})
    with pytest.warns(UserWarning, match=r"kl_cov_fraction=0.2 \(now 0.5\).*generated anew"):
        other.train(resume_from_checkpoint=os.path.join(tmp_path, "run", "checkpoint-3"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "cispo"}, "loss_type='cispo'.*Set loss_type to one of"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'.*penalises single tokens"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5"),
        ({"kl_cov_fraction": 0.0}, "kl_cov_fraction=0.0"),
    ],
)
def test_refusals(make_trainer, fields, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{**FIELDS, **fields})


def test_one_update_per_rollout_warns(make_trainer):
    with pytest.warns(UserWarning, match="KL-Cov will do nothing"):
        make_trainer(steps_per_generation=1, **FIELDS)
