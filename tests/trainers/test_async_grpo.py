"""Asynchronous GRPO on made-up rollouts: TRL's own training where nothing is on, several processes, resuming."""

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from tests.children import run_processes
from trl_entropy.controls import CONTROLS
from trl_entropy.telemetry.record import read_record
from trl_entropy.trainers.async_controls import SUPPORTED

from . import async_parts, async_worker
from .async_reference import ALPHAS

async_contact, async_grpo = map(async_parts.require, ("async_contact", "async_grpo"))


def without_times(trainer: Any) -> list[dict[str, float]]:
    """The log entries but for what clocks measure."""
    clocks = ("perf/", "train_runtime", "train_samples", "train_steps")
    return [
        {key: value for key, value in entry.items() if not key.startswith(clocks)}
        for entry in trainer.state.log_history
    ]


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("config", ["own", "trl"])
def test_with_nothing_on_it_is_trls(make_async: Callable[..., Any], config: str) -> None:
    config_class = None if config == "own" else async_contact.AsyncGRPOConfig
    theirs = make_async(trainer_class=async_contact.AsyncGRPOTrainer, config_class=async_contact.AsyncGRPOConfig)
    ours = make_async(config_class=config_class)
    for trainer in (theirs, ours):
        trainer.train()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=0)
    assert without_times(ours) == without_times(theirs)


def test_recording_changes_no_bit(make_async: Callable[..., Any], tmp_path: Any) -> None:
    # prompts of three lengths in a micro-batch
    plain, recorded = (
        make_async(tmp_path / name, rollout_worker=async_parts.MadeRollouts(group_size=1), record_tokens=tokens)
        for name, tokens in (("plain", 0), ("recorded", 16))
    )
    for trainer in (plain, recorded):
        trainer.train()
    torch.testing.assert_close(weights(recorded), weights(plain), rtol=0, atol=0)
    rows = read_record(tmp_path / "recorded")
    assert set(rows.sampled.column("step")) == {1, 2, 3, 4}
    of_first_step = rows.whole.where(rows.whole.column("step") == 1)
    samples = recorded.rollout_worker.taken[:4]  # which TRL has packed in an order of its own
    assert len({int(sample.completion_mask.argmax()) for sample in samples}) > 1, "all prompts are of one length"
    found = []
    for index in range(2):
        one = of_first_step.where(of_first_step.column("completion") == index)
        order = one.column("position").argsort()
        ids, written = (one.column(name)[order].tolist() for name in ("token_id", "written"))
        for sample in samples:
            # up to the last token that the model wrote
            length = int(sample.completion_mask.nonzero()[0][-1]) + 1
            if ids[:length] == sample.input_ids[:length].tolist():
                assert written[:length] == sample.completion_mask[:length].tolist()
                found.append(sample.group_id)
    assert len(set(found)) == len(found) == 2


@pytest.fixture(scope="module")
def on_processes(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The worker's results on one and on two processes."""
    folder, script = tmp_path_factory.mktemp("async"), Path(async_worker.__file__)
    found = []
    for count in (1, 2):
        run_processes(count, script, tiny_model_path, folder / f"{count}.pt")
        found.append(torch.load(folder / f"{count}.pt", weights_only=True))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", async_worker.CASES)
def test_two_processes_are_one(on_processes: list[dict[str, Any]], case: str) -> None:
    one, two = (results[case] for results in on_processes)
    assert (one["processes"], two["processes"]) == (1, 2)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-6, atol=5e-8)
    assert len(one["log"]) == 3
    for first, second in zip(one["log"], two["log"], strict=True):
        assert first == pytest.approx(second, rel=1e-5, abs=1e-6)
    if case != "none":
        assert any("staleness/age" in entry for entry in one["log"])
        assert not torch.equal(one["weights"]["lm_head.weight"], on_processes[0]["none"]["weights"]["lm_head.weight"])


STATEFUL: dict[str, dict[str, Any]] = {
    "epo": {"epo_coef": 0.1},
    "entropic": {"entropic_target": 1.0},
    "ce_gppo_loop": {**ALPHAS, "ce_gppo_loop_target": 9.0, "ce_gppo_loop_kp": 0.05, "ce_gppo_loop_ki": 0.05},
    "par": {"par_schedule": "entropy", "par_target": 9.0, "par_delta": 0.2},
    "stare": {"stare_target_entropy": 9.0, "stare_variant": "C2", "stare_adaptive_step": 0.1},
    "erc": {"erc_low": 0.9, "erc_high": 1.1, "erc_target_fraction": 0.3},
}
"""Settings with which a control has a state."""


def test_every_control_with_a_state_is_among_them() -> None:
    assert {control.prefix for control in CONTROLS if control.state and control.prefix in SUPPORTED} == set(STATEFUL)


