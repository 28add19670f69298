"""STARE through the real trainer: gradients, on-policy too, resumed runs, and what is refused."""

import copy
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
from tests.trainers.test_grpo import assert_same_weights, logged, trained, weights
from trl_entropy.controls.stare import STARE, STAREFields, check

FRACTION, POSITIVE, NEGATIVE = 0.15, 1.7, 0.4
FIELDS = {
    "stare_variant": "C2",
    "stare_fraction": FRACTION,
    "stare_positive_weight": POSITIVE,
    "stare_positive_max": POSITIVE,
    "stare_negative_weight": NEGATIVE,
    "stare_negative_min": 0.0,
    "use_bias_correction_kl": False,
}


@pytest.fixture
def build(make_trainer, monkeypatch):
    stub_forward(monkeypatch)
    return partial(stubbed_trainer, make_trainer)


def gate_is_on(b, target):
    """Mean entropy of the rollout policy below the target."""
    old = b.entropy if b.entropy_old is None else b.entropy_old
    values = [old[i, t].item() for i, t in reference.valid_tokens(b)]
    return sum(values) / len(values) < target


def direct_weights(b, target, variant="C2"):
    """The weight of every valid token."""
    weight = dict.fromkeys(reference.valid_tokens(b), 1.0)
    if not gate_is_on(b, target):
        return weight
    old = b.lp if b.lp_old is None else b.lp_old
    for sign, value in ((1, POSITIVE), (-1, NEGATIVE)):
        side = [(i, t) for i, t in weight if sign * reference.advantage(b, i, t) > 0]
        side.sort(key=lambda place: old[place].item())
        if sign > 0 or variant == "C2":
            weight |= dict.fromkeys(side[: math.ceil(FRACTION * len(side))], value)
    return weight


def direct_loss(b, s, target, variant="C2"):
    """w times the clipped surrogate, where ERC keeps the token."""
    weight, losses = direct_weights(b, target, variant), {}
    for i, t in reference.valid_tokens(b):
        term = reference.policy_term(reference.ratio(b, s, i, t), reference.advantage(b, i, t), s)
        losses[i, t] = weight[i, t] * (term if reference.keeps_gradient(b, s, i, t) else term.detach())
    return reference.aggregate(losses, b, s)


def with_columns(trainer, b, inputs):
    """What the trainer's own rollout adds to the inputs; a rollout of the current policy has no old log-probs."""
    trainer.leaves = (b.lp.detach(), b.entropy.detach())
    inputs = dict(inputs)
    trainer.on_rollout(inputs, b.rewards)
    return inputs


