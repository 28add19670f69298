"""The study measures what it says, and its page has the tables of its committed results."""

import argparse
import importlib
import json
import statistics
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.conftest import parity_reward
from trl_entropy import EntropyGRPOTrainer
from trl_entropy.critics import CriticEnsemble
from trl_entropy.recipes import recipes_dir
from trl_entropy.trainers.loss_call import LossCall, loss_mask

STUDY = recipes_dir() / "study"
sys.path.insert(0, str(STUDY))

pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")
claims, policies, probes, report, run, settings = map(
    importlib.import_module, ("claims", "policies", "probes", "report", "run", "settings")
)


@pytest.fixture(scope="module")
def results():
    return run.read_results()


@pytest.fixture
def small_start(monkeypatch):
    """Models that have not been warmed up, and a reward that they get all the same."""
    monkeypatch.setattr(policies, "WARM_UP", {"policy": 0.0, "small": 0.0})
    task = replace(policies.STUDY_TASKS["arithmetic"], reward=parity_reward)
    monkeypatch.setitem(policies.STUDY_TASKS, "arithmetic", task)


@pytest.mark.parametrize("arm", ["dapo", "erc", "asyppo-shared-data", "asyppo-entropy-mask"])
def test_run_is_measured_and_repeats_to_the_last_digit(arm, small_start, tmp_path):
    asked = settings.Run("arithmetic", arm, 2, 5e-2, 0)
    first, second = (run.train(asked, tmp_path, steps=4) for _ in range(2))
    assert {name: value for name, value in first.items() if name != "seconds"} == {
        name: value for name, value in second.items() if name != "seconds"
    }
    assert first["run"] == f"arithmetic/{arm}/2/0.05/0"
    assert len(first["probe_entropy"]) == len(first["grad_norm"]) == 4
    assert len(first["reward"]) == len(first["entropy"]) == 2
    tokens = first["tokens"]
    assert sum(tokens["by_ratio"]["all"]) == sum(tokens["by_entropy"]["all"]) > 4 * 64
    assert 0 < sum(tokens["by_ratio"]["erc"]) < sum(tokens["by_ratio"]["all"])
    assert ("value_std" in first) == arm.startswith("asyppo")
    json.dumps(first)


def test_measuring_changes_nothing(make_trainer):
    weights = []
    for trainer_class in (EntropyGRPOTrainer, probes.MeasuringTrainer):
        trainer = make_trainer(trainer_class=trainer_class, steps_per_generation=2, learning_rate=1e-2)
        trainer.add_callback(probes.EntropyProbe(torch.tensor([[3, 4, 5]]), torch.tensor([[-100, 4, 5]])))
        trainer.train()
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_tokens_are_counted_by_hand():
    counts = probes.TokenCounts()
    log_ratio = torch.tensor([0.0, 0.25, 0.25, -0.25, -0.25, 0.1])
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    old_entropies = torch.tensor([1.2, 0.0, 0.3, 0.3, 2.0, 0.5])
    entropies = torch.tensor([1.2, 0.0, 0.31, 0.33, 1.8, 0.5])
    counts.add(log_ratio, advantages, entropies, old_entropies)
    found = counts.result()
    # the entropy ratios are 1, 1 (below the floor), 1.033, 1.1, 0.9, 1; PPO-clip drops the second and the fifth
    assert [sum(found["by_ratio"][of]) for of in probes.SETS] == [6, 2, 2]
    assert found["by_ratio"]["all"] == [1, 0, 0, 1, 0, 0, 4, 0, 0]
    assert found["by_entropy"]["erc"] == [0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert found["sum_entropy"] == {"all": 4.3, "erc": 2.3, "ppo": 2.0}
    assert found["sum_ratio"] == {"all": 1.1, "erc": 0.5, "ppo": 0.5}


@pytest.mark.parametrize(
    ("gate", "dropped"), [("erc", [1, 1, 1, 1, 0, 0, 0]), ("away", [1, 0, 0, 1, 0, 0, 0]), ("random", None)]
)
def test_tokens_that_a_gate_drops(make_trainer, gate, dropped):
    trainer = make_trainer(trainer_class=partial(probes.MeasuringTrainer, gate=gate), erc_low=0.95, erc_high=1.05)
    # one completion has a positive advantage, one a negative; half of each has moved up, half down
    entropies, away, mask = torch.ones(2, 4), torch.tensor([0.05, -0.05] * 2), torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3] = False
    old_entropies = torch.tensor([[2.0, 0.5, 1.0, 1.0], [2.0, 0.5, 1.0, 9.0]])
    inputs = {"advantages": torch.tensor([1.0, -1.0]), "old_entropies": old_entropies}
    call = LossCall(inputs | {"old_per_token_logps": torch.zeros(2, 4)}, mask)
    call.logps, call.entropies = away.expand(2, 4), entropies
    trainer.on_forward(call)
    assert call.entropies is entropies
    found = call.inputs["advantages"][mask] == 0
    assert found.sum() == (sum(dropped) if dropped else 4)
    if dropped:
        assert found[[0, 1, 4, 5, 2, 3, 6]].int().tolist() == dropped


