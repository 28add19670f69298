"""One entropy target, served by each of the loops: as by the loop's own fields, traced, refused if it contradicts."""

import inspect
import math
from dataclasses import make_dataclass, replace
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests import reference
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients
from tests.trainers.test_entropic import measured
from tests.trainers.test_exact_gradients import BASE, ERC, random_batch
from tests.trainers.test_grpo import assert_same_weights, logged, weights
from trl_entropy import EntropyGRPOConfig
from trl_entropy.controls import CONTROLS
from trl_entropy.controls.target_entropy import TargetEntropyFields, serve_target_entropy
from trl_entropy.telemetry.figures import FIGURES, series

TARGET = 2.5  # above the tiny policy's 1.7
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0, "epsilon": 0.01}
COEFFICIENT = {"use_adaptive_entropy": True, "entropy_target": TARGET}
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "entropic": {"entropic_target": TARGET},
    "par": {"par_schedule": "entropy", "par_target": TARGET},
    "ce_gppo": {"ce_gppo_loop_target": TARGET},
    "coefficient": COEFFICIENT,
    "stare": {"stare_target_entropy": TARGET},
}
"""What each loop's `target_entropy` writes."""
LOOPS = [
    pytest.param(
        loop,
        marks=pytest.mark.skipif(
            loop == "stare" and all(row.prefix != "stare" for row in CONTROLS), reason="there is no STARE here"
        ),
    )
    for loop in OWN_FIELDS
]
TRAINED = {"steps_per_generation": 2, "max_steps": 6, "learning_rate": 3e-2}


def around(loop: str) -> dict[str, Any]:
    return CE_GPPO if loop == "ce_gppo" else {}


def config(tmp_path, **fields):
    return EntropyGRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **fields)


def test_every_loop_is_here():
    assert {row.target_loop.name for row in CONTROLS if row.target_loop} <= set(OWN_FIELDS)
    assert all(row.target_loop for row in CONTROLS if row.steers_entropy)
    described = inspect.getdoc(TargetEntropyFields)
    assert all(f'`"{name}"`' in described for name in OWN_FIELDS)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_target_is_written_into_the_loops_fields(tmp_path, loop):
    made = config(tmp_path, target_entropy=TARGET, target_entropy_by=loop, **around(loop))
    assert {name: getattr(made, name) for name in OWN_FIELDS[loop]} == OWN_FIELDS[loop]
    assert made.any_control_enabled
    # with both set to the same, and built again from its own fields
    again = config(tmp_path, target_entropy=TARGET, target_entropy_by=loop, **around(loop), **OWN_FIELDS[loop])
    assert replace(made, steps_per_generation=None, generation_batch_size=None).target_entropy == TARGET
    assert {name: getattr(again, name) for name in OWN_FIELDS[loop]} == OWN_FIELDS[loop]


@pytest.mark.parametrize("loop", LOOPS)
def test_it_trains_as_the_loops_own_fields_do_and_is_traced(make_trainer, tmp_path, loop):
    made = {"target_entropy": TARGET, "target_entropy_by": loop}
    by_target = make_trainer(tmp_path / "target", **made, **around(loop), **TRAINED)
    by_target.train()
    by_fields = make_trainer(tmp_path / "fields", **OWN_FIELDS[loop], **around(loop), **TRAINED)
    by_fields.train()
    assert_same_weights(weights(by_target), weights(by_fields))
    plain = make_trainer(tmp_path / "plain", **around(loop), **TRAINED)
    plain.train()
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in weights(by_target).items())
    prefix = {"ce_gppo": "ce_gppo_loop"}.get(loop, loop)
    trace = next(figure for figure in FIGURES if figure.name == prefix)
    history = by_target.state.log_history
    assert all(series(history, panel.keys)[0] for panel in trace.panels)
    (set_point,) = trace.panels[0].guides
    assert set(series(history, (set_point,))[1]) == {TARGET}


def test_by_the_coefficient_it_is_trls_own(make_trainer, tmp_path):
    ours = make_trainer(tmp_path / "ours", target_entropy=TARGET, target_entropy_by="coefficient", **TRAINED)
    ours.train()
    own = {"trainer_class": GRPOTrainer, "config_class": GRPOConfig, **COEFFICIENT}
    trls = make_trainer(tmp_path / "trl", **own, **TRAINED)
    trls.train()
    assert_same_weights(weights(ours), weights(trls))
    assert logged(ours, "entropy_coef") == logged(trls, "entropy_coef")


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("clips", [{}, ERC], ids=["alone", "erc"])
@pytest.mark.parametrize("per_token", [False, True])
def test_ce_gppos_weights_are_the_formulas(make_trainer, monkeypatch, clips, level, per_token):
    stub_forward(monkeypatch)
    s = replace(BASE, level=level, alphas=(0.75, 1.1), **clips)
    for seed, actuator in enumerate((0.7, -0.4, 1.0)):
        b, inputs = random_batch(seed, per_token_advantages=per_token)
        trainer = stubbed_trainer(make_trainer, s, target_entropy=TARGET, target_entropy_by="ce_gppo")
        state = {"entropy": 1.0, "actuator": actuator, "integral": 0.0}
        trainer.active.states["ce_gppo_loop"].load_state_dict(state)
        _, (found, _) = trainer_gradients(trainer, b, inputs)
        steered = replace(s, alphas=(0.75 * (1 + actuator), 1.1 * (1 - actuator)))
        expected, _ = gradients(reference.loss(b, steered), b)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
        assert not torch.allclose(found, gradients(reference.loss(b, s), b)[0])


