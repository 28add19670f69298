"""Two processes train, save and resume with every control, unsharded (DDP) and sharded (FSDP2, DeepSpeed).

DeepSpeed's cases need `pip install deepspeed`.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from .conftest import Runs
from .training_worker import POLICIES

pytestmark = pytest.mark.slow
needs_deepspeed = (
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
)
KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "deepspeed-zero2": "DEEPSPEED", "deepspeed-zero3": "DEEPSPEED"}
SHARDED_WEIGHTS = ("fsdp2", "deepspeed-zero3")
CONFIGS = [pytest.param(name, marks=needs_deepspeed if "deepspeed" in name else ()) for name in KINDS]
TIMES = ("step_time", "epoch", "_runtime", "_per_second")

Trained = Callable[[str], Runs]
each_config = pytest.mark.parametrize("config", CONFIGS)
WARM_UP = {"asyppo": 16}
"""Completions of each process on which the critics alone train first."""
each_policy = pytest.mark.parametrize("policy", POLICIES)


def steps(ended: dict[str, Any]) -> list[dict[str, Any]]:
    """The log of the training steps, without what depends on the clock."""
    entries = [entry for entry in ended["log"] if "loss" in entry]
    return [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in entries]


@each_config
@each_policy
def test_the_processes_share_the_work(trained: Trained, config: str, policy: str) -> None:
    for ended in trained(config).ended[f"{policy}-whole"]:
        assert (ended["processes"], ended["kind"]) == (2, KINDS[config])
        assert ended["sharded"] == (list(ended["weights"]) if config in SHARDED_WEIGHTS else [])
    first, second = (ended["sampled"] for ended in trained(config).ended[f"{policy}-whole"])
    # two rollouts of 16 completions, two evaluations of 4
    assert len(first) == len(second) == WARM_UP.get(policy, 0) + 2 * 16 + 2 * 4
    assert first != second


@each_config
@each_policy
def test_every_control_acts(trained: Trained, config: str, policy: str) -> None:
    logs = [steps(ended) for ended in trained(config).ended[f"{policy}-whole"]]
    assert [entry["step"] for entry in logs[0]] == [1, 2, 3, 4, 5, 6]
    for key in ("erc/clip_fraction", "ce_gppo/low_fraction", "ce_gppo/high_fraction", "epo/outside_fraction"):
        assert max(entry.get(key, 0.0) for entry in logs[0]) > 0.0, key
    assert all(entry["positive_nll/token_fraction"] > 0.0 for entry in logs[0])
    assert all(math.isfinite(value) for entry in logs[0] for value in entry.values())
    if policy == "asyppo":
        assert all(entry["asyppo/value_std"] > 0.0 for entry in logs[0])
    # means over the global batch, hence the same on both
    names = [key for key in logs[0][1] if key.startswith(("erc/", "ce_gppo/", "ppo_clip/", "epo/", "positive_nll/"))]
    assert [logs[0][1][name] for name in names] == [logs[1][1][name] for name in names]


@each_config
@each_policy
def test_both_processes_have_the_same_new_weights(trained: Trained, config: str, policy: str) -> None:
    first, second = trained(config).ended[f"{policy}-whole"]
    for name, start in first["start"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        trains = policy != "lora" or "lora_" in name
        assert torch.equal(first["weights"][name], start) != trains, name


@each_config
@each_policy
def test_resume_equals_an_uninterrupted_run(trained: Trained, config: str, policy: str) -> None:
    """The checkpoint is in the middle of a rollout of four steps: 3 + 3 steps end at the weights of 6."""
    ended = trained(config).ended
    for whole, resumed in zip(ended[f"{policy}-whole"], ended[f"{policy}-resumed"], strict=True):
        assert steps(resumed) == steps(whole)
        # the rollout in use came from the checkpoint, the next one was sampled anew
        assert resumed["sampled"] == whole["sampled"][WARM_UP.get(policy, 0) + 16 + 4 :]
        for name, weights in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], weights), name


@each_config
@each_policy
def test_a_checkpoint_is_declared_complete_after_the_slowest_process(
    trained: Trained, config: str, policy: str
) -> None:
    """`trainer_state.json` declares it, and the second process is slow to save its random state."""
    assert [ended["lacking"] for ended in trained(config).ended[f"{policy}-whole"]] == [[], []]


@each_config
@each_policy
def test_a_checkpoint_has_the_rollout_of_each_process(trained: Trained, config: str, policy: str) -> None:
    run = trained(config).folder / f"{policy}-whole"
    first, second = (torch.load(run / f"checkpoint-3/rollout_rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["step"] == second["step"] == 3
    completions = [[batch["completion_ids"].tolist() for batch in half["buffered_inputs"]] for half in (first, second)]
    assert completions[0] != completions[1]
    later = [torch.load(run / f"checkpoint-6/rollout_rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    histories = [half["controls"]["epo"]["steps"] for half in later]
    assert len(histories[0]) == 1  # the rollout of steps 1 to 4
    assert histories[0] == histories[1]


@pytest.mark.parametrize("config", CONFIGS[1:])
@each_policy
def test_sharding_changes_rounding_only(trained: Trained, config: str, policy: str) -> None:
    for plain, sharded in zip(
        trained("ddp").ended[f"{policy}-whole"], trained(config).ended[f"{policy}-whole"], strict=True
    ):
        assert sharded["sampled"] == plain["sampled"]
        for expected, found in zip(steps(plain), steps(sharded), strict=True):
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
        for name, weights in plain["weights"].items():
            torch.testing.assert_close(sharded["weights"][name], weights, rtol=0, atol=1e-4)
