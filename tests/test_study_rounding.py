"""The study of rounding measures what it says, and its page has the tables of its committed results."""

import importlib
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.conftest import parity_reward
from trl_entropy.recipes import recipes_dir
from trl_entropy.telemetry.rounding import Gates, Measurement, Pass, Updated
from trl_entropy.trainers.probe import RoundingProbe

STUDY = recipes_dir() / "study"
sys.path.insert(0, str(STUDY))

pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")
rounding, report = map(importlib.import_module, ("rounding", "rounding_report"))

SHAPE = {"num_iterations": 1, "max_steps": 1, "steps_per_generation": 1, "lr_scheduler_type": "constant"}


def equal(first: Pass, second: Pass) -> bool:
    return torch.equal(first.logps, second.logps) and torch.equal(first.entropies, second.entropies)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rate_is_the_step_of_its_own_run(make_trainer, dtype):
    """The step at the second of two rates has the bits of a run with that rate, as has what follows in the run."""
    own = {**SHAPE, "model_init_kwargs": {"dtype": dtype}, "max_completion_length": 12}
    shared = make_trainer(
        trainer_class=partial(RoundingProbe, measured_steps=(1,), progress=str), learning_rate=1e-2, **own
    )
    callback = rounding.EveryRate(shared, (1e-1, 1e-3))
    shared.add_callback(callback)
    after = shared.measure().updates[0]
    for rate, update in ((1e-3, callback.updates[1]), (1e-2, after)):
        alone = make_trainer(
            trainer_class=partial(RoundingProbe, measured_steps=(1,), progress=str), learning_rate=rate, **own
        ).measure()
        assert equal(alone.updates[0].trained, update.trained), rate
        assert equal(alone.updates[0].float32, update.float32), rate
    assert not equal(callback.updates[0].trained, callback.updates[1].trained)


def test_exact_entropies_replace_trls_and_nothing_else(make_trainer):
    found = []
    for probe_class in (rounding.TimedProbe, rounding.ExactProbe):
        probe = make_trainer(trainer_class=partial(probe_class, progress=str), temperature=0.5, **SHAPE)
        measured = probe.measure()
        weights = torch.cat([parameter.detach().flatten() for parameter in probe.model.parameters()])
        kept = Pass(*(values * measured.mask for values in vars(measured.rollout).values()))
        found.append((kept, weights))
        assert probe.seconds[0] > 0
    (theirs, trained), (exact, trained_too) = found
    assert torch.equal(trained, trained_too)
    assert torch.equal(theirs.logps, exact.logps)
    assert not torch.equal(theirs.entropies, exact.entropies)
    assert torch.allclose(theirs.entropies, exact.entropies, atol=1e-5)


def test_off_the_grid_weights_round_to_the_same_bfloat16():
    model = torch.nn.Linear(64, 64).bfloat16()
    with torch.no_grad():
        model.weight[0] = 2.0 ** torch.arange(-32, 32)  # the numbers below a power of two are twice as near
        model.weight[1] = -(2.0 ** torch.arange(-32, 32))
    before = model.weight.detach().clone()
    after = rounding.off_the_grid(model).weight
    assert after.dtype == torch.float32
    assert torch.equal(after.bfloat16(), before)
    moved = ((after - before.float()) / before.float()).abs()[2:]
    assert moved.max() > 2**-9.2  # up to half of the spacing
    assert (moved > 0).float().mean() > 0.99


def test_other_gates_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    old = Pass(torch.zeros(1, 4), torch.tensor([[1.0, 0.1, 0.001, 5.0]]))
    new = Pass(torch.zeros(1, 4), torch.tensor([[0.9, 0.108, 0.0015, 1.0]]))

    def clipped(name):
        return rounding.REMEDIES[name](new, old, mask)[0, :3].tolist()

    assert clipped("published") == [True, True, True]
    # (0.0015 + 0.01) / (0.001 + 0.01) = 1.045, and 0.118 / 0.11 = 1.07
    assert clipped("floor 0.01") == [True, True, False]
    # 0.208 / 0.2 = 1.04, 1.0 / 1.1 = 0.91
    assert clipped("floor 0.1") == [True, False, False]
    assert clipped("and a change of 0.01 nats") == [True, False, False]
    assert clipped("and a change of 0.05 nats") == [True, False, False]
    assert clipped("and a change of 0.001 nats") == [True, True, False]
    # the window of the token at t is t - 1 to t + 2 and holds no padding: the sums are 1.0095 / 1.101 twice, then
    # 0.1095 / 0.101
    assert clipped("window of 4") == [True, True, True]
    assert clipped("window of 16") == [True, True, True]
    short = Pass(old.logps, torch.tensor([[0.95, 0.15, 0.001, 5.0]]))
    # alone, 0.95 and 1.5; together, 1.101 / 1.101
    assert rounding.REMEDIES["window of 16"](short, old, mask)[0, :3].tolist() == [False] * 3
    assert rounding.REMEDIES["published"](short, old, mask)[0, :2].tolist() == [True, True]


def test_other_gates_are_judged_by_the_published_one_in_float32():
    mask = torch.ones(1, 2, dtype=torch.bool)
    old, new, exact = (
        Pass(torch.zeros(1, 2), torch.tensor([values])) for values in ([1.0, 0.001], [1.2, 0.002], [1.2, 0.001])
    )
    measured = Measurement(mask, torch.ones(1, 2), old, {}, old, ())
    found = rounding.remedies(measured, Updated(1, new, exact))
    assert found["published"] == {"share": 1.0, "share_float32": 0.5, "precision": 0.5, "recall": 1.0}
    assert found["floor 0.1"] == {"share": 0.5, "share_float32": 0.5, "precision": 1.0, "recall": 1.0}


def test_finished_rows_are_not_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(rounding, "run", lambda row, device: made.append(row.name) or {"row": row.name})
    monkeypatch.setattr(
        rounding, "train", lambda arm, rate, device: made.append(f"training/{arm}/{rate:g}") or {"row": made[-1]}
    )
    results = tmp_path / "results.jsonl"
    rounding.run_all(["SmolLM2/autocast/1"], results, "cpu")
    assert made == ["SmolLM2/autocast/1"]
    for _ in range(2):
        rounding.run_all(None, results, "cpu")
    assert len(made) == len(set(made)) == len(rounding.read_results(results))


def test_training_clips_nothing_at_the_first_step_of_a_rollout(tmp_path, monkeypatch, tiny_model_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rounding, "model_path", lambda model: tiny_model_path)
    prepare = rounding.prepare
    monkeypatch.setattr(rounding, "prepare", lambda argv: replace(prepare(argv), reward_funcs=[parity_reward]))
    found = rounding.train("autocast", 1e-3)
    assert found["row"] == "training/autocast/0.001"
    assert len(found["clip_fraction"]) == 16
    assert found["clip_fraction"][0] == found["clip_fraction"][8] == 0.0
    assert min(found["clip_fraction"][1:8]) > 0


def test_page_has_the_tables_of_the_results():
    results = rounding.read_results()
    page = (STUDY / "rounding.md").read_text(encoding="utf-8")
    for name, table in report.tables(results).items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page, name
    for name in report.FIGURES:
        assert f"({name}.png)" in page
        assert (STUDY / f"{name}.png").is_file()
    known = {row.name for row in rounding.rows()}
    assert {name for name in results if not name.startswith("training/")} <= known
    json.dumps(results, allow_nan=False)
    assert Gates() == Gates(0.95, 1.05, 0.2, 0.2, "token", 1e-8)
