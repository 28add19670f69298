"""The recorder: what it writes is what the training did, and the training is the one it would have been."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.killing import killed_at_random
from tests.trainers.test_grpo import ALL_CONTROLS, assert_same_weights, logged, weights
from trl_entropy import AsyPPOConfig, AsyPPOTrainer
from trl_entropy.controls import TokenMean
from trl_entropy.telemetry import recorder as module
from trl_entropy.telemetry.record import TokenRecord, read_record
from trl_entropy.telemetry.recorder import RecordedMicroBatch, Schedule, TokenRecorder

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


# Without a training: the recorder alone.


class Tokenizer:
    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return {5: "<script>", 6: "\ud800", 7: "the"}.get(ids[0], str(ids[0]))

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return "\u2581the" if token_id == 7 else "x"


def make_micro_batch(step: int = 1, micro_step: int = 0, **inputs: Any) -> RecordedMicroBatch:
    """Two completions of 4 tokens, the second with an observation in its second place, all drawn at random."""
    draw = torch.Generator().manual_seed(step)
    batch = {
        "completion_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "prompt_ids": torch.tensor([[0, 3], [4, 2]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "old_per_token_logps": -torch.rand(2, 4, generator=draw),
        "old_entropies": torch.rand(2, 4, generator=draw),
        "completion_index": torch.tensor([30, 10]),
        **inputs,
    }
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    logps, entropies = -torch.rand(2, 4, generator=draw), torch.rand(2, 4, generator=draw)
    metrics = {"epo/below_fraction": TokenMean(entropies < 0.5, mask)}
    return RecordedMicroBatch(batch, mask, logps, entropies, metrics, step, micro_step)


@pytest.fixture
def make_recorder(tmp_path: Path) -> Callable[..., TokenRecorder]:
    def make(
        num_tokens: int = 100, schedule: Schedule | None = None, step: int = 0, **overrides: Any
    ) -> TokenRecorder:
        arguments = {"process": 0, "num_processes": 1, "seed": 0, "level": "token", **overrides}
        clip_range = {"eps_low": 0.2, "eps_high": 0.3}
        recorder = TokenRecorder(str(tmp_path), num_tokens, Tokenizer(), {}, clip_range=clip_range, **arguments)
        recorder.start(step, schedule or Schedule(1, 4, 100))
        return recorder

    return make


def written(recorder: TokenRecorder, folder: Path) -> TokenRecord:
    recorder.flush()
    record = read_record(folder)
    assert record is not None
    return record


def test_whole_completions_have_their_prompt_and_observations(make_recorder: Any, tmp_path: Path) -> None:
    recorder = make_recorder()
    recorder.add(make_micro_batch(step=4, micro_step=3))
    whole = written(recorder, tmp_path).whole
    assert rows_of(whole, "completion", "position", "token_id", "turn", "written") == [
        (30, -1, 3, -1, 0),
        (30, 0, 5, 0, 1),
        (30, 1, 6, 0, 1),
        (30, 2, 7, 0, 1),
        (10, -2, 4, -1, 0),
        (10, -1, 2, -1, 0),
        (10, 0, 9, 0, 1),
        (10, 1, 10, -1, 0),
        (10, 2, 11, 1, 1),
        (10, 3, 12, 1, 1),
    ]
    assert np.isnan(whole.column("H")[0])
    assert whole.column("token").tolist()[1:4] == ["<script>", "?", " the"]
    micro_batch = make_micro_batch(step=4)
    assert whole.column("epo_below")[-1] == float(micro_batch.entropies[1, 3] < 0.5)


def test_sample_is_of_the_masked_tokens_and_uniform(make_recorder: Any, tmp_path: Path) -> None:
    recorder = make_recorder(num_tokens=2)
    for step in range(1, 601):
        recorder.add(make_micro_batch(step=step, micro_step=4 * step))
    sampled = written(recorder, tmp_path).sampled
    cells = rows_of(sampled, "completion", "position")
    counts = {cell: cells.count(cell) for cell in set(cells)}
    assert set(counts) == {(30, 0), (30, 1), (30, 2), (10, 0), (10, 2), (10, 3)}
    # 1200 draws over 6 cells: 200 each, standard deviation sqrt(600 * 1/3 * 2/3) = 11.5
    assert max(abs(count - 200) for count in counts.values()) < 4 * 11.6


def test_ratio_of_a_sequence_is_that_of_all_its_tokens(make_recorder: Any, tmp_path: Path) -> None:
    recorder, micro_batch = make_recorder(level="sequence"), make_micro_batch()
    recorder.add(micro_batch)
    sampled = written(recorder, tmp_path).sampled
    change = (micro_batch.logps - micro_batch.inputs["old_per_token_logps"])[0, :3].mean()
    ratios = sampled.column("ratio")[sampled.column("completion") == 30]
    assert ratios == pytest.approx([math.exp(change)] * 3, rel=1e-6)


def test_what_a_rollout_lacks_is_null(make_recorder: Any, tmp_path: Path) -> None:
    recorder, micro_batch = make_recorder(), make_micro_batch()
    for name in ("old_entropies", "completion_index"):  # as in a rollout that a checkpoint without recorder kept
        del micro_batch.inputs[name]  # type: ignore[attr-defined]
    recorder.add(micro_batch)
    recorder.add(make_micro_batch(step=2, micro_step=1, old_per_token_logps=None))
    sampled = written(recorder, tmp_path).sampled
    first = sampled.where(sampled.column("step") == 1)
    assert not any(first.has(name) for name in ("H_old", "entropy_ratio", "completion", "value_std", "erc_clipped"))
    assert first.has("H", "ratio")
    on_policy = sampled.where(sampled.column("step") == 2)
    assert set(on_policy.column("ratio").tolist()) == set(on_policy.column("entropy_ratio").tolist()) == {1.0}


class NoSynchronisation(TorchDispatchMode):
    """Fails on what makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default", "unique")
        assert not any(name in str(func) for name in waiting), func
        return func(*args, **(kwargs or {}))


