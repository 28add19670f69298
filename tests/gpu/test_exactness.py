"""Gradients on an NVIDIA GPU, in float32 and in bfloat16 autocast, against float64 on a CPU.

Errors are relative to the largest gradient (of the parameters: to the norm of the whole gradient). What the loss does
with log-probs and entropies is float32 arithmetic in either precision, so that `LOSS_TOLERANCE` holds for both; the
pass through the model is compared in float32 only, as bfloat16 rounds it by more than the controls' bounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2 import modeling_qwen2
from transformers.utils import is_liger_kernel_available
from trl import GRPOConfig, GRPOTrainer

from tests import reference
from tests.distributed.gradients_worker import CASES, STEPS_PER_GENERATION, build, local_inputs
from tests.reference import Batch, Settings
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_config, trainer_gradients, trainer_inputs
from tests.trainers.test_exact_gradients import BASE, COMBINATIONS, LEVELS, random_batch
from tests.trainers.test_model_gradients import ALL_CONTROLS, OWN_LAYERS, TEMPERATURE, Observer, TooClose

pytestmark = pytest.mark.gpu

LOSS_TOLERANCE = 1e-5
"""Float32 has a rounding of 6e-8; a ratio of a sequence sums seven of them in its exponent."""
MODEL_TOLERANCE = 1e-4
"""Of the whole pass in float32; one token is about 1 % of the gradient's norm."""
MARGIN = 1e-5
"""From a bound, in ratios: three times what float32 is off by there. By estimate one seed of six has one closer."""
FORWARD = "_get_per_token_logps_and_entropies"


def in_dtype(b: Batch, dtype: torch.dtype, device: str = "cpu") -> Batch:
    """The batch with its numbers in another precision and place; its leaves are leaves again."""
    values = {field.name: getattr(b, field.name) for field in fields(b)}
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    moved = {name: v.to(device, dtype if v.is_floating_point() else v.dtype) for name, v in tensors.items()}
    found = replace(b, **moved)
    found.lp.requires_grad_()
    found.entropy.requires_grad_()
    return found


