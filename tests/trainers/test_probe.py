"""The probe measures the passes and steps that training makes, and leaves no trace in them."""

from functools import partial
from typing import Any

import pytest
import torch

from tests.conftest import parity_reward
from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.telemetry.rounding import Measurement, Pass
from trl_entropy.trainers.probe import RoundingProbe, alternating_reward, probe_config

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "autocast": {"bf16": True},
    "bfloat16": {"model_init_kwargs": {"dtype": "bfloat16"}},
    "bfloat16 in autocast": {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
}
SHAPE: dict[str, Any] = {
    "num_iterations": 3,
    "max_steps": 3,
    "steps_per_generation": 1,
    "lr_scheduler_type": "constant",
    "max_completion_length": 24,
}


@pytest.fixture
def said() -> list[str]:
    """What the probe says it is doing."""
    return []


@pytest.fixture
def make_probe(make_trainer, said: list[str]):
    """Factory of probes that measure after steps 1 and 3."""

    def make(precision: str = "float32", **overrides: Any) -> RoundingProbe:
        probe = partial(RoundingProbe, measured_steps=(1, 3), progress=said.append)
        return make_trainer(trainer_class=probe, **{**SHAPE, **PRECISIONS[precision], **overrides})

    return make


def same(first: Pass, second: Pass) -> bool:
    return torch.equal(first.logps, second.logps) and torch.equal(first.entropies, second.entropies)


def close(first: Pass, second: Pass, mask: torch.Tensor) -> bool:
    return all(
        torch.allclose(getattr(first, name)[mask], getattr(second, name)[mask], atol=1e-5)
        for name in ("logps", "entropies")
    )


def test_float32_layouts_are_the_same_pass(make_probe) -> None:
    measured = make_probe().measure()
    assert len(measured.layouts) == 3
    assert measured.float32 is not None
    assert same(measured.rollout, measured.float32)
    for name, layout in measured.layouts.items():
        assert close(layout, measured.rollout, measured.mask), name
    # ragged prompts and completions, or the layouts would be nothing new
    assert not measured.mask.all()
    assert measured.advantages.shape == measured.mask.shape
    assert (measured.advantages > 0).any()
    assert (measured.advantages < 0).any()


@pytest.mark.parametrize("precision", list(PRECISIONS)[1:])
def test_float32_pass_is_what_a_float32_model_computes(make_probe, make_trainer, precision: str) -> None:
    """The same weights in a trainer of its own, without autocast, give its numbers to the last bit."""
    probe = make_probe(precision)
    measured = probe.measure()
    assert measured.float32 is not None
    assert not same(measured.rollout, measured.float32)
    rollout, dtypes = probe._rollout, {name: tensor.dtype for name, tensor in probe.model.state_dict().items()}
    weights = {name: tensor.float() for name, tensor in probe.model.state_dict().items()}
    again, in_float32 = probe.pass_after(3), measured.updates[-1].float32
    assert in_float32 is not None
    assert same(again.trained, measured.updates[-1].trained)  # autocast is on again, and the weights are as they were
    assert {name: tensor.dtype for name, tensor in probe.model.state_dict().items()} == dtypes
    reset_accelerate()
    twin = make_trainer(trainer_class=partial(RoundingProbe, measured_steps=()))
    twin.model.load_state_dict(weights)
    assert same(twin.forward_pass(rollout), in_float32)


def reset_accelerate() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_steps_are_those_of_training(make_probe, make_trainer, said: list[str], precision: str) -> None:
    """Measuring changes no bit of the weights that the same configuration trains."""
    probe = make_probe(precision)
    measured = probe.measure()
    assert [update.step for update in measured.updates] == [1, 3]
    assert [what for what in said if "step" in what] == ["after optimizer step 1", "after optimizer step 3"]
    assert not same(measured.updates[0].trained, measured.rollout)
    reset_accelerate()
    trained = make_trainer(trainer_class=EntropyGRPOTrainer, **SHAPE, **PRECISIONS[precision])
    trained.train()
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(weight, probe.model.state_dict()[name]), name


def test_lora_is_measured(make_probe) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    probe = make_probe("autocast", peft_config=adapter, learning_rate=1e-1, disable_dropout=True)
    measured = probe.measure()
    update = measured.updates[-1]
    assert update.float32 is not None
    assert close(measured.layouts["half batches"], measured.rollout, measured.mask)  # no dropout
    assert not close(update.trained, measured.rollout, measured.mask)


def test_without_room_float32_is_left_out(make_probe, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        available = 1000

    monkeypatch.setattr("trl_entropy.trainers.probe.psutil.virtual_memory", Full)
    probe = make_probe("bfloat16")
    measured = probe.measure()
    assert measured.float32 is None
    assert all(update.float32 is None for update in measured.updates)
    assert "GiB are free" in str(probe.float32_is_left_out)
    # weights that are float32 already need none
    assert make_probe()._float32_obstacle() is None


def test_quantised_weights_have_no_float32(make_probe, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = make_probe()
    monkeypatch.setattr(type(probe.model), "is_quantized", True, raising=False)
    assert probe._float32_obstacle() == "the weights are quantised"


def test_rollout_without_a_token_is_refused(make_probe, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = {"completion_mask": torch.zeros(2, 3)}
    monkeypatch.setattr(EntropyGRPOTrainer, "_generate_and_score_completions", lambda self, inputs: empty)
    with pytest.raises(ValueError, match="wrote no token"):
        make_probe().measure()


@pytest.mark.parametrize(
    ("batch_size", "rows", "generations"), [(8, 16, 4), (1, 16, 4), (5, 20, 4), (7, 28, 4), (6, 18, 2)]
)
def test_rollout_has_whole_micro_batches_of_the_runs_size(
    batch_size: int, rows: int, generations: int, tmp_path
) -> None:
    run = EntropyGRPOConfig(
        str(tmp_path), per_device_train_batch_size=batch_size, num_generations=batch_size if batch_size > 1 else 2,
        steps_per_generation=2, use_cpu=True, bf16=False, temperature=0.6, erc_low=0.9, erc_high=1.1, epsilon_high=0.3,
        adam_beta2=0.95, warmup_steps=10, beta=0.1, epo_coef=0.1,
    )  # fmt: skip
    config = probe_config(run, max_steps=4, max_completion_length=5)
    assert config.generation_batch_size == rows
    assert config.num_generations == generations
    assert (config.per_device_train_batch_size, config.temperature, config.adam_beta2) == (batch_size, 0.6, 0.95)
    assert config.epsilon_high == 0.3
    # one optimizer step per pass over the rollout, as many as asked for
    assert config.gradient_accumulation_steps == config.steps_per_generation
    assert config.num_iterations == config.max_steps == 4
    assert (config.warmup_steps, config.beta, config.any_control_enabled) == (0, 0.0, False)


def test_reward_alternates() -> None:
    assert alternating_reward(["a", "b", "c"], prompts=[]) == [0.0, 1.0, 0.0]
    assert parity_reward(["a"]) == [1.0]


def test_measurement_is_plain_data(make_probe) -> None:
    measured = make_probe().measure()
    assert isinstance(measured, Measurement)
    for tensor in (measured.mask, measured.advantages, measured.rollout.logps, measured.rollout.entropies):
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad
