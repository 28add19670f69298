"""`trl-entropy train` with vLLM and no GPU: on the CPU build vLLM samples from the policy that is trained."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl.generation import vllm_generation

from trl_entropy import vllm_on_cpu
from trl_entropy.commands import train
from trl_entropy.vllm_on_cpu import PACKING, start_engine, trainable_engines

from . import cpu_engine

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]


def arguments(model: str, folder: Path) -> list[str]:
    """Three rollouts, each after a large update."""
    rows = [{"prompt": f"{i}+{7 * i % 10}="[: 1 + i % 4]} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    fields = {
        "model_name_or_path": model,
        "dataset_name": folder / "rows.jsonl",
        "reward_funcs": "tests.conftest.parity_reward",
        "output_dir": folder / "run",
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "max_steps": 6,
        "max_completion_length": 6,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "use_cpu": "true",
        "bf16": "false",
        "save_strategy": "no",
        "report_to": "none",
        **cpu_engine.ENGINE,
    }
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def test_the_command_trains_with_vllm_in_its_process(tiny_model_path: str, tmp_path: Path) -> None:
    cpu_engine.require()
    command = [sys.executable, "-m", "trl_entropy.commands.train", *arguments(tiny_model_path, tmp_path)]
    environment = {**os.environ, **cpu_engine.VLLM_SETTINGS, "PYTHONPATH": str(ROOT)}
    for name in cpu_engine.LAUNCHER_VARIABLES:
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    state = json.loads((tmp_path / "run/trainer_state.json").read_text(encoding="utf-8"))
    key = "sampling/sampling_logp_difference/mean"
    differences = [entry[key] for entry in state["log_history"] if key in entry]
    assert len(differences) >= 3
    assert max(differences) < 1e-5  # of weights that are two updates old: above 1e-2


def test_without_a_device_the_command_refuses_at_once(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platforms = pytest.importorskip("vllm.platforms")
    monkeypatch.setattr(platforms, "_current_platform", platforms.interface.UnspecifiedPlatform())
    with pytest.raises(SystemExit, match=r"error: use_vllm=True: .* finds no GPU.*Set use_vllm=False\.$"):
        train.main(arguments(tiny_model_path, tmp_path))


def test_an_engine_that_packs_its_weights_is_refused() -> None:
    cpu_engine.require()
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
    executor = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
    engine = SimpleNamespace(llm_engine=executor, generate=len)
    for layer, linear in zip(model, (torch.nn.functional.linear, len), strict=True):
        layer.cpu_linear = linear
    with pytest.raises(RuntimeError, match="weights of its own making"):
        start_engine(lambda **settings: engine)
    del model[0].cpu_linear, model[1].cpu_linear
    with pytest.raises(RuntimeError, match="weights of its own making"):
        start_engine(lambda **settings: engine)
    model[0].cpu_linear = torch.nn.functional.linear
    assert start_engine(lambda **settings: engine) is engine


@pytest.mark.parametrize(("module", "name"), [(PACKING[0], "gone"), ("vllm.gone", PACKING[1])])
def test_a_function_that_is_gone_is_named(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_engine.require()
    monkeypatch.setattr(vllm_on_cpu, "PACKING", (module, name))
    with pytest.raises(
        RuntimeError, match=rf"vLLM \d.* weights: {module}\.{name} is not there\. Set use_vllm=False, "
    ):
        start_engine(lambda **settings: pytest.fail("started"))


def test_an_engine_of_another_shape_is_refused() -> None:
    cpu_engine.require()
    with pytest.raises(RuntimeError, match=r"vLLM \d.* weights: LLM\.llm_engine\..*\.model is not there\. Set use_"):
        start_engine(lambda **settings: SimpleNamespace(llm_engine=SimpleNamespace(), generate=len))


def test_outside_the_context_trl_starts_its_own_engine() -> None:
    cpu_engine.require()
    before = vllm_generation.LLM
    with trainable_engines():
        assert isinstance(vllm_generation.LLM, partial)
        assert vllm_generation.LLM.func is start_engine
    assert vllm_generation.LLM is before
