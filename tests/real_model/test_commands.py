"""`trl-entropy train` and `report` on the pretrained model: killed and resumed, recorded, and shown."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.children import kill_when
from trl_entropy.commands import report, train
from trl_entropy.telemetry.record import TokenRecord, read_record
from trl_entropy.trainers.resume import last_complete_checkpoint

from .conftest import SCHEDULE

pytestmark = pytest.mark.real_model

FIELDS: dict[str, Any] = {
    **SCHEDULE,
    "dataset_name": "rows.jsonl",
    "reward_funcs": "tests.real_model.test_commands.first_character_reward",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_steps": 1,
    "record_tokens": 12,
    "erc_low": 0.95,
    "erc_high": 1.05,
    "ce_gppo_alpha1": 0.75,
    "ce_gppo_alpha2": 1.0,
    "epo_coef": 0.01,
    "positive_nll_coef": 0.1,
}
LORA_FIELDS = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
KINDS: dict[str, dict[str, Any]] = {
    "full-float32": {"learning_rate": 2e-5, "bf16": False, "dtype": "float32"},
    "lora-bfloat16": {"learning_rate": 2e-3, "bf16": True, "dtype": "bfloat16", **LORA_FIELDS},
}
WEIGHTS = {"full-float32": "model.safetensors", "lora-bfloat16": "adapter_model.safetensors"}
CLOSE = {"full-float32": 1e-4, "lora-bfloat16": 0.4}
"""Nats between the record and what is recomputed without padding; neighbouring bfloat16 logits are 0.06 apart."""


def first_character_reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """1.0 where the first character of the answer has an odd code point."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(ord(text[0]) % 2) if text else 0.0 for text in texts]


class Trained(NamedTuple):
    """A finished run of the command, and the recipe it was started with."""

    kind: str
    run: Path
    recipe: Path


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    questions = [f"Is {7 * i} odd? Yes or no?" for i in range(16)]
    rows = [{"prompt": [{"role": "system", "content": ""}, {"role": "user", "content": q}]} for q in questions]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    fields = {**FIELDS, "model_name_or_path": tiny_model_path, "dataset_name": str(folder / "rows.jsonl")}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**fields, **KINDS[request.param]}), encoding="utf-8")
    # Without the optimizer's state in its checkpoints, which is two thirds of them, and which no test reads.
    train.main(["--config", str(recipe), "--output_dir", str(folder / "whole"), "--save_only_model", "true"])
    return Trained(request.param, folder / "whole", recipe)


def log_history(run: Path) -> list[dict[str, float]]:
    return json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def kill_after_the_first_checkpoint(recipe: Path, run: Path) -> None:
    command = ["-m", "trl_entropy.commands.train", "--config", str(recipe), "--output_dir", str(run)]
    kill_when(lambda: last_complete_checkpoint(str(run)), command, OMP_NUM_THREADS=str(torch.get_num_threads()))
    assert not list(run.glob("*.safetensors"))


def test_killed_and_resumed_it_ends_as_if_it_had_not_been(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    kill_after_the_first_checkpoint(trained.recipe, run)
    before = log_history(run / "checkpoint-1")
    options = ["--output_dir", str(run), "--resume_from_checkpoint", "auto", "--save_total_limit", "1"]
    train.main(["--config", str(trained.recipe), *options])
    after = log_history(run)
    assert after[: len(before)] == before  # its step time too: that step was not taken again
    assert [entry["step"] for entry in after if "loss" in entry] == [1, 2, 3]
    whole, resumed = (load_file(folder / WEIGHTS[trained.kind]) for folder in (trained.run, run))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert recorded_rows(run) == recorded_rows(trained.run)


def recorded_rows(run: Path) -> list[str]:
    """In an order that does not depend on which file a row is in."""
    record = read_record(run)
    assert record is not None
    return sorted(map(str, record.table.to_pylist()))


def policy_at(trained: Trained, step: int, start: str) -> torch.nn.Module:
    """The policy after so many steps, in the precision that it trained in."""
    checkpoint, dtype = trained.run / f"checkpoint-{step}", KINDS[trained.kind]["dtype"]
    with_adapter = "use_peft" in KINDS[trained.kind]
    policy = AutoModelForCausalLM.from_pretrained(checkpoint if step and not with_adapter else start, dtype=dtype)
    return PeftModel.from_pretrained(policy, checkpoint) if step and with_adapter else policy


def recomputed(policy: torch.nn.Module, prompt: list[int], completion: list[int]) -> dict[str, Any]:
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
    logps = torch.log_softmax(logits, dim=-1)
    chosen = logps.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
    return {"lp": chosen.numpy(), "H": -(logps.exp() * logps).sum(1).numpy()}


def test_the_record_is_what_the_checkpoints_say(trained: Trained, tiny_model_path: str) -> None:
    """Completions at the second step of the first rollout: of the start, updated once."""
    record, tolerance = read_record(trained.run), CLOSE[trained.kind]
    assert record is not None
    assert len(record.sampled.table) == 3 * 12
    at_step = record.whole.where(record.whole.column("step") == 2)
    policies = {"": policy_at(trained, 1, tiny_model_path), "_old": policy_at(trained, 0, tiny_model_path)}
    for index in sorted(set(at_step.column("completion").tolist())):
        tokens = at_step.where(at_step.column("completion") == index)
        check_completion(tokens, policies, tolerance)


def check_completion(tokens: TokenRecord, policies: dict[str, torch.nn.Module], tolerance: float) -> None:
    completion = tokens.where(tokens.column("position") >= 0)
    prompt = tokens.where(tokens.column("position") < 0).column("token_id").astype(int).tolist()
    ids = completion.column("token_id").astype(int).tolist()
    for suffix, policy in policies.items():
        for name, expected in recomputed(policy, prompt, ids).items():
            print(name, suffix, np.abs(completion.column(f"{name}{suffix}") - expected).max(), expected)
            np.testing.assert_allclose(completion.column(f"{name}{suffix}"), expected, rtol=0, atol=tolerance)
    column = completion.column
    ratio, entropy_ratio, advantage = column("ratio"), column("entropy_ratio"), column("A")
    np.testing.assert_allclose(ratio, np.exp(column("lp") - column("lp_old")), rtol=1e-5)
    np.testing.assert_allclose(entropy_ratio, (column("H") + 1e-8) / (column("H_old") + 1e-8), rtol=1e-5)
    assert np.abs(ratio - 1).max() > 0.01
    flags = {
        "erc_clipped": (entropy_ratio <= 0.95) | (entropy_ratio >= 1.05),
        "ppo_low": (advantage < 0) & (ratio < 0.8),
        "ppo_high": (advantage > 0) & (ratio > 1.2),
    }
    for name, expected in flags.items():
        assert column(name).tolist() == expected.tolist()


def test_the_report_shows_the_tokens(trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    report.main([str(trained.run), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "four classes of tokens" in page
    figures = {path.name for path in (tmp_path / "report_figures").iterdir()}
    assert {"reward.png", "token_classes.csv"} <= figures, figures