@pytest.mark.parametrize("control", [name for name in STATEFUL if name != "erc"])
def test_a_resumed_run_is_the_uninterrupted_one(make_async: Callable[..., Any], tmp_path: Any, control: str) -> None:
    fields = {"max_steps": 6, **STATEFUL[control], "save_strategy": "steps", "save_steps": 3}
    whole = make_async(tmp_path / "whole", **fields)
    whole.train()
    worker = async_parts.MadeRollouts()
    for _ in range(3 * 4):
        worker.get()
    resumed = make_async(tmp_path / "resumed", rollout_worker=worker, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert resumed.active.states.keys() == {control}
    torch.testing.assert_close(resumed.active.state_dict(), whole.active.state_dict(), rtol=0, atol=0)


def test_a_resumed_run_has_erc_s_bounds(
    make_async: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of before are not in a checkpoint, nor are samples that they wrote."""
    fields = {**STATEFUL["erc"], "save_strategy": "steps", "save_steps": 3}
    make_async(tmp_path / "run", **fields, max_steps=3).train()
    checkpoint = tmp_path / "run/checkpoint-3"
    saved = torch.load(checkpoint / "controls_rank0.pt", weights_only=True)["controls"]["erc"]
    resumed = make_async(tmp_path / "resumed", **fields, max_steps=4)
    load, loaded = resumed._load_optimizer_and_scheduler, []

    def watched(*given: Any) -> None:
        load(*given)
        loaded.append(copy.deepcopy(resumed.active.states["erc"].state_dict()))

    monkeypatch.setattr(resumed, "_load_optimizer_and_scheduler", watched)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(loaded, [saved], rtol=0, atol=0)
    assert saved["log_power"] != 0.0


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_checkpoint_without_the_controls_begins_them_anew(
    make_async: Callable[..., Any], tmp_path: Any, damage: str
) -> None:
    fields = {"epo_coef": 0.1, "save_strategy": "steps", "save_steps": 2}
    make_async(tmp_path / "run", **fields).train()
    file = tmp_path / "run/checkpoint-2/controls_rank0.pt"
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:100])
    resumed = make_async(tmp_path / "resumed", **fields)
    with pytest.warns(UserWarning, match=r"controls_rank0.pt cannot be read \(\w+\): the controls begin anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert len(resumed.active.states["epo"].steps) == 1


def test_what_is_recorded_is_written_before_a_checkpoint(
    make_async: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_async(record_tokens=8, save_strategy="steps", save_steps=2, max_steps=2)
    save, written = async_contact.AsyncGRPOTrainer._save_checkpoint, []

    def watched(*given: Any) -> None:
        written.append({int(step) for step in read_record(tmp_path / "run").sampled.column("step")})
        save(*given)

    monkeypatch.setattr(async_contact.AsyncGRPOTrainer, "_save_checkpoint", watched)
    trainer.train()
    assert written == [{1, 2}]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_state_is_its_own_where_the_processes_are_as_many(
    make_async: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    fields = {"epo_coef": 0.1, "save_strategy": "steps", "save_steps": 2}
    make_async(tmp_path / "run", **fields, max_steps=2).train()
    file = tmp_path / "run/checkpoint-2/controls_rank0.pt"
    torch.save(torch.load(file, weights_only=True) | {"num_processes": processes}, file)
    resumed, owned = make_async(tmp_path / "resumed", **fields, max_steps=3), []
    load = type(resumed.active).load_state_dict

    def watched(active: Any, saved: Any, *, own: bool) -> list[str]:
        owned.append(own)
        return load(active, saved, own=own)

    monkeypatch.setattr(type(resumed.active), "load_state_dict", watched)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert owned == [processes == 1]


def test_a_checkpoint_of_the_model_alone_has_no_states(make_async: Callable[..., Any], tmp_path: Any) -> None:
    fields = {"epo_coef": 0.1, "save_strategy": "steps", "save_steps": 2, "max_steps": 2, "save_only_model": True}
    make_async(tmp_path / "run", **fields).train()
    assert (tmp_path / "run/checkpoint-2").is_dir()
    assert not (tmp_path / "run/checkpoint-2/controls_rank0.pt").exists()


def test_ages_are_those_of_the_update(make_async: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL counts the age when a sample leaves the queue; by its update the weights may have been handed over again."""
    worker = async_parts.MadeRollouts(ages=(0,))
    trainer = make_async(rollout_worker=worker, erc_low=0.9, erc_high=1.1)
    forward = trainer.model.forward

    @functools.wraps(forward)
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return forward(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", slow)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    versions = [sample.model_version for sample in worker.taken]
    expected = [sum(step + 1 - version for version in versions[4 * step : 4 * step + 4]) for step in range(4)]
    assert expected == [0, 4, 4, 4]
    assert [entry["staleness/age"] for entry in entries] == [0.0, 1.0, 1.0, 1.0]
    assert [entry["staleness/tokens_age_1"] for entry in entries] == [0.0, 1.0, 1.0, 1.0]
    assert [entry["erc/clip_fraction"] > 0 for entry in entries] == [False, True, True, True]
    assert all(0.02 <= entry["perf/fwd_s"] < entry["perf/fwd_bwd_s"] for entry in entries)


def test_a_metric_of_an_update_is_the_mean_over_the_tokens_of_all_its_samples(make_async: Callable[..., Any]) -> None:
    worker = async_parts.MadeRollouts()
    trainer = make_async(rollout_worker=worker, record_tokens=8, gradient_accumulation_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in enumerate(entries):
        samples = worker.taken[8 * step : 8 * step + 8]
        tokens = [int(sample.completion_mask.sum()) for sample in samples]
        ages = [step + 1 - sample.model_version for sample in samples]
        expected = sum(n * age for n, age in zip(tokens, ages, strict=True)) / sum(tokens)
        assert entry["staleness/age"] == pytest.approx(expected)


def test_a_sample_that_waits_for_its_update_finds_its_version(make_async: Callable[..., Any]) -> None:
    """It may be older by then than `max_staleness`, which TRL applies when it leaves the queue."""
    worker = async_parts.MadeRollouts(ages=(0, 1))
    trainer = make_async(rollout_worker=worker, max_staleness=1, max_steps=6, erc_low=0.8, erc_high=1.3)
    trainer.train()
    assert max(entry.get("staleness/age", 0.0) for entry in trainer.state.log_history) > 1.0
    assert len(trainer._versions._kept) == 1 + async_grpo.VERSIONS_IN_FLIGHT


def test_a_masked_vocabulary_has_finite_entropies(make_async: Callable[..., Any]) -> None:
    """Entries whose logits are minus infinity; the entropies of earlier weights are read too."""
    trainer = make_async(epo_coef=0.1, erc_low=0.8, erc_high=1.3)
    head = trainer.model.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.bias.data[[5, 6, 7, 20]] = -torch.inf
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss", "grad_norm", "entropy", "epo/history", "erc/entropy_kept"):
        values = [entry[name] for entry in entries if name in entry]
        assert values, name
        assert all(map(math.isfinite, values)), name


def test_the_adapter_alone_is_kept(make_async: Callable[..., Any]) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_async(peft_config=lora, learning_rate=0.1, erc_low=0.99, erc_high=1.01)
    trainer.train()
    kept = trainer._versions._kept
    assert set(kept) <= set(range(1, 6))
    assert all("lora_" in name for name in kept[5])
    assert max(entry.get("erc/clip_fraction", 0.0) for entry in trainer.state.log_history) > 0.0


def test_dropout_is_named_where_ratios_would_take_it_for_a_change(make_async: Callable[..., Any]) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    with pytest.warns(UserWarning, match=r"dropout \(lora_dropout=0\.1\), whose noise ERC cannot tell"):
        make_async(peft_config=lora, erc_low=0.9, erc_high=1.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dropout")
        make_async(peft_config=lora, epo_coef=0.1)


def test_sharded_weights_and_erc_are_refused(make_async: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_grpo, "SHARDED", ("NO",))
    with pytest.raises(ValueError, match=r"erc_low=0.9 needs the entropies of earlier weights.*without sharding"):
        make_async(erc_low=0.9, erc_high=1.1)
    make_async(ce_gppo_alpha1=0.75, ce_gppo_alpha2=1.0)


def test_a_sample_of_an_unknown_version_is_named(make_async: Callable[..., Any]) -> None:
    trainer = make_async(erc_low=0.9, erc_high=1.1)
    trainer.rollout_worker.update_model_version = lambda version: None
    with pytest.raises(ValueError, match="written by version 0 of the weights, and those kept are 1"):
        trainer.train()


def test_samples_without_rewards_are_named(make_async: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_async(positive_nll_coef=0.1)
    get = trainer.rollout_worker.get
    monkeypatch.setattr(trainer.rollout_worker, "get", lambda **kwargs: replace(get(**kwargs), metrics={}))
    with pytest.raises(ValueError, match=r"positive_nll_coef=0.1 needs each sample's reward"):
        trainer.train()


def test_the_card_names_the_methods(make_async: Callable[..., Any], tmp_path: Any) -> None:
    trainer = make_async(epo_coef=0.1)
    trainer.create_model_card()
    card = (tmp_path / "run/README.md").read_text(encoding="utf-8")
    assert "| EPO | `epo_coef=0.1`" in card
    assert "On asynchronous GRPO with `loss_type=bnpo`" in card
