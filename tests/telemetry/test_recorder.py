"""The recorder: what it writes is what the training did, and the training is the one it would have been."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.children import run_processes
from tests.trainers.test_grpo import ALL_CONTROLS, assert_same_weights, logged, weights
from trl_entropy import AsyPPOConfig, AsyPPOTrainer
from trl_entropy.telemetry import recorder as module
from trl_entropy.telemetry.record import TokenRecord, read_record
from trl_entropy.telemetry.recorder import RecordedMicroBatch

RECORDED = {"record_tokens": 10, "max_steps": 8}


def record_of(trainer: Any) -> TokenRecord:
    record = read_record(Path(trainer.args.output_dir))
    assert record is not None
    return record


def trained(trainer: Any) -> Any:
    trainer.train()
    return trainer


@pytest.mark.parametrize("controls", [{}, ALL_CONTROLS], ids=["plain", "all"])
def test_recording_changes_nothing_of_the_training(make_trainer: Any, tmp_path: Path, controls: Any) -> None:
    recorded = trained(make_trainer(tmp_path / "recorded", **controls, **RECORDED))
    plain = {"trainer_class": GRPOTrainer, "config_class": GRPOConfig} if not controls else {}
    other = trained(make_trainer(tmp_path / "other", **controls, **plain, max_steps=8))
    assert_same_weights(weights(recorded), weights(other))
    assert logged(recorded, "reward") == logged(other, "reward")
    assert len(record_of(recorded).sampled.table) == 80
    assert not (tmp_path / "other" / "tokens").exists()


def recomputed(model: str, prompt: list[int], completion: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of a completion's tokens under a saved model, in float64."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logps = torch.log_softmax(logits, dim=-1)
    return logps.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1), -(logps.exp() * logps).sum(1)


def rows_of(record: TokenRecord, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(record.column(name).tolist() for name in names), strict=True))


@pytest.mark.parametrize("controls", [{}, ALL_CONTROLS], ids=["plain", "all"])
def test_values_are_those_of_the_saved_models(
    make_trainer: Any, tmp_path: Path, tiny_model_path: str, controls: Any
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    trainer = trained(make_trainer(tmp_path / "run", **controls, **RECORDED, **saved))
    checkpoint = lambda step: str(tmp_path / "run" / f"checkpoint-{step}") if step else tiny_model_path  # noqa: E731
    whole = record_of(trainer).whole
    for step, rollout in ((4, 0), (8, 1)):  # the last of each rollout's four steps
        of_step = whole.where((whole.column("step") == step) & (whole.column("rollout") == rollout))
        indices = sorted(set(of_step.column("completion").tolist()))
        assert len(indices) == module.WHOLE_COMPLETIONS
        for index in indices:
            tokens = of_step.where(of_step.column("completion") == index)
            completion = tokens.where(tokens.column("position") >= 0)
            prompt = tokens.where(tokens.column("position") < 0).column("token_id").astype(int).tolist()
            ids = completion.column("token_id").astype(int).tolist()
            assert completion.column("position").tolist() == list(range(len(ids)))
            for policy, names in ((checkpoint(step - 1), ("lp", "H")), (checkpoint(step - 4), ("lp_old", "H_old"))):
                for expected, name in zip(recomputed(policy, prompt, ids), names, strict=True):
                    np.testing.assert_allclose(completion.column(name), expected, rtol=1e-4, atol=1e-5)
            ratio = np.exp(completion.column("lp") - completion.column("lp_old"))
            np.testing.assert_allclose(completion.column("ratio"), ratio, rtol=1e-5)
            assert np.abs(ratio - 1).max() > 0.01
            entropy_ratio = completion.column("H") / completion.column("H_old")
            np.testing.assert_allclose(completion.column("entropy_ratio"), entropy_ratio, rtol=1e-5)


def test_sampled_tokens_are_tokens_of_the_completions(make_trainer: Any, tmp_path: Path) -> None:
    record = record_of(trained(make_trainer(**ALL_CONTROLS, record_tokens=48, max_steps=4)))
    key, values = ("completion", "position"), ("token_id", "token", "lp", "H", "A", "ratio", "written", "erc_clipped")
    last = record.where(record.column("step") == 4)
    sampled = {row[:2]: row[2:] for row in rows_of(last.sampled, *key, *values)}
    assert len(sampled) == len(last.sampled.table)  # drawn without replacement
    for row in rows_of(last.whole, *key, *values):
        if row[1] >= 0:  # more tokens are asked for than there are, so that all were drawn
            assert sampled[row[:2]] == row[2:]
    assert set(record.sampled.column("turn").tolist()) == {0.0}
    assert set(record.sampled.column("completion").tolist()) == set(range(32))


def test_flags_say_what_the_controls_did(make_trainer: Any) -> None:
    trainer = trained(make_trainer(**ALL_CONTROLS, record_tokens=48, max_steps=8, learning_rate=1e-2))
    sampled = record_of(trainer).sampled
    column = sampled.column
    ratio, advantage, entropy_ratio = column("ratio"), column("A"), column("entropy_ratio")
    for name, expected in {
        "ppo_low": (advantage < 0) & (ratio < 1 - trainer.epsilon_low),
        "ppo_high": (advantage > 0) & (ratio > 1 + trainer.epsilon_high),
        "erc_clipped": (entropy_ratio <= 0.95) | (entropy_ratio >= 1.05),
        "written": np.ones(len(ratio), bool),
    }.items():
        assert column(name).tolist() == expected.tolist()
        assert expected.any()
    assert column("ce_gppo_low").tolist() == column("ppo_low").tolist()
    assert column("ce_gppo_high").tolist() == column("ppo_high").tolist()
    # the first rollout has no history, so no corridor
    first = column("rollout") == 0
    assert np.isnan(column("epo_below")[first]).all()
    assert set(column("epo_below")[~first].tolist()) == {0.0, 1.0}
    assert not sampled.has("value_std")
    # all tokens of a step were asked for: their means are what was logged
    for key, name in (("erc/clip_fraction", "erc_clipped"), ("ppo_clip/low_fraction", "ppo_low")):
        means = [column(name)[column("step") == step].mean() for step in range(1, 9)]
        assert means == pytest.approx(logged(trainer, key), abs=1e-6)


SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": ALL_CONTROLS,
    "dual clip": {"delta": 1.21},
    "sequence": SEQUENCE,
    "sequence, frozen": {**SEQUENCE, "erc_low": 0.95, "erc_high": 1.05},
    "cispo": {"loss_type": "cispo", "epsilon_high": 0.9},
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_the_loss(make_trainer: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings = {"loss_type": "bnpo", **LOSSES[name]}
    trainer = make_trainer(**settings, record_tokens=48, max_steps=4, learning_rate=1e-2, beta=0.0)
    calls: list[Any] = []
    micro_batches: list[RecordedMicroBatch] = []
    gradients: list[torch.Tensor] = []
    sizes: list[float] = []
    on_loss, add, backward = trainer.on_loss, trainer._recorder.add, trainer.accelerator.backward

    def backward_twice(loss: torch.Tensor, **kwargs: Any) -> None:
        gradients.append(torch.autograd.grad(loss, calls[-1].logps, retain_graph=True)[0])
        backward(loss, **kwargs)

    monkeypatch.setattr(trainer, "on_loss", lambda call, inputs: (calls.append(call), on_loss(call, inputs)))
    monkeypatch.setattr(trainer, "added_loss", lambda call: None)  # the policy loss alone
    monkeypatch.setattr(
        trainer._recorder, "add", lambda micro_batch: (micro_batches.append(micro_batch), add(micro_batch))
    )
    monkeypatch.setattr(trainer.accelerator, "backward", backward_twice)
    trained(trainer)
    assert len(gradients) == len(micro_batches) == 4
    for gradient, micro_batch in zip(gradients, micro_batches, strict=True):
        mask = micro_batch.mask
        found = trainer._recorder._columns(micro_batch)["gradient"][mask]
        tokens = mask.sum()  # that the loss is a mean over, or the rows and each row's tokens
        if settings["loss_type"] == "grpo":
            tokens = len(mask) * mask.sum(1, keepdim=True).expand_as(mask)[mask]
        elif settings["loss_type"] == "cispo":  # of a normaliser that differs between TRL's releases
            tokens = found.norm() / gradient[mask].norm()
        torch.testing.assert_close(found, -gradient[mask] * tokens, rtol=1e-4, atol=1e-5)
        sizes.append(found.abs().max().item())
    assert max(sizes) > 0.1


def test_settings_that_the_figures_need_are_beside_the_rows(make_trainer: Any) -> None:
    settings = record_of(trained(make_trainer(**ALL_CONTROLS, **RECORDED))).settings
    assert (settings["erc_low"], settings["erc_high"], settings["ce_gppo_alpha1"]) == (0.95, 1.05, 0.75)
    assert (settings["epsilon_low"], settings["epsilon_high"]) == (0.2, 0.2)
    assert "advantage_mask_fraction" not in settings  # of a configuration without critics


def test_critics_are_recorded(make_trainer: Any, tiny_model_path: str) -> None:
    trainer = make_trainer(
        trainer_class=lambda **kwargs: AsyPPOTrainer(**kwargs, critics=tiny_model_path),
        config_class=AsyPPOConfig,
        entropy_coef=0.01,
        record_tokens=48,
        max_steps=4,
        num_iterations=2,
    )
    seen: dict[int, Any] = {}
    score = trainer._generate_and_score_completions

    def keep(inputs: Any) -> Any:
        output = score(inputs)
        seen.update(output)
        return output

    trainer._generate_and_score_completions = keep
    sampled = record_of(trained(trainer)).sampled
    assert len(sampled.table) > 100
    index = sampled.column("completion").astype(int), sampled.column("position").astype(int)
    for name in ("advantages", "value_mean", "value_std", "advantage_masked", "entropy_filtered"):
        expected = seen[name].float().numpy()[index]  # type: ignore[index]
        np.testing.assert_array_equal(sampled.column("A" if name == "advantages" else name), expected)
    assert sampled.column("advantage_masked").mean() == pytest.approx(0.2, abs=0.02)


def test_accumulated_micro_batches_share_the_tokens(make_trainer: Any) -> None:
    trainer = trained(make_trainer(record_tokens=7, gradient_accumulation_steps=2, max_steps=4))
    steps = record_of(trainer).sampled.column("step").tolist()
    assert [steps.count(step) for step in (1, 2, 3, 4)] == [7, 7, 7, 7]


def test_resumed_run_has_the_record_of_an_uninterrupted_one(make_trainer: Any, tmp_path: Path) -> None:
    settings = {**ALL_CONTROLS, **RECORDED, "save_strategy": "steps", "save_steps": 3}
    whole = record_of(trained(make_trainer(tmp_path / "whole", **settings)))
    make_trainer(tmp_path / "run", **settings).train()
    # as if it had been killed after step 8: its record is ahead of the checkpoint that it goes on from
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert record_of(resumed).table.equals(whole.table)


def test_a_complete_checkpoint_has_its_record_on_the_disk(make_trainer: Any, tmp_path: Path) -> None:
    """Killed right after its last file, a run has lost no row of a step that will not be taken again."""
    recorded = []

    class Spy(TrainerCallback):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            recorded.append(sorted(set(record_of(trainer).column("step").tolist())))

    trainer = make_trainer(callbacks=[Spy()], **RECORDED, save_strategy="steps", save_steps=3)
    trainer.train()
    assert recorded == [[1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8]]


def test_new_run_replaces_the_record_of_an_older_one(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", **RECORDED).train()
    again = trained(make_trainer(tmp_path / "run", record_tokens=10, max_steps=4))
    assert set(record_of(again).column("step").tolist()) == {1.0, 2.0, 3.0, 4.0}


def test_evaluation_is_not_recorded(make_trainer: Any, tiny_dataset: Any) -> None:
    rows = {"eval_dataset": tiny_dataset.select(range(4)), "eval_strategy": "steps", "eval_steps": 2}
    trainer = trained(make_trainer(**RECORDED, **rows))
    assert len(record_of(trainer).sampled.table) == 80


def test_config_refuses_what_cannot_be_recorded(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match="record_tokens=-1 must be at least 0"):
        make_trainer(record_tokens=-1)


WORKER = Path(__file__).with_name("recorder_worker.py")


@pytest.mark.slow
def test_two_processes_record_their_own_completions(tiny_model_path: str, tmp_path: Path) -> None:
    run_processes(2, WORKER, tiny_model_path, str(tmp_path))
    record = read_record(tmp_path)
    assert record is not None
    column = record.sampled.column
    for process in (0, 1):
        of_process = column("process") == process
        assert column("step")[of_process].tolist() == [step for step in range(1, 7) for _ in range(5)]
        # 2 micro-batches of 4 completions on each process
        assert set(column("completion")[of_process].tolist()) <= set(range(8 * process, 8 * process + 8))
    before = record.where(record.column("step") <= 3)
    # one process goes on from the checkpoint: what both recorded after it is made anew, by one
    run_processes(1, WORKER, tiny_model_path, str(tmp_path), str(tmp_path / "checkpoint-3"))
    resumed = read_record(tmp_path)
    assert resumed is not None
    assert resumed.where(resumed.column("step") <= 3).table.equals(before.table)
    later = resumed.where(resumed.column("step") > 3)
    assert set(later.column("process").tolist()) == {0.0}
    assert later.sampled.column("step").tolist() == [step for step in (4, 5, 6) for _ in range(5)]
