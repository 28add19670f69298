"""The modules of the study on a pretrained model, and results that its tests make up."""

import importlib
import random
import sys

import pytest

from trl_entropy.recipes import recipes_dir

STUDY = recipes_dir() / "study" / "smollm2"
sys.path[:0] = [str(STUDY.parent), str(STUDY)]

pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")
MODULES = ("arms", "compare", "curves", "page", "paired", "plan", "problems", "products", "registered", "train")
modules = map(importlib.import_module, MODULES)
arms, compare, curves, page, paired, plan, problems, products, registered, train = modules
first_rollout = importlib.import_module("first_rollout")


def fake(run, **others):
    """A result that depends on the run alone, with entropy that falls and reward that rises."""
    drawn = random.Random(run.name)
    level = 0.5 + 0.15 * (run.arm == "clip-higher") + 0.01 * drawn.random()
    result = {
        "run": run.name,
        "reward": [level * min(1.0, index / 6) for index in range(12)],
        "entropy": [2.0 * 0.7**index for index in range(12)],
        "grad_norm": [drawn.random() for _ in range(96)],
        "tokens": {"by_ratio": {"all": [8, 2], "erc": [1, 1], "ppo": [0, 1]}},
        "pass": {str(k): min(1.0, level * k**0.2) for k in arms.PASS_AT},
        "cpu_seconds": 60.0,
        "explained_variance": 0.1,
    }
    return result | others


def whole_results(**others):
    """Every run that is planned, also those of arms that the runs before them choose; 1e-5 is each one's best rate."""
    results = {}
    for run in plan.plan(results):
        if run.name not in results:
            level = fake(run) | {"reward": [0.9 if run.learning_rate == 1e-5 else 0.1] * 12}
            results[run.name] = others.get(run.arm, lambda result: result)(level)
    return results
