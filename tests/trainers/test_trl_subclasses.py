"""The controls for the subclasses that TRL has of its own trainer."""

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import trl

from tests import reference
from tests.reference import Settings
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients
from tests.trainers.test_exact_gradients import BASE, CE_GPPO, NLL, check, random_batch
from tests.trainers.test_grpo import assert_same_weights, trained, weights
from tests.trainers.test_subclasses import LEVELS, S
from trl_entropy import entropy_controlled
from trl_entropy.trainers.controlled import config_of

SHIPPED = {
    "GMPOTrainer": "trl.experimental.gmpo",
    "GRPOTrainer": "trl.experimental.gspo_token.grpo_trainer",
    "GRPOWithReplayBufferTrainer": "trl.experimental.grpo_with_replay_buffer",
    "MiniLLMTrainer": "trl.experimental.minillm",
}
"""By name; not every release has each."""


def shipped(name: str) -> Any:
    if find_spec(SHIPPED[name].removesuffix(".grpo_trainer")) is None:
        pytest.skip(f"TRL {trl.__version__} has no {name}")
    return getattr(import_module(SHIPPED[name]), name)


def test_no_subclass_of_trl_is_left_out() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(inspect.getfile(trl)).parent.rglob("*.py")]
    found = {
        name for source in sources for name in re.findall(r"(?m)^class (\w+)\((?:\w+, *)*_?GRPOTrainer\)", source)
    }
    assert found
    assert found <= set(SHIPPED)


