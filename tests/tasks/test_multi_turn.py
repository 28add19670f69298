"""The rollout of episodes: tokens, masks, limits, crashes, and its reward."""

import gc
import math

import pytest

from tests.tasks.countdown import Countdown, decoded, rollout, stub_trainer
from trl_entropy.tasks.multi_turn import episode_reward


def test_episodes_become_completions(tiny_tokenizer):
    trainer = stub_trainer(tiny_tokenizer, [["ab<eos>", "c"], ["d"], ["e<eos>"]])
    output = rollout()(["3", "1"], trainer)
    # the second episode ends without an end-of-sequence token of its own, and gets one that does not count
    assert decoded(tiny_tokenizer, output) == ["ab<eos>bdde<eos>", "c<eos>"]
    assert output["env_mask"] == [[1, 1, 1, 0, 1, 0, 1, 1], [1, 0]]
    assert [tiny_tokenizer.decode(ids) for ids in output["prompt_ids"]] == ["3=", "1="]
    assert trainer.calls == [["3=", "1="], ["3=ab<eos>b"], ["3=ab<eos>bdd"]]
    assert [environment.actions for environment in Countdown.made] == [["ab", "d", "e"], ["c"]]
    assert output["episode_return"] == [0.75, 0.25]
    assert output["success"] == [True, True]
    assert output["episode_turns"] == [3, 1]
    assert output["logprobs"] is None


def test_observations_have_log_prob_zero(tiny_tokenizer):
    trainer = stub_trainer(tiny_tokenizer, [["ab", "c"], ["d"]], logprobs=True)
    output = rollout()(["2", "1"], trainer)
    assert decoded(tiny_tokenizer, output) == ["abbd<eos>", "c<eos>"]
    assert output["logprobs"] == [[-0.1, -0.2, 0.0, -0.1, 0.0], [-0.1, 0.0]]


def test_turn_limit_ends_the_episode_unsolved(tiny_tokenizer):
    output = rollout(max_turns=2)(["3"], stub_trainer(tiny_tokenizer, [["a"], ["b"]]))
    assert decoded(tiny_tokenizer, output) == ["aab<eos>"]
    assert (output["episode_return"], output["success"], output["episode_turns"]) == ([0.5], [False], [2])


@pytest.mark.parametrize(
    ("limit", "completion", "mask", "actions"),
    [
        (6, "aaabcd", [1, 0, 1, 1, 1, 1], ["a"]),  # the second turn, abcde, is cut and not carried out
        (7, "aaabcde", [1, 0, 1, 1, 1, 1, 1], ["a", "abcde"]),  # it fits, and then there is no room for the answer
        (8, "aaabcde", [1, 0, 1, 1, 1, 1, 1], ["a", "abcde"]),  # nor for a turn after it
        (9, "aaabcdeeb", [1, 0, 1, 1, 1, 1, 1, 0, 1], ["a", "abcde", "b"]),
        (10, "aaabcdeeb<eos>", [1, 0, 1, 1, 1, 1, 1, 0, 1, 0], ["a", "abcde", "b"]),
    ],
)
def test_token_limit(tiny_tokenizer, limit, completion, mask, actions):
    turns = [["a"], ["abcde"], ["b"]]
    output = rollout(max_episode_tokens=limit)(["3"], stub_trainer(tiny_tokenizer, turns))
    assert decoded(tiny_tokenizer, output) == [completion]
    assert output["env_mask"] == [mask]
    assert Countdown.made[0].actions == actions
    assert output["success"] == [len(actions) == 3]


def test_prompt_limit_keeps_the_end(tiny_tokenizer):
    output = rollout(max_prompt_length=2)(["111"], stub_trainer(tiny_tokenizer, [["a"]] * 5))
    assert [tiny_tokenizer.decode(ids) for ids in output["prompt_ids"]] == ["1="]


def test_crashed_episode_is_discarded_and_its_environment_replaced(tiny_tokenizer, caplog):
    play = rollout()
    output = play(["2", "2"], stub_trainer(tiny_tokenizer, [["a", "b"], ["k", "c"]]))
    assert output["env_mask"] == [[0, 0, 0], [1, 0, 1, 0]]
    assert output["episode_return"] == [None, 0.5]
    assert output["success"] == [None, True]
    assert "its episode is discarded: the simulator died" in caplog.text
    assert [environment.closed for environment in Countdown.made] == [True, False]
    play(["1", "1"], stub_trainer(tiny_tokenizer, [["a", "b"]]))
    assert len(Countdown.made) == 3


def test_environments_left_open_are_closed_with_the_rollout(tiny_tokenizer):
    play = rollout()
    assert play._finalizer.atexit
    play(["1"], stub_trainer(tiny_tokenizer, [["a"]]))
    del play
    gc.collect()
    assert Countdown.made[0].closed


@pytest.mark.parametrize("name", ["max_turns", "max_episode_tokens", "max_prompt_length", "num_workers"])
def test_limits_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        rollout(**{name: 0})


def test_every_process_generates_as_often_and_as_many(tiny_tokenizer):
    # this process has live episodes 2, 1, 0, 0; the other one 1, 2, 2, 0
    turns = [["a", "b"], ["c", "p"], ["p", "p"]]
    trainer = stub_trainer(tiny_tokenizer, turns, processes=2, other_ranks=[1, 2, 2, 0])
    output = rollout()(["2", "1"], trainer)
    assert trainer.calls == [["2=", "1="], ["2=aa", "<eos>"], ["<eos>", "<eos>"]]
    assert decoded(tiny_tokenizer, output) == ["aac<eos>", "b<eos>"]


def test_older_trl_generates_once_per_prompt(tiny_tokenizer):
    trainer = stub_trainer(tiny_tokenizer, [["a"]])
    trainer.num_generations, trainer.num_generations_eval = 4, 2
    newer, seen = trainer._generate_single_turn, []

    def older(prompt_ids, images, multimodal_fields, has_tool_images=False):
        seen.append((trainer.num_generations, trainer.num_generations_eval))
        return newer(prompt_ids, images, multimodal_fields, 1)

    trainer._generate_single_turn = older
    rollout()(["1"], trainer)
    assert seen == [(1, 1)]
    assert (trainer.num_generations, trainer.num_generations_eval) == (4, 2)


def test_reward_is_the_return_and_logs_what_counts():
    logged = {}
    columns = {"episode_return": [1.0, None, 0.0], "success": [True, None, False], "episode_turns": [2, 9, 5]}
    rewards = episode_reward([""] * 3, [""] * 3, **columns, log_metric=logged.__setitem__)
    assert rewards == [1.0, None, 0.0]
    assert logged == pytest.approx(
        {"episode/discarded_fraction": 1 / 3, "episode/success_rate": 0.5, "episode/turns": 3.5}
    )
    columns = {"episode_return": [None], "success": [None], "episode_turns": [1]}
    assert episode_reward([""], [""], **columns, log_metric=logged.__setitem__) == [None]
    nothing = {"episode/discarded_fraction": 1.0, "episode/success_rate": math.nan, "episode/turns": math.nan}
    assert logged == pytest.approx(nothing, nan_ok=True)
    with pytest.raises(ValueError, match="give the trainer the task's rollout"):
        episode_reward([""], [""])
