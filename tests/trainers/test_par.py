"""Positive-Advantage Reweighting through the real trainer: gradients, the schedules, resume, refusals."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests import reference
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients
from tests.trainers.test_entropic import measured
from tests.trainers.test_exact_gradients import BASE, CE_GPPO, ERC, random_batch
from tests.trainers.test_grpo import assert_same_weights, logged, weights
from trl_entropy import EntropyGRPOConfig
from trl_entropy.controls import controls_of


@pytest.fixture
def build(make_trainer, monkeypatch):
    stub_forward(monkeypatch)
    return partial(stubbed_trainer, make_trainer)


@pytest.mark.parametrize(
    ("loss_type", "clips"),
    [
        *itertools.product(["dapo", "grpo"], [{}, ERC, CE_GPPO, ERC | CE_GPPO]),
        *itertools.product(["cispo", "sapo"], [{}, ERC]),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_gradients_are_the_formulas(build, clips, loss_type, level, on_policy):
    s = replace(BASE, loss_type=loss_type, level=level, **clips)
    for seed, of_positives in enumerate((0.3, 0.0)):
        # per-token advantages at sequence level weight each token's share of the sequence's ratio
        b, inputs = random_batch(seed, per_token_advantages=level == "token" and seed == 0)
        if on_policy:
            b.lp_old = b.entropy_old = None
            inputs = {name: value for name, value in inputs.items() if not name.startswith("old_")}
        trainer = build(s, par_schedule="entropy")
        trainer.active.states["par"].load_state_dict({"entropy": 1.0, "actuator": of_positives, "integral": 0.0})
        _, (found, _) = trainer_gradients(trainer, b, inputs)

        def weight(i, t, b=b, of_positives=of_positives):
            return of_positives if reference.advantage(b, i, t) > 0 else 1.0

        expected, _ = gradients(reference.weighted_loss(b, s, weight), b)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
        assert not torch.allclose(found, gradients(reference.loss(b, s), b)[0])


@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_by_entropy_in_training(make_trainer, tiny_dataset, steps_per_generation):
    trainer = make_trainer(
        par_schedule="entropy",
        par_target=1.76,  # inside the range of the rollouts
        par_delta=0.2,
        par_initial=0.4,
        steps_per_generation=steps_per_generation,
        max_steps=8,
        learning_rate=1e-2,
        eval_dataset=tiny_dataset.select(range(2)),
        eval_strategy="steps",
        eval_steps=2,
    )
    entropies = measured(trainer)
    trainer.train()
    expected, weight = [], 0.4
    for entropy in entropies:
        weight = min(max(weight + (0.2 if entropy >= 1.76 else -0.2), 0.0), 1.0)
        expected += [weight] * steps_per_generation
    assert logged(trainer, "par/actuator") == pytest.approx(expected)
    assert len({entropy >= 1.76 for entropy in entropies}) == 2
    each = [entropy for entropy in entropies for _ in range(steps_per_generation)]
    assert logged(trainer, "par/entropy") == pytest.approx(each, rel=1e-4)
    row = next(control for control in trainer.active.controls if control.prefix == "par")
    assert all(len(logged(trainer, f"par/{metric.name}")) == 8 for metric in row.metrics)


def test_by_stage_in_training(make_trainer):
    trainer = make_trainer(par_schedule="stage", steps_per_generation=2, max_steps=10)
    trainer.train()
    # five rollouts of two steps each
    assert logged(trainer, "par/actuator") == pytest.approx([0, 0, 0, 0, 0, 0, 0.5, 0.5, 1, 1])
    assert logged(trainer, "par/dropped_fraction")[:6] == logged(trainer, "par/positive_fraction")[:6]
    assert logged(trainer, "par/dropped_fraction")[6:] == [0.0] * 4
    assert not logged(trainer, "par/entropy")


def test_by_epoch_in_training(make_trainer, tiny_dataset):
    """Four prompts, two a step, in rollouts of one step: two rollouts an epoch, three epochs."""
    trainer = make_trainer(
        par_schedule="epoch",
        steps_per_generation=1,
        max_steps=-1,
        num_train_epochs=3,
        train_dataset=tiny_dataset.select(range(4)),
    )
    trainer.train()
    assert logged(trainer, "par/actuator") == pytest.approx([0, 0, 0.5, 0.5, 1, 1])


@pytest.mark.parametrize(("schedule", "passes"), [("entropy", 2), ("stage", 0)])
def test_only_the_loop_costs_a_forward_pass(make_trainer, schedule, passes):
    made = []
    trainer = make_trainer(par_schedule=schedule, steps_per_generation=1, max_steps=2)
    real = trainer.rollout_pass
    trainer.rollout_pass = lambda output: made.append(1) or real(output)
    trainer.train()
    assert len(made) == passes


@pytest.mark.parametrize("schedule", ["entropy", "stage"])
def test_resumed_equals_uninterrupted(make_trainer, tmp_path, schedule):
    settings = {"par_schedule": schedule, "par_delta": 0.2, "learning_rate": 1e-2}
    # the checkpoint is in the middle of the second of three rollouts
    settings |= {"steps_per_generation": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    assert logged(resumed, "par/actuator") == logged(whole, "par/actuator")
    assert len(set(logged(whole, "par/actuator"))) > 1


def config(tmp_path, **fields):
    return EntropyGRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"par_schedule": "cosine"}, "par_schedule='cosine' is unknown. Choose one of stage, epoch, entropy"),
        ({"par_schedule": "epoch", "max_steps": 4}, "par_schedule='epoch'.*max_steps=4.*Set max_steps=-1"),
        ({"par_schedule": "epoch", "num_train_epochs": 1}, "par_schedule='epoch'.*num_train_epochs=1. Set at least 2"),
        ({"par_schedule": "entropy", "par_target": 0.0}, "par_target=0.0 must be a finite number above 0"),
        ({"par_schedule": "entropy", "par_target": math.nan}, "par_target=nan must be a finite number above 0"),
        ({"par_schedule": "entropy", "par_delta": 1.5}, r"par_delta=1.5 must be in \[0, 1\]. Published: 0.05"),
        ({"par_schedule": "entropy", "par_initial": -0.1}, r"par_initial=-0.1 must be in \[0, 1\]. Published: 0"),
        ({"par_schedule": "entropy", "par_initial": "0"}, r"par_initial='0' must be in \[0, 1\]"),
        ({"par_schedule": "stage", "loss_type": "vespo"}, "par_schedule='stage'.*loss_type='vespo'"),
        (
            {"par_schedule": "entropy", "entropic_target": 0.5},
            "par_schedule='entropy' and entropic_target=0.5 would steer the mean entropy at once",
        ),
        ({"par_schedule": "entropy", "use_adaptive_entropy": True}, "par_schedule='entropy' and use_adaptive_entropy"),
    ],
)
def test_nonsense_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


@pytest.mark.parametrize("other", [{"entropic_target": 0.5}, {"use_adaptive_entropy": True}])
def test_a_schedule_is_no_loop(tmp_path, other):
    both = config(tmp_path, par_schedule="stage", **other)
    par = next(control for control in controls_of(both) if control.prefix == "par")
    assert (par.steers_entropy, par.needs_old_entropies, par.needs_rollout_pass) == (False, False, False)


def test_evaluation_before_the_training(make_trainer):
    trainer = make_trainer(par_schedule="epoch", num_train_epochs=3, max_steps=-1)
    metrics = trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert math.isfinite(metrics["eval_loss"])


def test_the_last_rollout_is_the_last_where_epochs_end_in_smaller_steps(make_trainer, tiny_dataset):
    """Three micro-batches an epoch, two a step: 8 steps, but 12 rollouts."""
    trainer = make_trainer(
        par_schedule="stage",
        steps_per_generation=1,
        gradient_accumulation_steps=2,
        num_train_epochs=4,
        max_steps=-1,
        train_dataset=tiny_dataset.select(range(6)),
    )
    trainer.train()
    assert trainer.state.max_steps == 8
    assert trainer._context().total_steps == 12
    assert logged(trainer, "par/actuator")[-1] == pytest.approx(1.0)
