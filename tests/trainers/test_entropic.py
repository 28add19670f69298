"""EntroPIC through the real trainer: gradients against the formula, the loop in training, resume, refusals."""

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests import reference
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients
from tests.trainers.test_exact_gradients import ALL, BASE, CE_GPPO, ERC, random_batch
from tests.trainers.test_grpo import assert_same_weights, logged, weights
from trl_entropy import EntropyGRPOConfig

TARGET, THRESHOLD = 0.8, 0.4
SETTINGS: dict[str, Any] = {"entropic_target": TARGET, "entropic_probability": THRESHOLD}


@pytest.fixture
def build(make_trainer, monkeypatch):
    stub_forward(monkeypatch)
    return partial(stubbed_trainer, make_trainer)


def weight(b, actuator, i, t):
    """1 + a sign(A) for a token more probable than the threshold."""
    if math.exp(b.lp[i, t].item()) <= THRESHOLD:
        return 1.0
    return 1.0 + actuator * math.copysign(1.0, reference.advantage(b, i, t))


@pytest.mark.parametrize(
    ("loss_type", "clips"),
    [
        *itertools.product(["dapo", "grpo"], [{}, ERC, CE_GPPO, ERC | CE_GPPO]),
        *itertools.product(["cispo", "sapo"], [{}, ERC]),
    ],
)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("on_policy", [False, True])
def test_gradients_are_the_formulas(build, clips, loss_type, per_token, on_policy):
    s = replace(BASE, loss_type=loss_type, **clips)
    for seed, actuator in enumerate((0.7, -0.4, 1.0)):
        b, inputs = random_batch(seed, per_token_advantages=per_token)
        if on_policy:
            b.lp_old = b.entropy_old = None
            inputs = {name: value for name, value in inputs.items() if not name.startswith("old_")}
        trainer = build(s, **SETTINGS)
        state = {"entropy": 1.0, "actuator": actuator, "integral": 0.0}
        trainer.active.states["entropic"].load_state_dict(state)
        _, (found, _) = trainer_gradients(trainer, b, inputs)
        expected, _ = gradients(reference.weighted_loss(b, s, partial(weight, b, actuator)), b)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
        plain, _ = gradients(reference.loss(b, s), b)
        assert not torch.allclose(found, plain)


def measured(trainer):
    """The mean entropy of every rollout of a training, by a forward pass of the model over it."""
    means, real = [], trainer.on_rollout

    def spy(output, rewards):
        if trainer.mode == "train":
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            with torch.no_grad():
                logits = trainer.model(input_ids=ids, attention_mask=mask).logits
            logps = torch.log_softmax(logits[:, -output["completion_ids"].shape[1] - 1 : -1].double(), -1)
            means.append(-(logps.exp() * logps).sum(-1)[output["completion_mask"].bool()].mean().item())
        real(output, rewards)

    trainer.on_rollout = spy
    return means


@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_the_loop_in_training_is_the_controller_on_the_rollouts_entropy(
    make_trainer, tiny_dataset, steps_per_generation
):
    trainer = make_trainer(
        **SETTINGS,
        entropic_kp=0.2,
        entropic_ki=0.1,
        steps_per_generation=steps_per_generation,
        max_steps=6,
        learning_rate=1e-2,
        eval_dataset=tiny_dataset.select(range(2)),
        eval_strategy="steps",
        eval_steps=2,
    )
    entropies = measured(trainer)
    trainer.train()
    assert len(entropies) == 6 // steps_per_generation
    actuators, integrals, total = [], [], 0.0
    for entropy in entropies:
        error = entropy - TARGET
        actuators += [min(max(0.2 * error + 0.1 * total, -1.0), 1.0)] * steps_per_generation
        total += error
        integrals += [total] * steps_per_generation
    assert logged(trainer, "entropic/actuator") == pytest.approx(actuators, rel=1e-4)
    assert logged(trainer, "entropic/integral") == pytest.approx(integrals, rel=1e-4)
    assert logged(trainer, "entropic/set_point") == pytest.approx([TARGET] * 6)
    each = [entropy for entropy in entropies for _ in range(steps_per_generation)]
    assert logged(trainer, "entropic/entropy") == pytest.approx(each, rel=1e-4)
    assert logged(trainer, "entropic/error") == pytest.approx([entropy - TARGET for entropy in each], rel=1e-3)
    assert all(0.0 < share < 1.0 for share in logged(trainer, "entropic/weighted_fraction"))
    row = next(control for control in trainer.active.controls if control.prefix == "entropic")
    assert all(logged(trainer, f"entropic/{metric.name}") for metric in row.metrics)
    assert len(logged(trainer, "eval_entropic/actuator")) == 3


def test_one_forward_pass_more_only_where_the_rollout_has_none(make_trainer):
    passes = []
    trainer = make_trainer(**SETTINGS, steps_per_generation=1, max_steps=2)
    real = trainer.rollout_pass
    trainer.rollout_pass = lambda output: passes.append(1) or real(output)
    trainer.train()
    assert len(passes) == 2
    trainer = make_trainer(**SETTINGS, steps_per_generation=2, max_steps=2)
    trainer.rollout_pass = lambda output: pytest.fail("a pass too many")
    trainer.train()


@pytest.mark.parametrize("together", [{}, ALL], ids=["alone", "with-all"])
def test_resumed_equals_uninterrupted(make_trainer, tmp_path, together):
    others = {"erc_low": 0.95, "erc_high": 1.05, "ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0} if together else {}
    settings = {**SETTINGS, **others, "entropic_kp": 0.3, "entropic_ki": 0.2, "learning_rate": 1e-2}
    # the checkpoint is in the middle of the second of three rollouts
    settings |= {"steps_per_generation": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    for key in ("entropic/actuator", "entropic/integral", "entropic/weighted_fraction"):
        assert logged(resumed, key) == logged(whole, key)
        assert len(set(logged(whole, key))) > 1
    assert vars(resumed.active.states["entropic"]) == vars(whole.active.states["entropic"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entropic_target": 0.0}, "entropic_target=0.0 must be a finite number above 0. Published: 0.1"),
        ({"entropic_target": math.nan}, "entropic_target=nan must be a finite number above 0"),
        ({"entropic_target": "0.1"}, "entropic_target='0.1' must be a finite number above 0"),
        ({"entropic_target": True}, "entropic_target=True must be a finite number above 0"),
        ({**SETTINGS, "entropic_kp": -1.0}, "entropic_kp=-1.0 must be finite and at least 0. Published: 1."),
        ({**SETTINGS, "entropic_ki": math.inf}, "entropic_ki=inf must be finite and at least 0. Published: 0.01"),
        ({**SETTINGS, "entropic_kp": 0.0, "entropic_ki": 0.0}, "entropic_kp=0 and entropic_ki=0: nothing would act"),
        ({**SETTINGS, "entropic_probability": 1.5}, r"entropic_probability=1.5 must be in \[0, 1\]"),
        ({**SETTINGS, "entropic_probability": 1.0}, "entropic_probability=1.0 leaves no token"),
        ({**SETTINGS, "entropic_probability": math.nan}, r"entropic_probability=nan must be in \[0, 1\]"),
        ({**SETTINGS, "loss_type": "vespo"}, "entropic_target=0.8.*loss_type='vespo'"),
        ({**SETTINGS, "importance_sampling_level": "sequence"}, "entropic_target=0.8.*Set it to one of token"),
        ({**SETTINGS, "use_adaptive_entropy": True}, "entropic_target=0.8.*use_adaptive_entropy=True.*Set one"),
    ],
)
def test_nonsense_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        EntropyGRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **fields)
