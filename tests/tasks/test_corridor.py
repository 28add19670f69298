"""The built-in multi-turn task: its rules, its splits, its policy, and that training on it works."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.tasks import corridor, get_task, tiny_policy
from trl_entropy.tasks.environments import Step

EPISODE = "vxw.oopopoop"
RIGHT = "ceaffjfjffjuuu"  # keys c, e, a for the locks v, x, w; walk over o, jump over p; unlock three doors


def play(actions, episode=EPISODE):
    """Observations (the first one too) and the last step of an episode."""
    environment = corridor.Corridor()
    observations, step = [environment.reset(episode)], Step("")
    for action in actions:
        assert not step.done
        step = environment.step(action)
        observations.append(step.observation)
    return observations, step


def test_the_shortest_way():
    observations, step = play(RIGHT)
    assert observations == ["vxw.k", "k", "k", *"oopopoop", "d", "d", "d", ""]
    assert step == Step("", reward=1.0, done=True, success=True)
    turns = list(corridor.demonstration(EPISODE))
    assert "".join(action for _, action in turns) == RIGHT
    assert [observation for observation, _ in turns] == observations[:-1]


def test_wrong_actions_cost_a_turn_and_nothing_else():
    observations, step = play("cea" + "j" + "f" + "f" + "f" + "jfjffj" + "k" + "uuu")
    assert observations[3:] == [*"oooppopoopdddd", ""]
    assert step.success


def test_wrong_key_is_noticed_at_its_door_only():
    observations, step = play("cba" + "ffjfjffj" + "u" + "uuuu")
    assert observations[:4] == ["vxw.k", "k", "k", "o"]
    assert observations[-6:] == ["d", "d", "x", "x", "x", "x"]
    assert not step.done


def test_any_text_is_an_action():
    observations, step = play(["", "<eos>", "car", "fast", "?"])
    assert observations == ["vxw.k", "k", "k", "o", "o", "o"]
    assert not step.done


@pytest.mark.parametrize("episode", ["vxw", "vx.oop", "vxa.oop", "vxw.odp"])
def test_bad_episodes(episode):
    with pytest.raises(ValueError, match="is not of the form"):
        corridor.Corridor().reset(episode)


def test_splits_share_no_locks():
    train, test = (corridor.load(split)["prompt"] for split in ("train", "test"))
    assert (len(set(train)), len(set(test))) == (1600, 400)
    locks = [{name[:3] for name in names} for names in (train, test)]
    assert [len(part) for part in locks] == [100, 25]
    assert not set.intersection(*locks)
    assert all(play("".join(action for _, action in corridor.demonstration(name)), name)[1].success for name in test)
    assert corridor.load("train", size=3)["prompt"] == train[:3]


def test_bad_arguments():
    with pytest.raises(ValueError, match="split='dev' is unknown"):
        corridor.load("dev")
    with pytest.raises(ValueError, match=r"size=0 is out of range. Set it to 1\.\.1600"):
        corridor.load("train", size=0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return corridor.build_policy(str(tmp_path_factory.mktemp("policy")), seed=0)


def test_policy_is_small_and_starts_at_a_quarter(policy):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000
    text = "vxw.kckekaofofpj"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text)
    input_ids, labels = corridor.demonstrations(PreTrainedTokenizerFast.from_pretrained(policy), "test")
    assert (labels != -100).sum(1).tolist() == [len(RIGHT)] * 400
    assert 0.1 < tiny_policy.repeat_probability(model, input_ids, labels).mean() < 0.5


def test_policy_leaves_the_random_state_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(corridor, "WARM_UP_SUCCESS", 0.0)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    corridor.build_policy(str(tmp_path), seed=1)
    assert torch.equal(torch.rand(2), expected)


def test_warm_up_that_fails_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_policy, "WARM_UP_MAX_STEPS", 1)
    with pytest.raises(RuntimeError, match=r"in WARM_UP_MAX_STEPS=1 steps, not 0\.25"):
        corridor.build_policy(str(tmp_path), seed=0)


def test_training_solves_it(policy, tmp_path):
    """16 rollouts of 64 episodes: from about a quarter to about two thirds, with EPO on."""
    task = get_task("corridor")
    config = EntropyGRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        num_generations=8,
        steps_per_generation=2,
        max_completion_length=1,
        max_steps=32,
        epo_coef=0.001,
    )
    with task.build_rollout() as rollout:
        trainer = EntropyGRPOTrainer(
            model=policy,
            args=config,
            reward_funcs=list(task.reward_funcs),
            train_dataset=task.load("train"),
            processing_class=PreTrainedTokenizerFast.from_pretrained(policy),
            rollout_func=rollout,
        )
        trainer.train()
    success = [entry["episode/success_rate"] for entry in trainer.state.log_history if "episode/success_rate" in entry]
    turns = [entry["episode/turns"] for entry in trainer.state.log_history if "episode/turns" in entry]
    assert len(success) == 16
    assert sum(success[-3:]) / 3 > sum(success[:3]) / 3 + 0.15
    assert all(14 <= count <= 20 for count in turns)
    assert len(trainer.active.states["epo"].turn_steps[0]) == 20
