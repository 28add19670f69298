"""The study of rounding measures what it says, and its page has the tables of its committed results."""

import importlib
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import trl.trainer.utils

from tests.conftest import parity_reward
from trl_entropy.recipes import recipes_dir
from trl_entropy.telemetry.rounding import Gates, Measurement, Pass, Updated
from trl_entropy.trainers.probe import RoundingProbe

STUDY = recipes_dir() / "study"
sys.path.insert(0, str(STUDY))

pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")
MODULES = ("float16", "rounding", "rounding_gates", "rounding_report")
float16, rounding, gates, report = map(importlib.import_module, MODULES)
FUSED_HEAD = hasattr(trl.trainer.utils, "add_fused_lm_head")
cost = importlib.import_module("rounding_cost") if FUSED_HEAD else None
NEEDS_FUSED_HEAD = pytest.mark.skipif(not FUSED_HEAD, reason="the cost is measured with the fused head of TRL 1.16")

SHAPE = {"num_iterations": 1, "max_steps": 1, "steps_per_generation": 1, "lr_scheduler_type": "constant"}


def equal(first: Pass, second: Pass) -> bool:
    return torch.equal(first.logps, second.logps) and torch.equal(first.entropies, second.entropies)


class Float16(float16.Float16Anywhere, RoundingProbe):
    pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_rate_is_the_step_of_its_own_run(make_trainer, dtype):
    """The step at the second of two rates has the bits of a run with that rate, as has what follows in the run."""
    weights = {"bf16": True} if dtype == "float16" else {"model_init_kwargs": {"dtype": dtype}}
    own = {**SHAPE, **weights, "max_completion_length": 12}
    probe = partial(Float16 if dtype == "float16" else RoundingProbe, measured_steps=(1,), progress=str)
    shared = make_trainer(trainer_class=probe, learning_rate=1e-2, **own)
    callback = rounding.EveryRate(shared, (1e-1, 1e-3))
    shared.add_callback(callback)
    after = shared.measure().updates[0]
    for rate, update in ((1e-3, callback.updates[1]), (1e-2, after)):
        alone = make_trainer(trainer_class=probe, learning_rate=rate, **own).measure()
        assert equal(alone.updates[0].trained, update.trained), rate
        assert equal(alone.updates[0].float32, update.float32), rate
    assert not equal(callback.updates[0].trained, callback.updates[1].trained)


def test_float16_on_a_cpu_is_that_of_accelerate_on_a_gpu(make_trainer):
    """Eight times finer than bfloat16, the same step but for rounding, and its gradients are scaled."""
    measured, trained = {}, {}
    for name, probe_class, autocast in (
        ("float32", RoundingProbe, False),
        ("bfloat16", RoundingProbe, True),
        ("float16", Float16, True),
    ):
        probe = make_trainer(
            trainer_class=partial(probe_class, measured_steps=(1,), progress=str), bf16=autocast, **SHAPE
        )
        measured[name] = probe.measure()
        trained[name] = torch.cat([parameter.detach().flatten() for parameter in probe.model.parameters()])
        assert trained[name].dtype == torch.float32
    assert probe.accelerator.scaler.get_scale() == 2.0**10
    error = {
        name: float((found.rollout.logps - found.float32.logps)[found.mask].abs().mean())
        for name, found in measured.items()
    }
    assert error["float32"] == 0 < 5 * error["float16"] < error["bfloat16"] < 12 * error["float16"]
    assert not equal(measured["float16"].updates[0].trained, measured["float16"].rollout)
    assert (trained["float16"] - trained["float32"]).abs().mean() < 1e-4  # a step is 1e-3


def test_float16_products_are_float32s_rounded_once():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 40, 40, generator=generator).half() for _ in range(2))
    bias = torch.randn(40, generator=generator).half()
    with float16.Float16Products():
        found = (
            first @ second,
            first[0] @ second[0],
            torch.nn.functional.linear(first, second[0], bias),
            first[0].bfloat16() @ second[0].bfloat16(),
        )
    wide, wider = first.float(), second.float()
    assert torch.equal(found[0], (wide @ wider).half())
    assert torch.equal(found[1], (wide[0] @ wider[0]).half())
    assert torch.equal(found[2], torch.nn.functional.linear(wide, wider[0], bias.float()).half())
    assert torch.equal(found[3], first[0].bfloat16() @ second[0].bfloat16())


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
        return gates.REMEDIES[name](new, old, mask)[0, :3].tolist()

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
    assert gates.REMEDIES["window of 16"](short, old, mask)[0, :3].tolist() == [False] * 3
    assert gates.REMEDIES["published"](short, old, mask)[0, :2].tolist() == [True, True]


