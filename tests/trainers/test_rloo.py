"""RLOO with the controls of advantages and those that add to the loss."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from torch import Tensor
from trl import RLOOConfig, RLOOTrainer

from tests.reference import Batch, valid_tokens
from tests.trainers.test_exact_gradients import random_batch
from tests.trainers.test_grpo import assert_same_weights, logged, trained, weights
from trl_entropy import EntropyRLOOConfig, EntropyRLOOTrainer, entropy_controlled
from trl_entropy.controls import CONTROLS
from trl_entropy.trainers import rloo

OURS = {"trainer_class": EntropyRLOOTrainer, "config_class": EntropyRLOOConfig}
WITH_EPO = Version(trl.__version__) >= Version(rloo.ENTROPIES_WITH_GRADIENTS)
CONTROLLED: dict[str, Any] = {"qae_quantile": 0.4, "positive_nll_coef": 0.1, **({"epo_coef": 0.1} if WITH_EPO else {})}
WINDOW, STEPS = 2, 4  # micro-batches of an optimizer step, of a rollout


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_no_control_is_bit_for_bit_trl(make_trainer: Callable[..., Any], tmp_path: Path, num_iterations: int) -> None:
    settings = {"max_steps": 3, "num_iterations": num_iterations, "steps_per_generation": 2}
    ours = trained(make_trainer(tmp_path / "ours", **OURS, **settings))
    trls = make_trainer(tmp_path / "trl", trainer_class=RLOOTrainer, config_class=RLOOConfig, **settings)
    start = weights(trls)
    assert_same_weights(weights(ours), weights(trained(trls)))
    assert any(not torch.equal(start[name], value) for name, value in weights(trls).items())


def test_controls_train_log_and_resume_exactly(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    settings = {**OURS, **CONTROLLED, "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    whole = trained(make_trainer(tmp_path / "run", **settings))
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    for key in ("positive_nll/loss", "qae/zero_fraction", *(["epo/beta"] if WITH_EPO else [])):
        assert logged(whole, key), key
    card = tmp_path / "run" / "README.md"
    assert "2509.22611" in card.read_text(encoding="utf-8")
    plain = trained(make_trainer(tmp_path / "plain", **OURS, max_steps=5))
    assert any(not torch.equal(value, weights(whole)[name]) for name, value in weights(plain).items())


def reference_loss(b: Batch, nll: float = 0.0, epo: float = 0.0) -> Tensor:
    """RLOO with what is added, as it is before transformers divides by the micro-batches of a step."""
    assert b.lp_old is not None
    assert b.rewards is not None
    rows = []
    for i in range(len(b.lp)):
        log_ratio = sum(b.lp[i, t] - b.lp_old[i, t] for j, t in valid_tokens(b) if j == i)
        r, a = log_ratio.exp(), b.advantages[i].item()
        rows.append(-torch.minimum(r * a, r.clamp(0.8, 1.28) * a))
    loss = torch.stack(rows).mean()
    correct = [(i, t) for i, t in valid_tokens(b) if b.rewards[i] >= 1.0]
    # a mean over the rollout: of its share in this step, and of this micro-batch's share in that
    loss = loss - nll * sum(b.lp[i, t] for i, t in correct) / (b.num_correct_tokens / STEPS)
    entropies = [[b.entropy[i, t] for j, t in valid_tokens(b) if j == i] for i in range(len(b.lp))]
    return loss - epo * sum(sum(row) / len(row) for row in entropies) / (40.0 / STEPS)


@pytest.mark.parametrize("controls", ["none", "nll", "epo", "nll+epo"])
def test_gradients(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, controls: str) -> None:
    """EPO at the first rollout, where there is no history to smooth towards."""
    nll, epo = (0.3 if "nll" in controls else 0.0), (0.2 if "epo" in controls else 0.0)
    if epo and not WITH_EPO:
        pytest.skip("the entropies have no graph")
    b, inputs = random_batch(1)
    assert b.lp_old is not None
    b.lp_old = b.lp.detach() + (b.lp_old - b.lp.detach()) / 7
    inputs = {
        name: value for name, value in inputs.items() if name not in ("old_per_token_logps", "num_items_in_batch")
    }
    inputs |= {"old_logps": (b.lp_old * b.mask).sum(1), "num_trajectories": torch.tensor(40)}

    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None]:
        return b.lp, b.entropy, None

    monkeypatch.setattr(RLOOTrainer, "_get_per_token_logps_and_entropies", forward)
    trainer = make_trainer(
        **OURS,
        positive_nll_coef=nll,
        epo_coef=epo,
        epsilon=0.2,
        epsilon_high=0.28,
        gradient_accumulation_steps=WINDOW,
        steps_per_generation=STEPS,
    )
    trainer.current_gradient_accumulation_steps = WINDOW
    trainer.model.train()
    expected = torch.autograd.grad(reference_loss(b, nll, epo), (b.lp, b.entropy), allow_unused=True)
    found = torch.autograd.grad(trainer.compute_loss(trainer.model, inputs), (b.lp, b.entropy), allow_unused=True)
    for got, want in zip(found, expected, strict=True):
        if want is None or not want.any():
            assert got is None or not got.any()
            continue
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_an_infinite_ratio_beside_an_added_loss(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a completion whose advantage is 0, which would make the loss NaN; the others are as they are without it."""
    b, inputs = random_batch(1)
    b.lp, b.entropy = (one.detach().float().requires_grad_() for one in (b.lp, b.entropy))

    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None]:
        return b.lp, b.entropy, None

    monkeypatch.setattr(RLOOTrainer, "_get_per_token_logps_and_entropies", forward)
    trainer = make_trainer(**OURS, positive_nll_coef=0.3)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    near = (b.lp * b.mask).sum(1).detach() - 0.1
    advantages = b.advantages.float().index_fill(0, torch.tensor([2]), 0.0)
    found = []
    for old in (near, near.index_add(0, torch.tensor([2]), torch.tensor([-100.0]))):
        given = inputs | {"advantages": advantages, "old_logps": old, "num_trajectories": torch.tensor(8)}
        loss = trainer.compute_loss(trainer.model, given)
        found.append(torch.autograd.grad(loss, b.lp)[0])
    assert torch.equal(found[0], found[1])
    assert bool(found[0].isfinite().all())
    assert found[0][2].any() == bool(b.rewards[2] >= 1.0)  # type: ignore[index]