def test_adding_does_not_wait_for_the_device(make_recorder: Any) -> None:
    recorder, micro_batches = make_recorder(), [make_micro_batch(step, step - 1) for step in (1, 2, 3, 4)]
    with NoSynchronisation():
        for micro_batch in micro_batches:
            recorder.add(micro_batch)


def test_global_random_numbers_are_left_alone(make_recorder: Any) -> None:
    recorder, before = make_recorder(), torch.get_rng_state()
    recorder.add(make_micro_batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_write_files_of_their_own(make_recorder: Any, tmp_path: Path) -> None:
    recorders = [make_recorder(process=process, num_processes=2) for process in (0, 1)]
    for recorder in recorders:
        recorder.add(make_micro_batch())
        recorder.flush()
    record = read_record(tmp_path)
    assert record is not None
    assert record.sampled.column("process").tolist() == [0] * 6 + [1] * 6
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == [
        "process00000_step00000001.parquet",
        "process00001_step00000001.parquet",
    ]


def test_full_files_follow_each_other(make_recorder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_FILE", 6)
    recorder = make_recorder(schedule=Schedule(2, 8, 100))
    for micro_step in range(6):
        recorder.add(make_micro_batch(step=micro_step // 2 + 1, micro_step=micro_step))
    record = written(recorder, tmp_path)
    # a step is never split over two files, whose names would be the same
    assert len(list((tmp_path / "tokens").iterdir())) == 3
    assert [record.column("step").tolist().count(step) for step in (1, 2, 3)] == [12, 12, 12]


def test_killed_at_random_moments_it_has_every_step_that_it_wrote(make_recorder: Any, tmp_path: Path) -> None:
    def last_step() -> int:
        record = read_record(tmp_path)
        return int(record.column("step").max()) if record else 0

    def go_on() -> None:
        step = last_step()
        recorder = make_recorder(schedule=Schedule(1, 1, 10_000), step=step)
        while True:
            step += 1
            recorder.add(make_micro_batch(step=step, micro_step=step - 1))
            recorder.flush()

    reached = [last_step() for _ in killed_at_random(go_on, kills=4, longest=0.5)]
    record = read_record(tmp_path)
    assert record is not None
    assert reached == sorted(reached)
    recorder = make_recorder(schedule=Schedule(1, 1, 10_000))
    for step in range(1, reached[-1] + 1):
        recorder.add(make_micro_batch(step=step, micro_step=step - 1))
    assert written(recorder, tmp_path).table.equals(record.table)


@pytest.mark.parametrize("max_steps", [10, 5_000, 123_457])
def test_size_is_bounded(max_steps: int) -> None:
    schedule = Schedule(micro_per_step=2, micro_per_rollout=16, max_steps=max_steps)
    micro_batches = [SimpleNamespace(step=micro // 2 + 1, micro_step=micro) for micro in range(0, 2 * max_steps)]
    sampled: Any = [schedule.tokens(257, micro_batch) for micro_batch in micro_batches]  # type: ignore[arg-type]
    whole = [micro_batch.step for micro_batch in micro_batches if schedule.takes_whole(micro_batch)]  # type: ignore[arg-type]
    assert sum(sampled) <= module.MAX_SAMPLED
    assert sum(sampled) >= min(257 * max_steps, module.MAX_SAMPLED / 2)
    assert len(whole) <= module.MAX_ROLLOUTS
    assert len(whole) >= min(max_steps // 8, module.MAX_ROLLOUTS // 2)
    assert all(step % 8 == 0 for step in whole)


def test_config_refuses_what_cannot_be_recorded(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match="record_tokens=-1 must be at least 0"):
        make_trainer(record_tokens=-1)


WORKER = Path(__file__).with_name("recorder_worker.py")


def run_worker(processes: int, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, str(WORKER), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_record_their_own_completions(tiny_model_path: str, tmp_path: Path) -> None:
    run_worker(2, tiny_model_path, str(tmp_path))
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
    run_worker(1, tiny_model_path, str(tmp_path), str(tmp_path / "checkpoint-3"))
    resumed = read_record(tmp_path)
    assert resumed is not None
    assert resumed.where(resumed.column("step") <= 3).table.equals(before.table)
    later = resumed.where(resumed.column("step") > 3)
    assert set(later.column("process").tolist()) == {0.0}
    assert later.sampled.column("step").tolist() == [step for step in (4, 5, 6) for _ in range(5)]
