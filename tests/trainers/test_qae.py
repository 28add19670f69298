"""QAE through the real trainer: its advantages from the rewards, gradients, logs and resume."""

import math
import os
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch

from tests import reference
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients
from tests.trainers.test_exact_gradients import BASE, CE_GPPO, ERC, random_batch
from tests.trainers.test_grpo import assert_same_weights, logged, weights
from tests.trainers.test_kl_cov import largest_covariances
from trl_entropy import AsyPPOConfig
from trl_entropy.controls.qae import QAE


def graded(completions, **kwargs):
    """0, 1/3, 2/3 or 1 by the first character; nothing at all for one code point in five."""
    codes = [ord(text[0]) if text else 0 for text in completions]
    return [None if code % 5 == 0 else code % 4 / 3 for code in codes]


def parity(completions, **kwargs):
    return [float(len(text) % 2) for text in completions]


def paper(rewards, size, quantile, scale):
    """(R - Q_K(R)) / (std + eps) of each group, one completion after the other; 0 without a reward."""
    found = []
    deviation = lambda values: torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else math.nan  # noqa: E731
    every = [reward for reward in rewards if not math.isnan(reward)]
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        scored = sorted(reward for reward in group if not math.isnan(reward))
        if not scored:
            found += [0.0] * size
            continue
        baseline = scored[math.ceil(len(scored) * Fraction(str(quantile))) - 1]
        divisor = {"group": deviation(scored) + 1e-4, "batch": deviation(every) + 1e-4, "none": 1.0}[scale]
        found += [0.0 if math.isnan(reward) else (reward - baseline) / divisor for reward in group]
    return torch.tensor(found, dtype=torch.float64)


def rollout(trainer):
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(16)])
    return output, trainer._local_rewards(16).tolist()


@pytest.mark.parametrize("quantile", [0.25, 0.4, 0.6])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_the_papers(make_trainer, scale, quantile):
    trainer = make_trainer(qae_quantile=quantile, scale_rewards=scale, reward_funcs=graded, num_generations=4)
    output, rewards = rollout(trainer)
    assert 0 < sum(map(math.isnan, rewards)) < 12
    assert len(set(rewards)) > 4
    expected = paper(rewards, 4, quantile, scale)
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(output["advantages"].double(), expected, rtol=1e-4, atol=1e-5)


def test_weighted_rewards_are_summed_first(make_trainer):
    trainer = make_trainer(qae_quantile=0.4, reward_funcs=[graded, parity], reward_weights=[1.0, 0.5])
    output, rewards = rollout(trainer)
    assert not any(map(math.isnan, rewards))
    torch.testing.assert_close(output["advantages"].double(), paper(rewards, 4, 0.4, "group"), rtol=1e-4, atol=1e-5)


def test_groups_without_variance_are_counted_by_their_rewards(make_trainer, tmp_path):
    share = []
    for quantile in (None, 0.6):
        trainer = make_trainer(tmp_path / str(quantile), qae_quantile=quantile, max_steps=1)
        trainer.train()
        share.append(logged(trainer, "frac_reward_zero_std"))
    assert share[0] == share[1]


@pytest.mark.parametrize(
    ("controls", "level", "loss_type"),
    [
        ({}, "token", "dapo"),
        ({}, "token", "cispo"),
        ({}, "sequence", "dapo"),
        (ERC, "token", "grpo"),
        (ERC | CE_GPPO, "token", "dapo"),
        (ERC | CE_GPPO, "sequence", "grpo"),
    ],
)
def test_gradients(make_trainer, monkeypatch, controls, level, loss_type):
    """Of a micro-batch whose advantages TRL has made of these rewards."""
    stub_forward(monkeypatch)
    build = partial(stubbed_trainer, make_trainer)
    bound = 1.3 if loss_type == "cispo" else 0.28
    s = replace(BASE, level=level, loss_type=loss_type, eps_hi=bound, **controls)
    trainer = build(s, qae_quantile=0.4)
    b, inputs = random_batch(0)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    grouped = rewards.view(2, 4)
    inputs["advantages"] = (
        (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    ).flatten()
    trainer.on_rollout(inputs, rewards)
    b = replace(b, advantages=paper(rewards.tolist(), 4, 0.4, "group"))
    assert (b.advantages == 0).sum() == 4
    _, (found, _) = trainer_gradients(trainer, b, inputs)
    expected, _ = gradients(reference.loss(b, s), b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_later_controls_read_the_new_advantages(make_trainer):
    trainer = make_trainer(qae_quantile=0.4, kl_cov_coef=1.0, kl_cov_fraction=0.2)
    output, _ = rollout(trainer)
    logps = output["old_per_token_logps"]
    b = reference.Batch(logps, logps, output["completion_mask"], output["advantages"], 1.0)
    found = [tuple(place) for place in output["kl_cov_selected"].nonzero().tolist()]
    assert sorted(found) == sorted(largest_covariances(b, 0.2, logps))


def test_metrics_are_logged(make_trainer):
    trainer = make_trainer(qae_quantile=0.4)
    trainer.train()
    shares = [logged(trainer, f"qae/{metric.name}") for metric in QAE.metrics]
    assert [sum(of_rollout) for of_rollout in zip(*shares, strict=True)] == [pytest.approx(1.0)]
    assert shares[1][0] > 0.3


def test_resumed_in_the_middle_of_a_rollout(make_trainer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "qae_quantile": 0.4}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "run", "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    other = make_trainer(tmp_path / "run", **settings | {"qae_quantile": 0.6})
    with pytest.warns(UserWarning, match=r"qae_quantile=0.4 \(now 0.6\).*generated anew"):
        other.train(resume_from_checkpoint=os.path.join(tmp_path, "run", "checkpoint-3"))


def test_critics_have_no_group(tmp_path):
    with pytest.raises(ValueError, match=r"qae_quantile=0.4 cannot be used with .*advantages come from critics"):
        AsyPPOConfig(output_dir=str(tmp_path), qae_quantile=0.4, entropy_coef=0.01, bf16=False)


def test_several_normalised_rewards_are_refused(make_trainer):
    with pytest.raises(ValueError, match="multi_objective_aggregation='normalize_then_sum'"):
        make_trainer(qae_quantile=0.4, multi_objective_aggregation="normalize_then_sum")