def test_qae_takes_the_quantile_of_rloo_s_advantages(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """Rewards of 0 and 1 in groups of four: `4/3 (R - Q)`, and Q is 0 iff the mean reward is at most 0.6.

    Without RLOO's KL penalty, which is part of the rewards.
    """
    outputs = []
    for name, controls in (("plain", {}), ("qae", {"qae_quantile": 0.4})):
        trainer = make_trainer(tmp_path / name, **OURS, **controls, beta=0.0)
        trainer.model.train()
        outputs.append(
            trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])["advantages"]
        )
    plain, found = (one.view(2, 4) for one in outputs)
    rewards = (plain > 0).float()  # in a group in which they differ
    differ = plain.abs().sum(1) > 0
    baseline = (rewards.mean(1, keepdim=True) > 0.6).float()
    torch.testing.assert_close(found[differ], (4 / 3 * (rewards - baseline))[differ], rtol=1e-5, atol=1e-6)
    assert differ.any()


class ScaledTrainer(RLOOTrainer):
    """Doubles RLOO's loss."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return 2.0 * super()._compute_loss(model, {**inputs})


def test_a_subclass_has_the_controls_too(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    assert entropy_controlled(RLOOTrainer) is EntropyRLOOTrainer
    cls = entropy_controlled(ScaledTrainer)
    assert cls.config_class is EntropyRLOOConfig
    assert pickle.loads(pickle.dumps(cls)) is cls
    ours = {"trainer_class": cls, "config_class": cls.config_class}
    plain = trained(make_trainer(tmp_path / "off", **ours, max_steps=2))
    base = make_trainer(tmp_path / "own", trainer_class=ScaledTrainer, config_class=RLOOConfig, max_steps=2)
    assert_same_weights(weights(plain), weights(trained(base)))
    controlled = trained(make_trainer(tmp_path / "on", **ours, max_steps=2, positive_nll_coef=0.5))
    assert any(not torch.equal(value, weights(controlled)[name]) for name, value in weights(plain).items())
    with pytest.raises(TypeError, match=r"config_class=GRPOConfig is not a subclass of trl\.RLOOConfig"):
        entropy_controlled(ScaledTrainer, config_class=trl.GRPOConfig)


def test_its_controls_shape_no_token() -> None:
    known = {control.prefix: control for control in CONTROLS if control.known_to(EntropyRLOOConfig)}
    assert set(known) == {"qae", "epo", "positive_nll"}
    assert all(control.shape is None for control in known.values())


def test_what_rloo_has_no_place_for_is_refused(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def graded(completion_ids: list[list[int]], **kwargs: Any) -> dict[str, Any]:
        return {"rewards": [0.0] * len(completion_ids), "token_rewards": [[0.0] * len(ids) for ids in completion_ids]}

    with pytest.raises(ValueError, match=r"token_rewards of graded: RLOO's loss takes one advantage per completion"):
        make_trainer(**OURS, reward_funcs=graded).train()
    with pytest.raises(TypeError, match="erc_low"):
        make_trainer(**OURS, erc_low=0.95, erc_high=1.05)
    monkeypatch.setattr(trl, "__version__", "1.14.2")
    with pytest.raises(ValueError, match=r"epo_coef=0\.1 needs the gradients of entropies, which RLOOTrainer of TRL"):
        make_trainer(**OURS, epo_coef=0.1)
