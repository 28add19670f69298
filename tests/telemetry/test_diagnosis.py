"""The rules, each on a made log that has the fault and on logs that lack it; the callback that warns."""

import math
import random
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from trl_entropy import AsyPPOConfig, AsyPPOTrainer, DiagnosisCallback
from trl_entropy.controls import health
from trl_entropy.telemetry.diagnosis import RULES, diagnose, num_swings

STEPS, SHORT = 40, 15


def log_of(every: int = 1, entries: int = STEPS, **metrics: Any) -> list[dict[str, Any]]:
    """An entry every few steps; a metric is a number, or a function of the share of the run that is over."""
    return [
        {"step": every * entry, **{name: of(entry / entries) if callable(of) else of for name, of in metrics.items()}}
        for entry in range(1, entries + 1)
    ]


def renamed(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`ce_gppo_low_fraction` cannot be a keyword with a slash: `__` stands for it."""
    return [{key.replace("__", "/"): value for key, value in entry.items()} for entry in log]


HEALTHY = {
    "reward": lambda done: 0.3 + 0.3 * done,
    "entropy": lambda done: 0.6 - 0.3 * done,
    "grad_norm": lambda done: 1.0 + 0.5 * done,
    "frac_reward_zero_std": 0.3,
    "erc__clip_fraction": 0.2,
    "ce_gppo__low_fraction": 0.001,
    "ce_gppo__high_fraction": 0.0,
}
CLASSIC_CLIP = {name: value for name, value in HEALTHY.items() if not name.startswith("ce_gppo")}
CRITICS = {**CLASSIC_CLIP, "asyppo__explained_variance": 0.3}
FAULTS: dict[str, list[dict[str, Any]]] = {
    "entropy_collapse": [{**HEALTHY, "entropy": lambda done: 0.6 * 0.01**done}],
    "entropy_explosion": [{**HEALTHY, "entropy": lambda done: 0.5 + 1.5 * done}],
    "entropy_oscillation": [{**HEALTHY, "entropy": lambda done: 0.5 + 0.2 * math.sin(20 * done)}],
    "clip_never_acts": [
        {**HEALTHY, "erc__clip_fraction": 0.0},
        {**HEALTHY, "ce_gppo__low_fraction": 0.0},
    ],
    "clip_removes_most": [
        {**HEALTHY, "erc__clip_fraction": lambda done: 0.3 + 0.4 * done},
        {**CLASSIC_CLIP, "ppo_clip__low_fraction": 0.3, "ppo_clip__high_fraction": 0.3},
        {**CLASSIC_CLIP, "clip_ratio__region_mean": 0.6},
        {**HEALTHY, "par__dropped_fraction": 0.6},
    ],
    "clip_is_rounding": [
        {**HEALTHY, "erc__rounding_fraction": 0.06},
        # logged once a rollout of eight steps
        {**HEALTHY, "erc__rounding_fraction": lambda done: 0.15 if round(done * STEPS) % 8 == 1 else None},
    ],
    "ce_gppo_runaway": [{**HEALTHY, "reward": lambda done: 0.5 * (1 - done), "grad_norm": lambda done: 1 + 3 * done}],
    "ce_gppo_loop_at_bound": [{**HEALTHY, "ce_gppo_loop__actuator": 1.0, "ce_gppo_loop__error": 0.1}],
    "par_at_bound": [
        {**HEALTHY, "par__actuator": 0.0, "par__error": -0.1},
        {**HEALTHY, "par__actuator": 1.0, "par__error": 0.1},
    ],
    "entropic_at_bound": [
        {**HEALTHY, "entropic__actuator": -1.0, "entropic__error": -0.1},
        {**HEALTHY, "entropic__actuator": lambda done: min(2 * done, 1.0), "entropic__error": 0.1},
    ],
    "nothing_between_the_bounds": [{**HEALTHY, "clip_cov__candidate_fraction": 0.0}],
    "stare_does_not_hold": [{**HEALTHY, "stare__gate": 1.0, "stare__entropy": lambda done: 0.3 - 0.2 * done}],
    "critic_explains_nothing": [
        {**CRITICS, "asyppo__explained_variance": 0.01},
        {**CRITICS, "asyppo__explained_variance": lambda done: 0.2 - 0.5 * done},
    ],
    "returns_do_not_vary": [
        {**CRITICS, "asyppo__explained_variance": math.nan, "frac_reward_zero_std": 1.0},
        {**CRITICS, "asyppo__explained_variance": None, "frac_reward_zero_std": 1.0},
        {**CRITICS, "asyppo__explained_variance": lambda done: math.nan if round(done * STEPS) % 3 == 0 else 0.3},
    ],
    "groups_without_variance": [{**HEALTHY, "frac_reward_zero_std": lambda done: 0.3 + 0.4 * done}],
}
LACKS: dict[str, list[dict[str, Any]]] = {
    # to a third, which a run that learns reaches
    "entropy_collapse": [{**HEALTHY, "entropy": lambda done: 0.6 - 0.4 * done}],
    "entropy_explosion": [{**HEALTHY, "entropy": lambda done: 0.5 + 0.4 * done}],
    "entropy_oscillation": [
        {**HEALTHY, "entropy": lambda done: 0.5 + 0.05 * math.sin(20 * done)},
        {**HEALTHY, "entropy": lambda done: 0.5 + 0.2 * math.sin(6 * done)},  # one swing each way
    ],
    "clip_never_acts": [
        {**HEALTHY, "erc__clip_fraction": lambda done: float(done == 0.5) / 1000},
        {"reward": 0.5, "clip_ratio__region_mean": 0.0},  # TRL's own clip may idle: nobody switched it on
    ],
    "clip_removes_most": [
        {**CLASSIC_CLIP, "ppo_clip__low_fraction": 0.2, "ppo_clip__high_fraction": 0.2},
        # CE-GPPO gives these tokens their gradient back
        {**HEALTHY, "ppo_clip__low_fraction": 0.3, "ppo_clip__high_fraction": 0.3},
    ],
    "clip_is_rounding": [
        {**HEALTHY, "erc__rounding_fraction": 0.04},
        {**HEALTHY, "erc__rounding_fraction": 0.05},  # a quarter, and no more
        {
            **HEALTHY,
            "erc__clip_fraction": 0.0,
            "erc__rounding_fraction": 0.1,
        },  # no update yet off the rollout's policy
        CLASSIC_CLIP,
    ],
    "ce_gppo_runaway": [
        {**HEALTHY, "reward": lambda done: 0.5 * (1 - done)},
        {**HEALTHY, "grad_norm": lambda done: 1 + 3 * done},
        {**CLASSIC_CLIP, "reward": lambda done: 0.5 * (1 - done), "grad_norm": lambda done: 1 + 3 * done},
    ],
    "ce_gppo_loop_at_bound": [{**HEALTHY, "ce_gppo_loop__actuator": -1.0, "ce_gppo_loop__error": 0.1}],
    "par_at_bound": [
        {**HEALTHY, "par__actuator": 0.5, "par__error": -0.1},
        {**HEALTHY, "par__actuator": 0.0},  # by a schedule
    ],
    "entropic_at_bound": [
        {**HEALTHY, "entropic__actuator": -1.0, "entropic__error": 0.1},  # on its way
        {**HEALTHY, "entropic__actuator": lambda done: 0.99 * min(2 * done, 1.0), "entropic__error": 0.1},
    ],
    "nothing_between_the_bounds": [HEALTHY, {**HEALTHY, "clip_cov__candidate_fraction": lambda done: 0.1 * done}],
    "stare_does_not_hold": [
        {**HEALTHY, "stare__gate": 1.0, "stare__entropy": 0.2},
        {
            **HEALTHY,
            "stare__gate": lambda done: float(done != 0.9),
            "stare__entropy": lambda done: 0.3 - 0.2 * done,
        },
    ],
    "critic_explains_nothing": [CRITICS],
    "returns_do_not_vary": [
        CRITICS,
        {**CRITICS, "asyppo__explained_variance": lambda done: math.nan if done < 0.5 else 0.3},  # it has learnt
    ],
    "groups_without_variance": [
        {**HEALTHY, "frac_reward_zero_std": 0.45},
        {**CRITICS, "frac_reward_zero_std": 0.7},
    ],
}


def rules_of(metrics: dict[str, Any], entries: int = STEPS) -> list[str]:
    return [finding.rule for finding in diagnose(renamed(log_of(**metrics))[:entries])]


def test_every_rule_has_both_tests() -> None:
    names = {rule.__name__ for rule in RULES}
    assert names == set(FAULTS) == set(LACKS)


@pytest.mark.parametrize(("rule", "metrics"), [(rule, log) for rule, logs in FAULTS.items() for log in logs])
def test_fault_is_found_and_nothing_else(rule: str, metrics: dict[str, Any]) -> None:
    assert rules_of(metrics) == [rule]


@pytest.mark.parametrize(("rule", "metrics"), [(rule, log) for rule, logs in LACKS.items() for log in logs])
def test_run_without_the_fault_is_not_accused(rule: str, metrics: dict[str, Any]) -> None:
    assert rule not in rules_of(metrics)


@pytest.mark.parametrize("metrics", [HEALTHY, CLASSIC_CLIP, CRITICS], ids=["controls", "clip", "critics"])
def test_healthy_run_has_no_finding(metrics: dict[str, Any]) -> None:
    assert rules_of(metrics) == []


@pytest.mark.parametrize("rule", FAULTS)
def test_short_log_is_not_judged(rule: str) -> None:
    assert rules_of(FAULTS[rule][0], entries=SHORT) == []


# of `trl-entropy quickstart --model smollm2-135m`, nats, an entry for a rollout of eight steps
COLLAPSED = (1.75, 1.47, 0.63, 0.34, 0.25, 0.20, 0.11, 0.16)
SHARPENED = (1.74, 1.52, 1.02, 0.79, 0.58, 0.40, 0.41, 0.36)


@pytest.mark.parametrize(
    ("entropies", "every", "found"),
    [
        (COLLAPSED, 8, ["entropy_collapse"]),
        (SHARPENED, 8, []),
        (COLLAPSED[:7], 8, []),  # too few
        (COLLAPSED, 1, []),  # one rollout
        ([1.0] * 6 + [0.0] * 2, 2, []),  # a rollout is four entries
        ([1.0] * 6 + [0.0] * 2, 4, ["entropy_collapse"]),
        ([value for value in COLLAPSED for _ in range(3)], 8, ["entropy_collapse"]),
        ([1.0] * 31 + [0.0], 100, []),  # of a long log, one entry does not decide
        ([1.0] * 29 + [0.0] * 3, 100, []),
        ([1.0] * 24 + [0.0] * 8, 100, ["entropy_collapse"]),
    ],
)
def test_an_entry_of_several_steps_counts_as_them(entropies: Any, every: int, found: list[str]) -> None:
    log = log_of(every, len(entropies), entropy=lambda done: entropies[round(done * len(entropies)) - 1])
    summary = {"step": log[-1]["step"], "train_runtime": 1.0}
    assert [finding.rule for finding in diagnose([*log, summary])] == found


@pytest.mark.parametrize(
    ("every", "steps", "evaluations"),
    [(10, 151, ()), (20, 301, ()), (10, 101, ()), (8, 65, ()), (100, 1001, ()), (10, 100, (33, 66, 99))],
)
def test_entries_at_odd_steps_hide_nothing(every: int, steps: int, evaluations: tuple[int, ...]) -> None:
    """A last step beyond the last entry, whose summary has no metric of the training, and evaluations between."""
    log = [{"step": at, "entropy": 2 * math.exp(-6 * at / steps)} for at in range(every, steps + 1, every)]
    log += [{"step": at, "eval_reward": 0.5} for at in evaluations]
    log.sort(key=lambda entry: entry["step"])
    log.append({"step": steps, "train_runtime": 1.0})
    assert health.long_enough(log)
    assert [finding.rule for finding in diagnose(log)] == ["entropy_collapse"]


def test_finding_names_numbers_and_fields() -> None:
    (finding,) = diagnose(renamed(log_of(**FAULTS["ce_gppo_runaway"][0])))
    # reward 0.5 (1 - done): the best window is the first, steps 1 to 8, the last is steps 33 to 40
    assert "from 0.444 to 0.0438" in finding.seen
    assert "ce_gppo_alpha1" in finding.remedy
    assert str(finding) == f"{finding.seen} {finding.remedy}"


@pytest.mark.parametrize(("explained", "remedy"), [(0.01, "a larger critic_"), (-0.1, "a smaller critic_")])
def test_critics_that_fit_noise_are_told_the_opposite_of_those_that_learn_nothing(
    explained: float, remedy: str
) -> None:
    (finding,) = diagnose(renamed(log_of(**CRITICS | {"asyppo__explained_variance": explained})))
    assert f"explain {explained:.1%}" in finding.seen
    assert [text in finding.remedy for text in ("a larger critic_", "a smaller critic_")] == [
        remedy == "a larger critic_",
        remedy == "a smaller critic_",
    ]


def test_values_that_are_no_numbers_are_passed_over() -> None:
    log = renamed(log_of(**FAULTS["entropy_collapse"][0]))
    hostile: list[Any] = [math.nan, math.inf, None, "0.5", [1]]
    assert [finding.rule for finding in diagnose([*log, *({"entropy": value} for value in hostile)])] == [
        "entropy_collapse"
    ]


@pytest.mark.parametrize(
    ("values", "swings"),
    [
        ([0, 1, 2, 3], 0),
        ([3, 2, 1, 0], 0),
        ([0, 2, 0], 1),
        ([0, 2, 0, 2], 2),
        ([0, 2, 1.5, 2.5, 1.8], 0),  # reversals of less than 1
        ([0, 2, 1.5, 1.1, 0.9, 3], 2),  # 2 to 0.9 in small steps, then up
    ],
)
def test_swings_are_reversals_of_their_size(values: list[float], swings: int) -> None:
    assert num_swings(values, 1.0) == swings


def test_noise_is_no_oscillation() -> None:
    noise = random.Random(0)
    assert rules_of({"entropy": lambda done: 0.5 + noise.gauss(0, 0.03)}) == []


def log_state(entries: list[dict[str, Any]], main: bool = True) -> Any:
    return SimpleNamespace(log_history=entries, is_world_process_zero=main, global_step=entries[-1]["step"])


def test_callback_warns_once_per_finding() -> None:
    log, callback = renamed(log_of(**FAULTS["entropy_collapse"][0])), DiagnosisCallback()
    with pytest.warns(UserWarning, match=r"Step 40: Entropy collapse: .* Try ce_gppo_alpha2") as caught:
        callback.on_log(None, log_state(log), None)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_log(None, log_state(log), None)
    other = renamed(log_of(**FAULTS["groups_without_variance"][0]))
    with pytest.warns(UserWarning, match="groups have the same reward"):
        callback.on_log(None, log_state(other), None)


def test_callback_is_silent_on_other_processes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiagnosisCallback().on_log(None, log_state(renamed(log_of(**FAULTS["entropy_collapse"][0])), False), None)


def test_callback_warns_in_a_training(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MIN_ENTRIES", 3)
    monkeypatch.setattr(health, "WINDOW", 1)
    on_policy = {"steps_per_generation": 1, "max_steps": 3, "learning_rate": 1e-6}
    with pytest.warns(UserWarning, match="ERC will do nothing"):
        trainer = make_trainer(erc_low=0.95, erc_high=1.05, callbacks=[DiagnosisCallback()], **on_policy)
    with pytest.warns(UserWarning, match="Step 3: ERC never acted"):
        trainer.train()


def test_equal_returns_are_found_in_a_training_with_critics(
    make_trainer: Any, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MIN_ENTRIES", 3)
    monkeypatch.setattr(health, "WINDOW", 1)
    trainer = make_trainer(
        trainer_class=partial(AsyPPOTrainer, critics=tiny_model_path),
        config_class=AsyPPOConfig,
        reward_funcs=lambda prompts, **columns: [0.0] * len(prompts),
        callbacks=[DiagnosisCallback()],
        steps_per_generation=1,
        max_steps=3,
        learning_rate=1e-6,
        entropy_filter_fraction=0.0,
    )
    with pytest.warns(UserWarning, match="Step 3: In 100% of the last rollouts all returns are equal"):
        trainer.train()
