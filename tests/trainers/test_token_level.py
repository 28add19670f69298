"""Rewards and advantages of single tokens: what follows from them, with and without controls and critics."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from tests.conftest import parity_reward
from tests.controls.acting import CASES, ROWS
from tests.processes import on_processes
from tests.trainers.test_grpo import assert_same_weights, trained, weights
from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, entropy_controlled
from trl_entropy.controls import Context
from trl_entropy.trainers.token_level import TokenValues, credited, summed_rewards

LENGTHS = (4, 2, 3, 4)


def numbers(ids: Sequence[int]) -> list[float]:
    """A number per token that a float32 holds exactly."""
    return [(one % 8 - 3) / 8 + place / 16 for place, one in enumerate(ids)]


def dense(name: str) -> Callable[..., Any]:
    """A reward function with `parity_reward` for its rewards, and `numbers` of every completion beside them."""

    def graded(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> dict[str, Any]:
        return {"rewards": parity_reward(completions), name: [numbers(ids) for ids in completion_ids]}

    return graded


def rolled_out(trainer: Any) -> dict[str, Any]:
    trainer.model.train()
    output: dict[str, Any] = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    return output


def by_hand(output: dict[str, Any]) -> Tensor:
    """What `numbers` says of the tokens of a rollout, `(B, T)`."""
    found = torch.zeros(output["completion_ids"].shape)
    for i, (ids, mask) in enumerate(zip(output["completion_ids"], output["completion_mask"], strict=True)):
        row = numbers(ids[: int(mask.sum())].tolist())
        found[i, : len(row)] = torch.tensor(row)
    return found


# --- the formula


def random_rewards() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor(LENGTHS * 2).unsqueeze(1)
    mask[0, 1] = mask[5, 0] = False  # an answer of a tool
    values = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return torch.where(mask, values, 0.0), torch.randn(8, generator=generator, dtype=torch.float64), mask


def reference_credited(rewards: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Token by token, with groups of four."""
    found = torch.zeros_like(rewards)
    totals = [sum(rewards[j, s].item() for s in range(5) if mask[j, s]) for j in range(8)]
    for i in range(8):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        for t in range(5):
            to_go = sum(rewards[i, s].item() for s in range(t, 5) if mask[i, s])
            if mask[i, t]:
                found[i, t] = advantages[i].item() + to_go - sum(totals[j] for j in group) / 4
    return found


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_token_is_credited_with_what_follows_it(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """With four processes every group is spread over two."""
    rewards, advantages, mask = random_rewards()
    share = 8 // processes

    def process(rank: int, gather: Any, sum_over_processes: Any) -> Tensor:
        rows = slice(rank * share, (rank + 1) * share)
        return credited(advantages[rows], rewards[rows], mask[rows], Context(None, gather=gather, group_size=4))

    found = torch.cat(on_processes(monkeypatch, processes, process))
    torch.testing.assert_close(found, reference_credited(rewards, advantages, mask), rtol=1e-12, atol=1e-14)


def test_rewards_of_several_functions_are_weighted_and_masked() -> None:
    ids = [list(range(length)) for length in LENGTHS]
    mask = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)
    mask[0, 1] = False
    first = TokenValues("token_rewards", "f", 0.5, [numbers(one) for one in ids])
    second = TokenValues("token_rewards", "g", 2.0, [None, *([1.0] * len(one) for one in ids[1:])])
    found = summed_rewards([first, second], mask, torch.float64, ids)
    for i in range(4):
        for t in range(5):
            want = 0.5 * numbers(ids[i])[t] + (2.0 if i else 0.0) if mask[i, t] else 0.0
            assert found[i, t].item() == want


# --- through the trainer


@pytest.mark.parametrize("controls", [{}, {"erc_low": 0.95, "erc_high": 1.05}], ids=["none", "erc"])
def test_token_advantages_are_the_advantages(make_trainer: Callable[..., Any], controls: dict[str, float]) -> None:
    output = rolled_out(make_trainer(reward_funcs=dense("token_advantages"), **controls))
    assert torch.equal(output["advantages"], by_hand(output))
    assert output["advantages"].abs().sum() > 0


class ByHandTrainer(GRPOTrainer):
    """Puts the advantages of single tokens into the rollout itself."""

    credit: ClassVar[Callable[..., Tensor]]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        advantages = type(self).credit(by_hand(output), output["advantages"])
        return {**output, "advantages": advantages * output["completion_mask"]}


class WithTokenAdvantages(ByHandTrainer):
    credit = staticmethod(lambda values, advantages: values)


class WithTokenRewards(ByHandTrainer):
    @staticmethod
    def credit(values: Tensor, advantages: Tensor) -> Tensor:
        to_go = values.flip(1).cumsum(1).flip(1)
        baseline = to_go[:, 0].view(-1, 4).mean(1).repeat_interleave(4)
        return advantages.unsqueeze(1) + to_go - baseline.unsqueeze(1)


BY_HAND = {"token_advantages": WithTokenAdvantages, "token_rewards": WithTokenRewards}
ACTING = {"max_steps": 2, "steps_per_generation": 2, "learning_rate": 3e-2, "epsilon": 0.01}
"""With which each control changes the training."""
CONTROLS_AFTER = {
    **{case: fields for case, fields in CASES.items() if case not in ("qae", "asyppo") and "," not in case},
    "coefficient": {**CASES["coefficient"], "target_entropy": 9.0},
}


def control_metrics(trainer: Any, control: str) -> list[dict[str, float]]:
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if key.startswith(f"{control}/")} for entry in entries]


