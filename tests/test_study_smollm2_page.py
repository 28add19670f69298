"""The page of the study on a pretrained model follows from its results, and its tests are those of the textbooks."""

import random
import re
import warnings

import pyarrow as pa
import pytest

from tests.smollm2_study import (
    STUDY,
    arms,
    compare,
    curves,
    fake,
    first_rollout,
    page,
    paired,
    plan,
    train,
    whole_results,
)
from trl_entropy.telemetry.record import TokenRecord


def test_numbers_that_are_none_are_left_out():
    runs = {
        f"sums/{arm}/1e-05/{seed}": fake(arms.Run("sums", arm, 1e-5, seed)) for arm in arms.MAIN for seed in (0, 1, 2)
    }
    runs["sums/erc/1e-05/0"]["pass"]["1"] = float("nan")
    runs["sums/erc/1e-05/1"]["grad_norm"] = [0.0] * 96
    runs["sums/erc/1e-05/2"]["grad_norm"] = [float("nan")] * 96
    assert len(compare.compare(runs, "pass@1", "erc", "ppo-clip", rates="common rate").differences) == 2
    spread = compare.compare(runs, "gradient norm, relative spread", "erc", "ppo-clip", rates="common rate")
    assert len(spread.differences) == 2
    assert all(page.tables(runs).values())


def test_students_t_by_its_tables():
    for degrees, t in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228)):
        assert paired.t_quantile(degrees) == pytest.approx(t, abs=1e-3)
        assert paired.t_probability(t, degrees) == pytest.approx(0.05, abs=1e-4)
    five = paired.Paired((1.0, 2.0, 3.0, 4.0, 5.0))
    # 2.776 times the standard deviation 1.581 over the root of 5; t = 3 / 0.7071 = 4.243
    assert str(five) == "+3.000 ± 1.963 (5)"
    assert five.probability == pytest.approx(0.0132, abs=1e-4)


def test_holm_by_hand():
    # the smallest times 4, the next times 3, and never below the one before
    assert paired.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_entropy_at_equal_reward_by_hand():
    own = {"reward": [0.0, 0.4, 0.8, 0.8, 0.8], "entropy": [2.0, 1.8, 1.6, 1.4, 1.2]}
    other = {"reward": [0.0, 0.0, 0.0, 0.8, 0.8], "entropy": [2.0, 1.0, 0.8, 0.4, 0.2]}
    # means of four: own 0, 0.2, 0.4, 0.5, 0.7; other 0, 0, 0, 0.2, 0.4: both reach 0.4, at the third and the fifth
    assert compare.entropies_at_equal_reward(own, other) == pytest.approx((1.8, 0.6))


def test_verdicts_by_hand():
    def outcome(expected, differences, adjusted):
        test = compare.Test("pass@1", "erc", "ppo-clip", expected)
        return compare.Outcome(test, paired.Paired(differences) if differences else None, adjusted).verdict

    assert outcome("higher", (0.1, 0.2), 0.01) == "holds"
    assert outcome("lower", (0.1, 0.2), 0.01) == "opposite"
    assert outcome("higher", (0.1, 0.2), 0.06) == "not resolved"
    assert outcome("higher", (), 1.0) == "not run"


def test_the_last_claim_needs_the_seeds_that_had_no_part_in_choosing():
    runs = {}
    for seed in range(10):
        for arm, level in (("ppo-clip", 0.5), ("kl", 0.6), ("epo", 0.4)):
            run = arms.Run("sums", arm, 1e-5, seed)
            passes = level + 0.001 * random.Random(run.name).random()
            runs[run.name] = fake(run) | {"pass": dict.fromkeys(map(str, arms.PASS_AT), passes)}
    found = compare.beating(runs, "pass@1", "common rate", ["kl", "epo"])
    assert found.holds
    assert found.best == found.top.test.arm == "kl"
    assert set(found.family) == {"kl", "epo"}
    assert len(found.first.differences) == len(found.later.differences) == 5
    # as good over all ten seeds, but in the last five no better than PPO-clip
    for seed in range(5, 10):
        runs[f"sums/kl/1e-05/{seed}"]["pass"]["1"] = 0.5 + 0.01 * (-1) ** seed
    found = compare.beating(runs, "pass@1", "common rate", ["kl", "epo"])
    assert found.best == "kl"
    assert found.top.adjusted < compare.LEVEL
    assert not found.holds
    assert not compare.beating(runs, "pass@1", "common rate", ["epo"]).holds  # below
    fewer = {name: run for name, run in runs.items() if name != "sums/kl/1e-05/9"}
    assert set(compare.beating(fewer, "pass@1", "common rate", ["kl", "epo"]).family) == {"epo"}


def test_page_of_partial_results_says_what_is_missing():
    partial = {}
    for run in plan.remaining({})[:40]:
        partial[run.name] = fake(run)
    found = page.tables(partial)
    assert "| finished | 40 |" in found["state"]
    assert "`erc-float32` 16" in found["state"]
    assert "without bfloat16 instructions" not in found["state"]
    name = next(iter(partial))
    emulated = page.state_table(partial | {name: partial[name] | {"products": "float32"}})
    assert "without bfloat16 instructions | 1 |" in emulated
    assert "`ppo-clip` 22" in found["state"]
    assert "**" in found["arms at the common rate"]
    assert found["arms at own rates"] == "Not run yet."
    assert "`dppo`" not in found["arms at the common rate"]
    assert "collapsed: yes" in found["regime"]
    assert "undecided" in page.tables({name: run for name, run in partial.items() if name[-1] in "01"})["regime"]
    higher = next(line for line in found["symptoms"].splitlines() if "`clip-higher`" in line and "pass@1" in line)
    assert re.search(r"\+0\.1\d\d ± 0\.0\d\d \(5\) \| common rate \| better", higher)
    assert all(made for made in page.tables({}).values())