def test_ce_gppos_loop_in_training(make_trainer):
    gains = {"ce_gppo_loop_kp": 0.4, "ce_gppo_loop_ki": 0.2}
    trainer = make_trainer(target_entropy=TARGET, target_entropy_by="ce_gppo", **gains, **CE_GPPO, **TRAINED)
    entropies = measured(trainer)
    trainer.train()
    expected, total = [], 0.0
    for entropy in entropies:
        expected += [min(max(0.4 * (entropy - TARGET) + 0.2 * total, -1.0), 1.0)] * 2
        total += entropy - TARGET
    assert logged(trainer, "ce_gppo_loop/actuator") == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert logged(trainer, "ce_gppo_loop/alpha1") == pytest.approx([0.75 * (1 + a) for a in expected], rel=1e-4)
    assert logged(trainer, "ce_gppo_loop/alpha2") == pytest.approx([1 - a for a in expected], rel=1e-4)
    row = next(control for control in trainer.active.controls if control.prefix == "ce_gppo_loop")
    assert all(len(logged(trainer, f"ce_gppo_loop/{metric.name}")) == 6 for metric in row.metrics)


@pytest.mark.parametrize("loop", LOOPS)
def test_resumed_equals_uninterrupted(make_trainer, tmp_path, loop):
    # the checkpoint is in the middle of the second of three rollouts
    settings = {"target_entropy": TARGET, "target_entropy_by": loop, **around(loop), **TRAINED}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_entropy": 0.0}, "target_entropy=0.0 must be a finite number above 0"),
        ({"target_entropy": math.nan}, "target_entropy=nan must be a finite number above 0"),
        ({"target_entropy": 1.0, "target_entropy_by": "magic"}, "target_entropy_by='magic' is unknown.*entropic"),
        ({"target_entropy_by": "par"}, "target_entropy_by='par' serves target_entropy, which is not set"),
        (
            {"target_entropy": 1.0, "entropic_target": 0.5},
            "target_entropy=1.0 with target_entropy_by='entropic' sets entropic_target=1.0, and entropic_target=0.5",
        ),
        (
            {"target_entropy": 1.0, "target_entropy_by": "par", "par_schedule": "stage"},
            "sets par_schedule='entropy', and par_schedule='stage' is set. Leave one of the two out",
        ),
        (
            {"target_entropy": 1.0, "target_entropy_by": "coefficient", "entropy_target": 0.5},
            "sets entropy_target=1.0, and entropy_target=0.5 is set",
        ),
        ({"target_entropy": 1.0, "par_schedule": "entropy"}, "would steer the mean entropy at once"),
        (
            {"target_entropy": 1.0, "target_entropy_by": "coefficient", "entropic_target": 1.0},
            "entropic_target=1.0 and use_adaptive_entropy=True would steer",
        ),
        ({"target_entropy": 1.0, "use_adaptive_entropy": True}, "use_adaptive_entropy=True would steer"),
        (
            {"target_entropy": 1.0, "target_entropy_by": "ce_gppo"},
            "ce_gppo_loop_target=1.0 moves CE-GPPO's weights, and ce_gppo_alpha1=None",
        ),
        (
            {"ce_gppo_loop_target": 1.0, "ce_gppo_alpha1": 0.0, "ce_gppo_alpha2": 0.0},
            "ce_gppo_loop_target=1.0.*not both 0",
        ),
        (
            {**CE_GPPO, "ce_gppo_loop_target": 1.0, "ce_gppo_loop_kp": 0.0, "ce_gppo_loop_ki": 0.0},
            "ce_gppo_loop_kp=0 and ce_gppo_loop_ki=0",
        ),
        ({**CE_GPPO, "ce_gppo_loop_target": -1.0}, "ce_gppo_loop_target=-1.0 must be a finite number above 0"),
        ({**CE_GPPO, "ce_gppo_loop_kp": math.nan}, "ce_gppo_loop_kp=nan must be finite"),
        ({**CE_GPPO, "ce_gppo_loop_ki": -1.0}, "ce_gppo_loop_ki=-1.0 must be finite"),
    ],
)
def test_nonsense_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


def test_a_trl_without_the_coefficient_is_refused():
    without = make_dataclass("Config", [], bases=(TargetEntropyFields,))(1.0, "coefficient")
    with pytest.raises(ValueError, match="sets use_adaptive_entropy, which the installed TRL does not have"):
        serve_target_entropy(without, CONTROLS)
