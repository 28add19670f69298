"""The recorder without a training: which tokens it takes, and the files that it writes."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.killing import killed_at_random
from tests.telemetry.test_recorder import rows_of
from trl_entropy.controls import TokenMean
from trl_entropy.telemetry import recorder as module
from trl_entropy.telemetry.record import TokenRecord, read_record
from trl_entropy.telemetry.recorder import RecordedMicroBatch, Schedule, TokenRecorder


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

    reached = [last_step() for _ in killed_at_random(go_on, kills=4, longest=1.0)]
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