def of_trl(make_trainer: Callable[..., Any], cls: Any, model_path: str) -> Callable[..., Any]:
    """A factory of trainers of one of these classes, or of what is made of it."""

    def construct(**given: Any) -> Any:
        return cls(**given, **({"teacher_model": model_path} if "MiniLLM" in cls.__name__ else {}))

    return partial(
        make_trainer, trainer_class=construct, config_class=getattr(cls, "config_class", None) or config_of(cls)
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_no_control_is_bit_for_bit_trl_s_subclass(
    make_trainer: Callable[..., Any], tmp_path: Path, tiny_model_path: str, name: str
) -> None:
    base = shipped(name)
    for level in ("token", "sequence_token") if name == "GRPOTrainer" else ("token",):
        settings = {"max_steps": 3, "importance_sampling_level": level, "loss_type": "grpo", "steps_per_generation": 2}
        ours = of_trl(make_trainer, entropy_controlled(base), tiny_model_path)(tmp_path / "ours", **settings)
        trained(ours)
        theirs = of_trl(make_trainer, base, tiny_model_path)(tmp_path / "own", **settings)
        start = weights(theirs)
        assert_same_weights(weights(ours), weights(trained(theirs)))
        assert any(not torch.equal(start[key], value) for key, value in weights(theirs).items())


@pytest.fixture
def build_shipped(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tiny_model_path: str
) -> Callable[..., Any]:
    """`build_shipped(name, settings)`: a controlled trainer of TRL's subclass on top of the stubbed forward pass."""
    stub_forward(monkeypatch)

    def built(name: str, s: Settings, **overrides: Any) -> Any:
        cls = entropy_controlled(shipped(name))
        return stubbed_trainer(of_trl(make_trainer, cls, tiny_model_path), s, **overrides)

    return built


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_gspo_token_with_controls(build_shipped: Callable[..., Any], level: str, loss_type: str) -> None:
    s = replace(S, level=level, loss_type=loss_type)
    check(build_shipped("GRPOTrainer", s), s, *random_batch(1))
    with pytest.raises(ValueError, match=r"cannot be used with importance_sampling_level='sequence_token', which no"):
        build_shipped("GRPOTrainer", replace(s, level="sequence_token"))


@pytest.mark.parametrize("level", LEVELS)
def test_minillm_with_controls(build_shipped: Callable[..., Any], level: str) -> None:
    """The controls act on the sum of the group's advantage and that of the reverse KL divergence, per token."""
    s = replace(S, level=level)
    b, inputs = random_batch(1)
    plain = build_shipped("MiniLLMTrainer", s, rkl_advantage=False, single_step_decomposition=False)
    check(plain, s, b, inputs)
    trainer = build_shipped("MiniLLMTrainer", s, single_step_decomposition=False)
    per_token = torch.linspace(-1.0, 1.0, 56, dtype=torch.float64).view(8, 7)
    trainer._compute_advantage = lambda **given: per_token
    check(trainer, s, replace(b, advantages=b.advantages.unsqueeze(1) + per_token), inputs)


def test_gmpo_with_controls_that_leave_its_loss_alone(build_shipped: Callable[..., Any]) -> None:
    b, inputs = random_batch(1)
    s = replace(BASE, **NLL)
    _, (plain, _) = trainer_gradients(build_shipped("GMPOTrainer", BASE), b, inputs)
    _, (found, _) = trainer_gradients(build_shipped("GMPOTrainer", s), b, inputs)
    want, _ = gradients(s.nll_coef * reference.positive_nll(b, s), b)
    assert plain.abs().max() > 0.0
    torch.testing.assert_close(found - plain, want, rtol=1e-10, atol=1e-14)


def test_gmpo_learns_from_the_advantages_of_a_control(
    make_trainer: Callable[..., Any], tmp_path: Path, tiny_model_path: str
) -> None:
    make = of_trl(make_trainer, entropy_controlled(shipped("GMPOTrainer")), tiny_model_path)
    plain, controlled = trained(make(tmp_path / "plain")), trained(make(tmp_path / "qae", qae_quantile=0.4))
    assert any(not torch.equal(value, weights(controlled)[name]) for name, value in weights(plain).items())


def test_a_replay_buffer_with_a_control_that_needs_no_rollout(build_shipped: Callable[..., Any]) -> None:
    s = replace(BASE, **CE_GPPO)
    check(build_shipped("GRPOWithReplayBufferTrainer", s), s, *random_batch(1))


@pytest.mark.parametrize("name", ["GMPOTrainer", "GRPOWithReplayBufferTrainer"])
@pytest.mark.parametrize("field", ["token_rewards", "token_advantages"])
def test_what_functions_say_of_tokens_has_no_place_there(
    make_trainer: Callable[..., Any], tiny_model_path: str, name: str, field: str
) -> None:
    def graded(completion_ids: list[list[int]], **kwargs: Any) -> dict[str, Any]:
        # TRL's replay buffer needs groups whose rewards differ
        rewards = [float(index % 2) for index in range(len(completion_ids))]
        return {"rewards": rewards, field: [[0.0] * len(ids) for ids in completion_ids]}

    trainer = of_trl(make_trainer, entropy_controlled(shipped(name)), tiny_model_path)(reward_funcs=graded)
    with pytest.raises(ValueError, match=rf"^{field} of graded cannot be used with {name}, wh"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("GMPOTrainer", {"erc_low": 0.95, "erc_high": 1.05}, r"erc_low=0\.95.* GMPOTrainer, whose loss takes one adv"),
        ("GMPOTrainer", {"target_entropy": 0.3, "target_entropy_by": "coefficient"}, r"target_entropy=0\.3.*GMPOTrai"),
        ("GRPOWithReplayBufferTrainer", {"positive_nll_coef": 0.1}, r"positive_nll_coef=0\.1.*, which puts completio"),
        ("GRPOWithReplayBufferTrainer", {"record_tokens": 8}, r"record_tokens=8 cannot be used with GRPOWithReplayBu"),
    ],
)
def test_what_a_subclass_of_trl_leaves_no_place_for_is_refused(
    make_trainer: Callable[..., Any], tiny_model_path: str, name: str, settings: dict[str, Any], said: str
) -> None:
    make = of_trl(make_trainer, entropy_controlled(shipped(name)), tiny_model_path)
    with pytest.raises(ValueError, match=said):
        make(model="no-such/model", **settings)