def test_seeds_that_end_below_the_model_are_counted():
    found = {
        arms.base_run("sums").name: fake(arms.base_run("sums"), **{"pass": dict.fromkeys(map(str, arms.PASS_AT), 0.3)})
    }
    for seed, passes in enumerate((0.2, 0.3, 0.4)):  # the second is the model's own
        run = arms.Run("sums", "kl", 1e-5, seed)
        found[run.name] = fake(run, **{"pass": dict.fromkeys(map(str, arms.PASS_AT), passes)})
    assert page.values_table(found, "common rate").splitlines()[-1].endswith("| 1 of 3 |")
    del found[arms.base_run("sums").name]
    assert page.values_table(found, "common rate").endswith("| - of 3 |")


def test_figures_of_no_results_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curves.curves_figure({}, tmp_path)
        curves.effects_figure({}, tmp_path)


def test_page_of_whole_results_decides_every_claim(tmp_path):
    whole = whole_results()
    found = page.tables(whole)
    assert "not run" not in found["claims"].lower()
    assert "so far" not in found["claims"]
    assert re.search(r"^\| 18 \| .*\| holds \|", found["claims"], re.MULTILINE)
    assert "| missing, at least | 0 |" in found["state"]
    assert "earlier runs" not in found["state"]
    assert re.search(r"^\| pass@1 \| own rate \| `clip-higher` .*\| `clip-higher` \|", found["best"], re.MULTILINE)
    assert "`best`" in found["arms at own rates"]
    curves.curves_figure(whole, tmp_path)
    curves.effects_figure(whole, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"curves.png", "effects.png"}


def test_page_has_the_tables_of_the_results():
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    for name, table in page.tables(*map(train.read_results, (train.RESULTS, page.SET_ASIDE))).items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in text, name
    for name in ("curves", "effects"):
        assert f"({name}.png)" in text
        assert (STUDY / f"{name}.png").is_file()


def test_tokens_of_the_first_rollout_are_counted_by_hand():
    # a sampled token of the first step, one of a whole completion, one without advantage; then those that count
    rows = [(1, False, 1.0, 0.0, 9.0), (2, True, 1.0, 0.0, 9.0), (2, False, 0.0, 0.0, 9.0)]
    rows += [(2, False, 1.0, 1.1, 1.1), (3, False, 2.0, 0.0, 0.4), (8, False, 1.0, 0.0, 0.5)]
    rows += [(2, False, -1.0, -0.9, 0.9)]
    names = ("step", "whole", "A", "gradient", "ratio")
    record = TokenRecord(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), {})
    assert first_rollout.counts(record) == {
        "rewarded": {"tokens": 3, "dropped": 2, "ratio": 0.5},
        "others": {"tokens": 1, "dropped": 0, "ratio": 0.9},
    }


def test_page_has_the_table_of_the_first_rollout():
    counted = train.read_results(first_rollout.COUNTED)
    made = first_rollout.first_rollout_table(counted, train.read_results(train.RESULTS))
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert f"<!-- {first_rollout.MARKER} -->\n{made}\n<!-- end -->" in text
    for seed in arms.SEEDS:  # the arms see the same completions
        found = [counted[f"sums/{arm}/1e-05/{seed}"] for arm in first_rollout.COMPARED]
        assert len({(one["rewarded"]["tokens"], one["others"]["tokens"]) for one in found}) == 1
    # what the page says of the rollouts after it
    rewards = {arm: [_rewards(arm, seed) for seed in (2, 3, 4)] for arm in ("ppo-clip", "erc")}
    highest = {arm: [round(max(found[1:4]), 2) for found in rewards[arm]] for arm in rewards}
    assert highest == {"ppo-clip": [0.08, 0.81, 0.16], "erc": [0.02, 0.02, 0.02]}
    assert max(max(found[1:]) for found in rewards["erc"][1:]) == 0.25


def _rewards(arm, seed):
    return train.read_results(train.RESULTS)[f"sums/{arm}/1e-05/{seed}"]["reward"]


def test_runs_begin_as_the_shorter_or_longer_ones_that_were_set_aside():
    found, kept = map(train.read_results, (train.RESULTS, page.SET_ASIDE))
    assert {len(run["reward"]) for run in kept.values()} == {12, 36}
    trials = [run["reward"] for run in kept.values() if len(run["reward"]) == 36]
    rises = {length: compare.finite(compare.rise(reward[:length]) for reward in trials) for length in (12, 24)}
    assert {length: str(found) for length, found in rises.items()} == {
        12: "-0.014 ± 0.191 (4)",
        24: "+0.005 ± 0.144 (4)",
    }
    for name in found.keys() & kept.keys():
        for curve in ("reward", "entropy", "grad_norm"):
            both = min(len(found[name][curve]), len(kept[name][curve]))
            if arms.Run.parse(name).arm == "epo":  # its smoothing weight decays over the whole run
                both = 1
            assert found[name][curve][:both] == kept[name][curve][:both], name
