"""The pool of environments: crashes at the start, use again, closing, several at a time."""

import pytest

from tests.tasks.countdown import Countdown, rollout, stub_trainer
from trl_entropy.tasks.environments import EnvironmentCrash
from trl_entropy.tasks.multi_turn import MultiTurnRollout


def test_crash_at_the_start_is_tried_again(tiny_tokenizer):
    class Fragile(Countdown):
        crashes = 2

        def reset(self, episode):
            if Fragile.crashes:
                Fragile.crashes -= 1
                raise EnvironmentCrash("no memory")
            return super().reset(episode)

    play = MultiTurnRollout(Fragile, max_turns=5, max_episode_tokens=20)
    assert play(["1"], stub_trainer(tiny_tokenizer, [["a"]]))["success"] == [True]
    assert [environment.closed for environment in Countdown.made] == [True, True, False]
    play.close()
    Fragile.crashes = 3
    with pytest.raises(RuntimeError, match=r"episode '1' crashed 3 times at its start \(no memory\)"):
        play(["1"], stub_trainer(tiny_tokenizer, []))


def test_errors_of_the_program_are_not_swallowed(tiny_tokenizer):
    with pytest.raises(ValueError, match="invalid literal"):
        rollout()(["x"], stub_trainer(tiny_tokenizer, []))


def test_environments_are_used_again_and_closed(tiny_tokenizer):
    shared = []
    with MultiTurnRollout(
        Countdown, max_turns=5, max_episode_tokens=20, close=lambda: shared.append("closed")
    ) as play:
        for _ in range(2):
            play(["1", "1"], stub_trainer(tiny_tokenizer, [["a", "b"]]))
        assert len(Countdown.made) == 2
        assert not any(environment.closed for environment in Countdown.made)
    assert all(environment.closed for environment in Countdown.made)
    assert shared == ["closed"]


def test_workers_step_in_parallel(tiny_tokenizer):
    turns = [["ab", "cd", "e"], ["f", "g"], ["h"]]
    outputs = []
    for num_workers in (1, 3):
        play = rollout(num_workers=num_workers)
        outputs.append(play(["3", "2", "1"], stub_trainer(tiny_tokenizer, turns)))
    assert outputs[0] == outputs[1]