def test_entropy_probe_by_hand():
    class Uniform(torch.nn.Module):
        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 4)
            logits[:, 0] = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])
            return type("Output", (), {"logits": logits})

    probe = probes.EntropyProbe(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[-100, 1, 2, -100]]))
    probe.on_step_end(model=Uniform())
    assert probe.entropies == [pytest.approx(statistics.fmean([0.0, 1.38629]), abs=1e-5)]


def test_shared_data_trains_every_critic_on_every_completion(small_start, tmp_path, monkeypatch):
    seen = []
    original = CriticEnsemble.train_on

    def spy(self, *args, critic_of_row, **kwargs):
        seen.append(critic_of_row.tolist())
        return original(self, *args, critic_of_row=critic_of_row, **kwargs)

    monkeypatch.setattr(CriticEnsemble, "train_on", spy)
    run.train(settings.Run("arithmetic", "asyppo-shared-data", 1, 1e-3, 0), tmp_path, steps=1)
    assert [set(rows) for rows in seen] == [{0}, {1}] * (len(seen) // 2)
    assert {len(rows) for rows in seen} == {64}


def test_entropy_mask_has_the_tokens_of_lowest_entropy(small_start, tmp_path, monkeypatch):
    masks = {}

    def keep(self, output, rewards):
        on_rollout(self, output, rewards)
        masks[arm] = (output["advantage_masked"], output["old_entropies"], loss_mask(output))

    on_rollout = probes.MeasuringTrainer.on_rollout
    monkeypatch.setattr(probes.MeasuringTrainer, "on_rollout", keep)
    for arm in ("asyppo", "asyppo-entropy-mask"):
        run.train(settings.Run("arithmetic", arm, 2, 1e-3, 0), tmp_path, steps=1)
    masks = {"entropy": masks["asyppo-entropy-mask"], "value_std": masks["asyppo"]}
    chosen, entropies, mask = masks["entropy"]
    assert chosen.sum() == int(0.2 * mask.sum())
    assert entropies[chosen].max() <= entropies[mask & ~chosen].min()
    assert masks["value_std"][0].sum() == chosen.sum()
    chosen, entropies, mask = masks["value_std"]
    assert entropies[chosen].max() > entropies[mask & ~chosen].min()


def test_slopes_of_the_weights_by_hand():
    # success is 1 + 2 alpha1 - 3 alpha2, and for the second seed four times that
    def accuracy(pair, seed):
        return (4 if seed == 1 else 1) * (1 + 2 * pair[0] - 3 * pair[1])

    grid = settings.ALPHA_ARMS.items()
    runs = {pair: settings.with_seeds("arithmetic", arm, 16, settings.COMMON_LEARNING_RATE) for pair, arm in grid}
    found = {asked.name: {"accuracy": accuracy(pair, asked.seed)} for pair, of in runs.items() for asked in of}
    slopes = claims.alpha_slopes(found, "success")
    assert slopes["alpha1"] == pytest.approx([2, 8, 2, 2, 2])
    assert slopes["alpha2"] == pytest.approx([-3, -12, -3, -3, -3])


def test_interval_has_two_digits_of_its_half_width():
    # 2.776 times the standard deviation over the root of 5
    assert claims.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.000 ± 1.963"
    assert claims.interval([0.0001, 0.0002, 0.0003, 0.0004, 0.0005]) == "0.00030 ± 0.00020"
    assert claims.interval([0.5] * 5) == "0.500 ± 0.000"


def test_verdicts_by_hand():
    def verdict(expected, differences):
        return claims.Outcome(claims.Test("b", "success", "erc", "dapo", expected, ()), "", 8, differences).verdict

    up = [0.1, 0.2, 0.1, 0.2, 0.1]
    down, mixed = [-value for value in up], [0.1, -0.2, 0.1, -0.1, 0.0]
    assert [verdict("higher", values) for values in (up, down, mixed)] == ["holds", "opposite", "not resolved"]
    assert [verdict("lower", values) for values in (up, down, mixed)] == ["opposite", "holds", "not resolved"]
    assert [verdict("same", values) for values in (up, mixed)] == ["differs", "no difference seen"]


def test_clipped_tokens_are_compared_with_the_others_by_hand():
    counts = {
        "all": [4, 0, 0, 0, 4, 0, 0, 0, 2],
        "erc": [1, 0, 0, 0, 2, 0, 0, 0, 1],
        "ppo": [0, 0, 0, 0, 0, 0, 0, 0, 2],
    }
    tokens = {"by_ratio": counts, "sum_entropy": {"all": 10.0, "erc": 1.0}}
    result = {"tokens": tokens}
    assert claims.QUANTITIES["ratio of the two"](result) == pytest.approx(2.0)
    assert claims.QUANTITIES["entropy, outside - inside"](result) == pytest.approx(1 / 4 - 9 / 6)
    # 3 of the 4 outside and 3 of the 6 inside have |log ratio| of 0.1 or more
    assert claims.near_boundary(result) == pytest.approx((3 / 4) / (3 / 6))


def test_run_names():
    asked = settings.Run("corridor", "asyppo+epo", 8, 1.2e-3, 4)
    assert settings.Run.parse(asked.name) == asked
    for name in ("corridor/nothing/8/0.001/0", "arithmetic/erc/8/6e-05", "chess/erc/8/6e-05/0"):
        with pytest.raises(ValueError, match="is not task/arm"):
            settings.Run.parse(name)
        with pytest.raises(argparse.ArgumentTypeError, match="is not task/arm"):
            run._run(name)


def test_shares_are_all_arms_once():
    shares = [run._share(f"{index}/3") for index in (1, 2, 3)]
    assert sorted(arm for share in shares for arm in share) == sorted(settings.ALL_ARMS)
    with pytest.raises(argparse.ArgumentTypeError, match="not a share"):
        run._share("0/2")


def test_finished_runs_are_not_done_again(tmp_path, monkeypatch):
    done = []

    def train(asked, *args):
        done.append(asked.name)
        # the last learning rate is the best
        return {"run": asked.name, "reward": [asked.learning_rate] * 4}

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run.gc, "collect", lambda: 0)
    for _ in range(2):
        run.run_share(["erc"], tmp_path / "results.jsonl")
    found = run.read_results(tmp_path / "results.jsonl")
    assert sorted(done) == sorted(found)
    assert len(done) == len(set(done))
    for task in ("arithmetic", "spell_backward", "corridor"):
        best = settings.LEARNING_RATES[task][-1]
        assert {asked.learning_rate for asked in run.tuned_runs(task, "erc", found)} == {best}
        assert all(asked.name in found for asked in run.tuned_runs(task, "erc", found))
    assert all(asked.name in found for asked in settings.common_runs("erc"))


def test_page_has_the_tables_of_the_results(results):
    page = (STUDY / "README.md").read_text(encoding="utf-8")
    for name, table in report.tables(results).items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page, name
    assert len(settings.SEEDS) == 5
    for name in ("clipping", "entropy", "success", "alphas", "critics"):
        assert f"({name}.png)" in page
        assert (STUDY / f"{name}.png").is_file()