@pytest.fixture(scope="module")
def without_controls() -> dict[str, dict[str, Tensor]]:
    return {}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("control", CONTROLS_AFTER)
def test_every_control_acts_on_them(
    make_trainer: Callable[..., Any], tmp_path: Path, control: str, name: str, without_controls: dict[str, Any]
) -> None:
    """As on the same advantages of a trainer that computes them itself."""
    settings = {**ACTING, **CONTROLS_AFTER[control]}
    found = trained(make_trainer(tmp_path / "found", reward_funcs=dense(name), **settings))
    classes = {"trainer_class": entropy_controlled(BY_HAND[name]), "config_class": EntropyGRPOConfig}
    expected = trained(make_trainer(tmp_path / "expected", **classes, **settings))
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-5, atol=1e-6)
    metrics = control_metrics(found, control)
    assert any(metrics)
    assert metrics == [pytest.approx(entry, rel=1e-4, abs=1e-6) for entry in control_metrics(expected, control)]
    if name not in without_controls:
        plain = trained(make_trainer(tmp_path / "plain", reward_funcs=dense(name), **ACTING))
        without_controls[name] = weights(plain)
    assert any(not torch.equal(value, without_controls[name][key]) for key, value in weights(found).items())


def test_every_control_is_tested_or_refused() -> None:
    assert CONTROLS_AFTER.keys() | {"qae", "asyppo"} == ROWS.keys()


@pytest.mark.parametrize("scale", ["group", "none"])
def test_token_rewards_are_added_to_the_advantages_of_the_group(
    make_trainer: Callable[..., Any], tmp_path: Path, scale: str
) -> None:
    plain = rolled_out(make_trainer(tmp_path / "plain", scale_rewards=scale))
    trainer = make_trainer(tmp_path / "dense", scale_rewards=scale, reward_funcs=dense("token_rewards"))
    output = rolled_out(trainer)
    assert torch.equal(output["completion_ids"], plain["completion_ids"])
    rewards, mask = by_hand(output), output["completion_mask"].bool()
    to_go = rewards.flip(1).cumsum(1).flip(1)
    baseline = to_go[:, 0].view(2, 4).mean(1).repeat_interleave(4)
    want = torch.where(mask, plain["advantages"].unsqueeze(1) + to_go - baseline.unsqueeze(1), 0.0)
    torch.testing.assert_close(output["advantages"], want, rtol=0, atol=1e-6)
    assert trainer._metrics["train"]["token_rewards"] == [pytest.approx(rewards.sum(1).mean().item(), abs=1e-6)]


def test_a_reward_at_the_last_token_is_a_reward_of_the_completion(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    def at_the_end(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> dict[str, Any]:
        rewards = parity_reward(completions)
        rows = [[0.0] * (len(ids) - 1) + [2.0 * one] for ids, one in zip(completion_ids, rewards, strict=True)]
        return {"rewards": rewards, "token_rewards": rows}

    def tripled(completions: list[str], **kwargs: Any) -> list[float]:
        return [3.0 * one for one in parity_reward(completions)]

    outputs = [
        rolled_out(make_trainer(tmp_path / name, scale_rewards="none", reward_funcs=function))
        for name, function in (("tokens", at_the_end), ("whole", tripled))
    ]
    mask = outputs[0]["completion_mask"].bool()
    want = outputs[1]["advantages"].unsqueeze(1).expand_as(mask)[mask]
    torch.testing.assert_close(outputs[0]["advantages"][mask], want, rtol=0, atol=1e-6)
    assert want.abs().max() > 1.0


@pytest.mark.parametrize("name", ["token_rewards", "token_advantages"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_trainer: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    settings = {"steps_per_generation": 2, "num_iterations": 2, "save_strategy": "steps", "save_steps": 3}
    settings |= {"reward_funcs": dense(name), "max_steps": 6, "erc_low": 0.95, "erc_high": 1.05}
    whole = trained(make_trainer(tmp_path / "run", **settings))
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    plain = trained(make_trainer(tmp_path / "plain", **settings | {"reward_funcs": parity_reward}))
    assert any(not torch.equal(value, weights(whole)[key]) for key, value in weights(plain).items())


def test_critics_learn_from_token_rewards(
    make_trainer: Callable[..., Any], tmp_path: Path, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lambda and gamma 1 the critics' targets are what follows each token: the returns."""

    def make(name: str) -> Any:
        return make_trainer(
            tmp_path / name,
            trainer_class=lambda **given: AsyPPOTrainer(critics=tiny_model_path, **given),
            config_class=AsyPPOConfig,
            reward_funcs=dense(name),
            whiten_advantages=False,
            bootstrap_truncated=False,
        )

    trainer = make("token_rewards")
    targets: list[Tensor] = []
    monkeypatch.setattr(trainer, "train_critics", lambda ids, attention, mask, found: targets.append(found) or {})
    output = rolled_out(trainer)
    values = by_hand(output)
    texts = trainer.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
    mask = output["completion_mask"].bool()
    rewards = torch.tensor(parity_reward(texts)).unsqueeze(1)
    want = torch.where(mask, values.flip(1).cumsum(1).flip(1) + rewards, 0.0)
    torch.testing.assert_close(targets[0], want, rtol=0, atol=1e-5)
    assert "token_rewards" not in output
    with pytest.raises(ValueError, match=r"token_advantages of graded: AsyPPO's advantages come from its critics"):
        rolled_out(make("token_advantages"))
