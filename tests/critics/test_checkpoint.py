"""Resume is exact, the weights load without this package, and a killed save leaves the former one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForTokenClassification, LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from tests.killing import killed_at_random
from trl_entropy.critics import CriticEnsemble, state_values

ROWS, SHARDED = torch.arange(8), [4, 4]
WORKER = Path(__file__).with_name("killed_save.py")


def ensemble(make_critic, seed=0, **overrides):
    torch.manual_seed(0)
    critics = [make_critic(index + 10 * seed, **overrides) for index in range(2)]
    return CriticEnsemble(critics, learning_rate=1e-2, weight_decay=0.1, device="cpu", seed=seed)


def train(group, rollout, times):
    for _ in range(times):
        shards = group.assign(SHARDED)
        group.train_on(**vars(rollout), critic_of_row=shards, rows=ROWS, epochs=2, batch_size=2)


def states(group):
    return [critic.state_dict() for critic in group.critics]


def assert_same(first, second):
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert torch.equal(value, two[name]), name


@pytest.mark.parametrize(
    "overrides",
    [{}, {"dtype": torch.bfloat16}, {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}],
    ids=["float32", "bfloat16", "lora"],
)
def test_resume_is_exact(make_critic, rollout, tmp_path, overrides):
    straight = ensemble(make_critic, **overrides)
    train(straight, rollout, 4)
    first = ensemble(make_critic, **overrides)
    train(first, rollout, 2)
    first.save(tmp_path / "critics")
    again = ensemble(make_critic, **overrides)
    # other weights, moments and draws than the saved ones
    train(again, rollout, 1)
    again.load(tmp_path / "critics")
    train(again, rollout, 2)
    assert_same(states(straight), states(again))
    assert torch.equal(straight.assign([9] * 9), again.assign([9] * 9))
    # the load leaves what was saved untouched
    third = ensemble(make_critic, **overrides)
    third.load(tmp_path / "critics")
    assert_same(states(third), states(first))


def test_saved_before_the_first_step(make_critic, rollout, tmp_path):
    first, second = ensemble(make_critic), ensemble(make_critic, seed=1)
    first.save(tmp_path / "critics")
    train(second, rollout, 1)
    second.load(tmp_path / "critics")
    for group in (first, second):
        train(group, rollout, 2)
    assert_same(states(first), states(second))


def test_folder_loads_without_this_package(make_critic, small_critic, rollout, tmp_path):
    group = CriticEnsemble([make_critic(), small_critic], learning_rate=1e-2, device="cpu", seed=0)
    train(group, rollout, 1)
    folder = tmp_path / "run" / "critics"
    group.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["critic_0", "critic_1", "state_0.pt", "state_1.pt"]
    assert [path.name for path in folder.parent.iterdir()] == ["critics"]
    for index, critic in enumerate(group.critics):
        assert (folder / f"critic_{index}" / "model.safetensors").exists()
        loaded = AutoModelForTokenClassification.from_pretrained(folder / f"critic_{index}")
        found = state_values(loaded.eval(), rollout.input_ids, rollout.attention_mask, 6)
        assert torch.equal(found, state_values(critic, rollout.input_ids, rollout.attention_mask, 6))
        state = torch.load(folder / f"state_{index}.pt", weights_only=True)
        assert set(state) == {"weights", "steps", "exp_avg", "exp_avg_sq", "generator"}


def test_adapter_folder(make_critic, rollout, tmp_path):
    group = ensemble(make_critic, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    train(group, rollout, 1)
    group.save(tmp_path / "critics")
    saved = load_file(tmp_path / "critics" / "critic_1" / "adapter_model.safetensors")
    assert {"lora_A", "lora_B", "score"} == {
        part for name in saved for part in ("lora_A", "lora_B", "score", "mlp") if part in name
    }
    loaded = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "critics" / "critic_1", num_labels=1)
    found = state_values(loaded.eval(), rollout.input_ids, rollout.attention_mask, 6)
    assert torch.equal(found, state_values(group.critics[1], rollout.input_ids, rollout.attention_mask, 6))
    state = torch.load(tmp_path / "critics" / "state_0.pt", weights_only=True)
    assert len(state["weights"]) == len(saved)


def test_other_critics_are_refused(make_critic, small_critic, tmp_path):
    group = ensemble(make_critic)
    with pytest.raises(FileNotFoundError, match="critics were not saved"):
        group.load(tmp_path / "critics")
    group.save(tmp_path / "critics")
    one = CriticEnsemble([make_critic()], learning_rate=1e-2, device="cpu", seed=0)
    with pytest.raises(ValueError, match=r"holds 2 critics and num_critics=1"):
        one.load(tmp_path / "critics")
    other = CriticEnsemble([make_critic(), small_critic], learning_rate=1e-2, device="cpu", seed=0)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(.*\) there and \(.*, 8\) here"):
        other.load(tmp_path / "critics")


def test_saving_again_replaces_the_folder(make_critic, rollout, tmp_path):
    group = ensemble(make_critic)
    group.save(tmp_path / "critics")
    (tmp_path / "critics" / "leftover").touch()
    train(group, rollout, 1)
    group.save(tmp_path / "critics")
    again = ensemble(make_critic, seed=1)
    again.load(tmp_path / "critics")
    assert_same(states(group), states(again))
    assert not (tmp_path / "critics" / "leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["critics"]


@pytest.mark.slow
def test_killed_save_leaves_the_former_one(make_critic, tiny_model_path, tmp_path):
    """Killed while weights, a state file or the folder's name are written, then resumed and saved again."""
    former = ensemble(make_critic)
    moments = ["weights", "state", "rename"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    workers = {}
    for moment in moments:
        former.save(tmp_path / moment / "critics")
        command = [sys.executable, str(WORKER), tiny_model_path, str(tmp_path / moment / "critics"), moment]
        workers[moment] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for moment, worker in workers.items():
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == -signal.SIGKILL, errors[-4000:]
        folder = tmp_path / moment / "critics"
        assert len(list(folder.parent.iterdir())) > 1, "the worker was killed before it wrote anything"
        assert folder.exists() == (moment != "rename")
        again = ensemble(make_critic, seed=1)
        again.load(folder)
        assert_same(states(former), states(again))
        again.save(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["critics"]


def test_killed_at_random_moments_one_of_the_saves_is_there(make_critic, tmp_path):
    folder = tmp_path / "critics"
    groups = [ensemble(make_critic, seed=seed) for seed in (0, 1)]
    saved = [[critic["score.weight"] for critic in states(group)] for group in groups]
    groups[0].save(folder)
    for _ in killed_at_random(lambda: [group.save(folder) for group in groups], kills=4, longest=0.5):
        again = ensemble(make_critic, seed=2)
        again.load(folder)
        found = [critic["score.weight"] for critic in states(again)]
        assert any(all(map(torch.equal, found, weights)) for weights in saved)
    groups[0].save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["critics"]
