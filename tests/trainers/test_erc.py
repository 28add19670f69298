"""ERC beyond its paper, through the real trainer: the gate of one side, and bounds that keep a share clipped."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients
from tests.trainers.test_exact_gradients import BASE, random_batch
from tests.trainers.test_grpo import logged, weights

BOUNDS = (0.9, 1.3)
TARGET: dict[str, Any] = {"erc_low": 0.95, "erc_high": 1.05, "erc_target_fraction": 0.5, "learning_rate": 1e-2}


def outward_loss(b: reference.Batch, s: reference.Settings) -> Tensor:
    """The reference's loss without the tokens whose own step would take their entropy further out."""
    kept = b.mask.clone()
    for i, t in reference.valid_tokens(b):
        new, old = b.entropy[i, t].item(), b.entropy_old[i, t].item()
        rho = (new + 1e-8) / (old + 1e-8) if max(new, old) >= 1e-8 else 1.0
        change = -reference.advantage(b, i, t) * (b.lp[i, t].item() + new)  # of the entropy, to first order
        if (rho <= BOUNDS[0] and change < 0) or (rho >= BOUNDS[1] and change > 0):
            kept[i, t] = 0
    advantages = b.advantages if b.advantages.dim() == 2 else b.advantages.unsqueeze(1).expand_as(b.lp)
    return reference.loss(replace(b, advantages=advantages * kept), replace(s, erc=None))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("alphas", [None, (0.75, 1.1)], ids=["erc", "erc+ce_gppo"])
def test_outward_gate(make_trainer: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str, alphas: Any) -> None:
    stub_forward(monkeypatch)
    s = replace(BASE, loss_type=loss_type, alphas=alphas, erc=BOUNDS)
    trainer = stubbed_trainer(make_trainer, s, erc_side="outward")
    both = stubbed_trainer(make_trainer, s)
    for seed in range(2):
        b, inputs = random_batch(seed)
        want = gradients(outward_loss(b, s), b)[0]
        _, (found, _) = trainer_gradients(trainer, b, inputs)
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-15)
        _, (published, _) = trainer_gradients(both, b, inputs)
        assert 5 <= ((found != 0) & (published == 0)).sum() < (found != 0).sum()


@pytest.mark.parametrize("rate", [3e-3, 1e-2])
def test_share_stays_at_the_target_whatever_the_rate(make_trainer: Any, rate: float) -> None:
    schedule = {"learning_rate": rate, "lr_scheduler_type": "constant", "steps_per_generation": 4, "max_steps": 64}
    shares = {}
    for target in (None, 0.3):
        trainer = make_trainer(**{**TARGET, **schedule, "erc_target_fraction": target})
        trainer.train()
        shares[target] = torch.tensor(logged(trainer, "erc/clip_fraction"))[-32:].mean().item()
    assert shares[0.3] == pytest.approx(0.3, abs=0.06)
    assert shares[None] < 0.2 if rate < 1e-2 else shares[None] > 0.35
    low, high = logged(trainer, "erc/bound_low"), logged(trainer, "erc/bound_high")
    assert (low[0], high[0]) == pytest.approx((0.95, 1.05))
    assert math.log(low[-1]) / math.log(0.95) == pytest.approx(math.log(high[-1]) / math.log(1.05), rel=1e-3)


@pytest.mark.parametrize("at", [4, 6], ids=["between rollouts", "in the middle of a rollout"])
def test_resumed_bounds_are_those_of_an_uninterrupted_run(make_trainer: Any, tmp_path: Any, at: int) -> None:
    settings = {**TARGET, "steps_per_generation": 4, "save_strategy": "steps", "save_steps": at}
    whole = make_trainer(tmp_path / "run", **settings, max_steps=12)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **settings, max_steps=12)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{at}"))
    assert resumed.active.states["erc"].log_power == whole.active.states["erc"].log_power != 0.0
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_evaluation_does_not_move_the_bounds(make_trainer: Any) -> None:
    trainer = make_trainer(**TARGET, max_steps=1)
    trainer.train()
    before = trainer.active.states["erc"].state_dict()
    trainer.evaluate(trainer.train_dataset.select(range(4)))
    after = trainer.active.states["erc"].state_dict()
    assert before["log_power"] == after["log_power"]
    assert torch.equal(before["running"], after["running"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"erc_target_fraction": 0.2}, "erc_target_fraction=0.2 moves erc_low and erc_high, which are not set"),
        ({**TARGET, "erc_target_fraction": 1.0}, r"erc_target_fraction=1.0 must be in \(0, 1\)"),
        ({**TARGET, "erc_target_fraction": math.nan}, r"erc_target_fraction=nan must be in \(0, 1\)"),
        ({**TARGET, "erc_low": 0.0}, "erc_low=0 cannot be moved"),
        ({"erc_side": "inward"}, "erc_side='inward' is unknown. Choose one of both, outward"),
    ],
)
def test_nonsense_is_refused(make_trainer: Any, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**fields)