def test_other_gates_are_judged_by_the_published_one_in_float32():
    mask = torch.ones(1, 2, dtype=torch.bool)
    old, new, exact = (
        Pass(torch.zeros(1, 2), torch.tensor([values])) for values in ([1.0, 0.001], [1.2, 0.002], [1.2, 0.001])
    )
    measured = Measurement(mask, torch.ones(1, 2), old, {}, old, ())
    found = gates.remedies(measured, Updated(1, new, exact))
    assert found["published"] == {"share": 1.0, "share_float32": 0.5, "precision": 0.5, "recall": 1.0}
    assert found["floor 0.1"] == {"share": 0.5, "share_float32": 0.5, "precision": 1.0, "recall": 1.0}


def test_hindsight_takes_the_most_precise_floor_and_bounds():
    """By ratio alone (1.5, 0.8, 1.4, 1.0) the false third comes before the true second; with a floor it does not."""
    mask = torch.tensor([[True, True, True, True, False]])
    old = Pass(torch.zeros(1, 5), torch.tensor([[1.0, 1.0, 0.001, 1.0, 1.0]]))
    new = Pass(torch.zeros(1, 5), torch.tensor([[1.5, 0.8, 0.0014, 1.0, 9.0]]))
    true = torch.tensor([[True, True, False, False, False]])
    assert torch.equal(gates.in_hindsight(new, old, true, mask), true)
    assert not gates.in_hindsight(new, old, torch.zeros_like(true), mask).any()
    # four of five are enough: the fifth would bring the false one in
    mask = torch.ones(1, 6, dtype=torch.bool)
    old = Pass(torch.zeros(1, 6), torch.full((1, 6), 100.0))
    new = Pass(torch.zeros(1, 6), torch.tensor([[200.0, 190.0, 180.0, 170.0, 110.0, 150.0]]))
    true = torch.tensor([[True, True, True, True, True, False]])
    assert gates.in_hindsight(new, old, true, mask).tolist() == [[True, True, True, True, False, False]]


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


@NEEDS_FUSED_HEAD
def test_cost_of_each_remedy_is_that_of_the_step_it_says(make_trainer, monkeypatch):
    """Every arm computes in its own precision, with its own number of passes."""
    trainer = make_trainer(max_completion_length=12)
    stepper = cost.Stepper(trainer, completions=4)
    passes = []
    forward = RoundingProbe._get_per_token_logps_and_entropies

    def noted(model, ids, *args, **kwargs):
        found = forward(trainer, model, ids, *args, **kwargs)
        passes.append((len(ids), ids.size(1), torch.is_grad_enabled(), found[1].detach()[:, -12:]))
        return found

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", noted)
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    entropies = {}
    for name, arm in cost.ARMS.items():
        passes.clear()
        assert stepper.step(arm) > 0
        length = passes[0][1]
        expected = [(4, length, False), (4, length, True)]
        if arm.float32_entropies:
            expected[1:1] = [(4, length, False)] * 2
        if arm.repeats:
            expected.append((1, length + 8, False))
        assert [found[:3] for found in passes] == expected, name
        entropies[name] = [found[3] for found in passes]
        assert torch.equal(entropies[name][0], next(found[3] for found in passes if found[2])), name
    assert all(map(torch.equal, weights, trainer.model.parameters()))

    exact, published = entropies["float32"][0], entropies["published gate"][0]
    off = {name: (found[0] - exact).abs().max() for name, found in entropies.items()}
    assert off["published gate"] > 4 * off["float16"] > 0
    assert off["cast_lm_head_to_fp32"] > 4 * off["float16"]
    assert not torch.equal(published, entropies["cast_lm_head_to_fp32"][0])
    assert torch.equal(published, entropies["erc_entropy_floor"][0])
    assert torch.equal(published, entropies["float32 forward for the entropies"][0])
    assert torch.equal(exact, entropies["float32 forward for the entropies"][1])


@NEEDS_FUSED_HEAD
def test_cost_is_a_ratio_within_the_round(make_trainer):
    rows = cost.measure(make_trainer(), completions=4, rounds=4)
    assert [row["arm"] for row in rows] == list(cost.ARMS)
    assert rows[0]["ratio"] == 1.0 == rows[0]["quartiles"][0]
    assert {row["arm"]: row["rounds"] for row in rows if row["rounds"] < 4} == {"float16": cost.SLOW_ROUNDS}
    assert cost._summary([3.0, 1.0, 4.0], [1.0, 1.0, 2.0]) == {
        "rounds": 3,
        "seconds": 3.0,
        "ratio": 2.0,
        "quartiles": [1.0, 3.0],
    }