def largest_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Of several gradients together, relative to the largest one expected."""
    scale = max(want.abs().max().item() for want in expected)
    assert scale > 0
    return max((g.cpu().double() - w).abs().max().item() for g, w in zip(found, expected, strict=True)) / scale


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("controls", COMBINATIONS)
def test_the_loss_is_the_papers(
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    within: Callable[[float, float], None],
    controls: str,
    level: str,
    loss_type: str,
    beta: float,
) -> None:
    """Handmade log-probs and entropies in float32, against `tests/reference.py` on the same numbers in float64."""
    stub_forward(monkeypatch)
    s = replace(BASE, level=level, loss_type=loss_type, beta=beta, **COMBINATIONS[controls])
    trainer = stubbed_trainer(make_trainer, s, use_cpu=device == "cpu")
    single = in_dtype(random_batch(0)[0], torch.float32)
    on_device, expected = in_dtype(single, torch.float32, device), in_dtype(single, torch.float64)
    inputs = {name: value.to(device) for name, value in trainer_inputs(on_device, on_device.mask).items()}
    _, found = trainer_gradients(trainer, on_device, inputs)
    within(largest_error(found, gradients(reference.loss(expected, s), expected)), LOSS_TOLERANCE)


def second_rollout(trainer: Any, critics_said: list[dict[str, Any]] | None = None) -> tuple[Tensor, list[Any]]:
    """Loss of a second rollout, and both rollouts' inputs: what a control remembers of the first enters it.

    Args:
        trainer: Of `build`.
        critics_said: Inputs of another trainer whose advantages and masks are taken in place of this one's.
    """
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.state.max_steps = 8 * STEPS_PER_GENERATION
    wrapped, seen, loss = trainer.accelerator.prepare(trainer.model), [], None
    for index in range(2):
        inputs = local_inputs(trainer)
        if critics_said is not None:
            inputs |= {name: v.cpu() for name, v in critics_said[index].items() if v.is_floating_point() and v.dim()}
            inputs |= {name: v.cpu() for name, v in critics_said[index].items() if v.dtype == torch.bool}
        seen.append(dict(inputs))
        with torch.set_grad_enabled(index == 1):
            loss = trainer.compute_loss(wrapped, inputs)
    return loss, seen


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_every_control_as_in_float64(
    tiny_model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    within: Callable[[float, float], None],
    case: tuple[str, str, str],
    bf16: bool,
) -> None:
    """What a real model's pass returns on the GPU is handed to the same trainer on a CPU, in float64.

    So every control is held to the arithmetic that the other tests hold to the papers; AsyPPO's takes the critics'
    advantages from the GPU.
    """
    passes: list[tuple[Tensor, Tensor | None]] = []
    forward = getattr(GRPOTrainer, FORWARD)

    def recorded(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        returned = forward(self, *args, **kwargs)
        passes.append(returned[:2])
        return returned

    monkeypatch.setattr(GRPOTrainer, FORWARD, recorded)
    trainer = build(tiny_model_path, str(tmp_path / "device"), case, use_cpu=device == "cpu", bf16=bf16)
    loss, seen = second_rollout(trainer)
    assert hasattr(trainer.model, "_original_forward") is bf16  # accelerate's autocast around it
    leaves = [value for value in passes[-1] if value is not None]
    found = gradients_of(loss, leaves)

    replayed = [[v if v is None else v.detach().cpu().double().requires_grad_() for v in each] for each in passes]
    order = iter(replayed)
    monkeypatch.setattr(GRPOTrainer, FORWARD, lambda *args, **kwargs: (*next(order), None))
    exact = build(tiny_model_path, str(tmp_path / "exact"), case)
    loss, _ = second_rollout(exact, seen if case[0].startswith("asyppo") else None)
    expected = gradients_of(loss, [value for value in replayed[-1] if value is not None])
    assert next(order, None) is None
    within(largest_error(found, expected), LOSS_TOLERANCE)


def gradients_of(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return tuple(torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True))


@pytest.mark.parametrize("use_liger_kernel", [False, True], ids=["plain", "liger"])
@pytest.mark.parametrize(("level", "loss_type"), [("token", "dapo"), ("sequence", "grpo")])
def test_every_step_of_one_rollout(
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    within: Callable[[float, float], None],
    level: str,
    loss_type: str,
    use_liger_kernel: bool,
) -> None:
    """Parameter gradients in training, float32, against the papers' losses on a float64 copy of the policy."""
    if use_liger_kernel and (not is_liger_kernel_available() or hasattr(GRPOTrainer, "compute_liger_loss")):
        pytest.skip("needs Liger, and a TRL whose loss it leaves alone")
    assert not torch.backends.cuda.matmul.allow_tf32
    s = Settings(level=level, loss_type=loss_type, **ALL_CONTROLS)  # type: ignore[arg-type]
    for name, layer in OWN_LAYERS.items():  # after the test, what Liger replaces is back
        monkeypatch.setattr(modeling_qwen2, name, layer)
    for seed in range(42, 47):
        trainer = make_trainer(
            tmp_path / str(seed),
            **trainer_config(s),
            use_cpu=device == "cpu",
            use_liger_kernel=use_liger_kernel,
            temperature=TEMPERATURE,
            num_iterations=2,
            max_steps=4,
            learning_rate=0.02,
            per_device_train_batch_size=12,
            seed=seed,
        )
        observer = Observer(trainer, s, MARGIN)
        try:
            trainer.train()
        except TooClose:
            continue
        assert len(observer.gradient_errors) == 8
        within(max(observer.gradient_errors), MODEL_TOLERANCE)
        return
    pytest.fail("every seed has a token that is too close to a bound")


@pytest.fixture
def fixed_order() -> Iterator[None]:
    """Sums in a fixed order, where CUDA has one (with `CUBLAS_WORKSPACE_CONFIG`, which `run.py` sets)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fixed_order")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_without_a_control_training_is_trls(
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    device: str,
    within: Callable[[float, float], None],
    bf16: bool,
) -> None:
    """As far apart as two runs of TRL's own trainer are, which is 0 where its kernels add in a fixed order."""

    def weights(name: str, **classes: type) -> Tensor:
        trainer = make_trainer(tmp_path / name, use_cpu=device == "cpu", bf16=bf16, **classes)
        trainer.train()
        return torch.cat([parameter.detach().float().cpu().flatten() for parameter in trainer.model.parameters()])

    theirs: dict[str, Any] = {"trainer_class": GRPOTrainer, "config_class": GRPOConfig}
    first, again, own = weights("first", **theirs), weights("again", **theirs), weights("own")
    within((own - first).abs().max().item(), (again - first).abs().max().item())