def check_gradients(trainer, s, b, inputs, target, variant="C2"):
    _, found = trainer_gradients(trainer, b, with_columns(trainer, b, inputs))
    expected = gradients(direct_loss(b, s, target, variant), b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
    assert found[0].any()


TARGET = 5.0
COMBINATIONS = {"stare": {}, "erc": ERC, "ce_gppo": CE_GPPO, "all": {**ERC, **CE_GPPO}}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("controls", COMBINATIONS)
def test_gradients_are_the_papers(build, controls, loss_type):
    s = replace(BASE, loss_type=loss_type, **COMBINATIONS[controls])
    trainer = build(s, stare_target_entropy=TARGET, **FIELDS)
    for seed in range(2):
        b, inputs = random_batch(seed, tools=bool(seed), per_token_advantages=bool(seed))
        assert set(direct_weights(b, TARGET).values()) == {1.0, POSITIVE, NEGATIVE}
        check_gradients(trainer, s, b, inputs, TARGET)


@pytest.mark.parametrize("variant", ["O1", "C2"])
def test_on_policy_the_rollout_gets_a_pass_of_its_own(build, variant):
    b, _ = random_batch(0)
    b = replace(b, lp_old=None, entropy_old=None)
    trainer = build(BASE, stare_target_entropy=TARGET, **FIELDS | {"stare_variant": variant})
    check_gradients(trainer, BASE, b, trainer_inputs(b, b.mask), TARGET, variant)


def test_above_the_target_the_gradient_is_ppo_clips(build):
    b, inputs = random_batch(0)
    _, plain = trainer_gradients(build(BASE), b, inputs)
    mean = (b.entropy_old * b.mask).sum().item() / b.mask.sum().item()
    for target, same in ((mean - 1e-3, True), (mean + 1e-3, False)):
        trainer = build(BASE, stare_target_entropy=target, **FIELDS)
        _, found = trainer_gradients(trainer, b, with_columns(trainer, b, inputs))
        assert torch.equal(found[0], plain[0]) is same
        check_gradients(trainer, BASE, b, inputs, target)


@pytest.mark.parametrize("loss_type", ["cispo", "sapo"])
def test_losses_without_a_ppo_clip_are_weighted_too(build, loss_type):
    s = replace(BASE, loss_type=loss_type, eps_hi=1.3 if loss_type == "cispo" else 0.28)
    trainer = build(s, stare_target_entropy=TARGET, **FIELDS)
    b, inputs = random_batch(0)
    weight = direct_weights(b, TARGET)
    expected = reference.aggregate({at: weight[at] * loss for at, loss in reference.token_losses(b, s).items()}, b, s)
    _, found = trainer_gradients(trainer, b, with_columns(trainer, b, inputs))
    torch.testing.assert_close(found, gradients(expected, b), rtol=1e-10, atol=1e-15)


def test_a_micro_batch_without_its_column_says_so(build):
    b, inputs = random_batch(0)
    with pytest.raises(ValueError, match="STARE needs the rollout's `stare_weight`"):
        trainer_gradients(build(BASE, stare_target_entropy=TARGET), b, inputs)


ON_POLICY = {"steps_per_generation": 1}
STEERED = {"stare_target_entropy": 9.0, "stare_variant": "C2", "stare_adaptive_step": 0.05}


@pytest.mark.parametrize("schedule", [{}, ON_POLICY], ids=["off-policy", "on-policy"])
def test_a_training_logs_every_metric(make_trainer, tmp_path, tiny_dataset, schedule):
    trainer = trained(make_trainer(tmp_path / "on", **STEERED, **schedule, max_steps=8))
    rollouts = 8 if schedule else 2
    for metric in STARE.metrics:
        expected = 8 if "fraction" in metric.name else rollouts
        assert len(logged(trainer, f"stare/{metric.name}")) == expected, metric.name
    moved = [min(1.1 + 0.05 * (step + 1), 1.5) for step in range(rollouts)]
    assert logged(trainer, "stare/positive_weight") == pytest.approx(moved)
    assert logged(trainer, "stare/gate") == [1.0] * rollouts
    plain = trained(make_trainer(tmp_path / "off", **schedule, max_steps=8))
    assert logged(trainer, "stare/entropy")[0] == pytest.approx(logged(plain, "entropy")[0], rel=0.1)
    assert any(not torch.equal(value, weights(trainer)[name]) for name, value in weights(plain).items())


def test_an_evaluation_moves_nothing(make_trainer, tiny_dataset):
    trainer = make_trainer(**STEERED, eval_dataset=tiny_dataset.select(range(4)))
    trainer.evaluate()
    assert trainer.active.states["stare"].state_dict() == {"positive": 1.1, "negative": 0.9}


@pytest.mark.parametrize(
    "schedule",
    [{}, ON_POLICY, {"steps_per_generation": 3}, {"gradient_accumulation_steps": 2, "num_iterations": 2}],
    ids=["inside-rollout", "on-policy", "between-rollouts", "accumulation"],
)
def test_resume_equals_an_uninterrupted_run(make_trainer, tmp_path, schedule):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **STEERED, **schedule}
    whole = trained(make_trainer(tmp_path / "run", **settings))
    resumed = make_trainer(tmp_path / "run", **copy.copy(settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    assert resumed.active.states["stare"].state_dict() == whole.active.states["stare"].state_dict()
    assert logged(resumed, "stare/positive_weight") == logged(whole, "stare/positive_weight")


def test_resumed_with_another_target_the_rollout_is_made_anew(make_trainer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **STEERED}
    trained(make_trainer(tmp_path / "run", **settings))
    resumed = make_trainer(tmp_path / "run", **settings | {"stare_target_entropy": 0.1})
    with pytest.warns(UserWarning, match="stare_target_entropy=9.0 .now 0.1.*generated anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


ON = {"stare_target_entropy": 0.3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stare_target_entropy": 0.0}, "stare_target_entropy=0.0 must be a finite number above 0"),
        ({"stare_target_entropy": math.nan}, "stare_target_entropy=nan must be a finite number above 0"),
        ({"stare_target_entropy": "0.3"}, "stare_target_entropy='0.3' must be a finite number above 0"),
        ({**ON, "stare_variant": "o1"}, "stare_variant='o1' is unknown. Choose O1 or C2"),
        ({**ON, "stare_fraction": 0.0}, r"stare_fraction=0.0 must be in \(0, 1\]"),
        ({**ON, "stare_fraction": 1.1}, r"stare_fraction=1.1 must be in \(0, 1\]"),
        ({**ON, "stare_positive_weight": 0.9}, "stare_positive_weight=0.9 must be finite and at least 1"),
        ({**ON, "stare_positive_weight": True}, "stare_positive_weight=True must be finite"),
        ({**ON, "stare_negative_weight": -0.1}, r"stare_negative_weight=-0.1 must be in \[0, 1\]"),
        ({**ON, "stare_negative_weight": 1.1}, r"stare_negative_weight=1.1 must be in \[0, 1\]"),
        ({**ON, "stare_adaptive_step": -0.01}, "stare_adaptive_step=-0.01 must be finite and at least 0"),
        ({**ON, "stare_positive_weight": 1.6}, "stare_positive_max=1.5 must be.*at least stare_positive_weight=1.6"),
        ({**ON, "stare_positive_max": math.inf}, "stare_positive_max=inf must be finite"),
        ({**ON, "stare_negative_weight": 0.4}, r"stare_negative_min=0.5 must be in \[0, 0.4\]"),
        ({**ON, "importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'.*to one of token"),
        ({**ON, "loss_type": "vespo"}, "loss_type='vespo'.*couple the tokens"),
        ({**ON, "use_adaptive_entropy": True}, "stare_target_entropy=0.3 and use_adaptive_entropy=True.*at once"),
    ],
)
def test_nonsense_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {**ON, "steps_per_generation": 1},
        {**ON, "stare_variant": "C2", "stare_negative_weight": 0.5, "ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0},
        {**ON, "erc_low": 0.95, "erc_high": 1.05, "epo_coef": 0.001, "loss_type": "cispo"},
        {**ON, "dppo_divergence": "tv"},
    ],
)
def test_sense_is_accepted_without_a_warning(tmp_path, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert config(tmp_path, **settings).stare_enabled


def test_a_configuration_without_trls_fields_is_checked_too():
    check(SimpleNamespace(**{**vars(STAREFields()), **ON}))
