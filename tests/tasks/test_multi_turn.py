"""The rollout of episodes: tokens, masks, limits, crashes, and what training makes of them."""

import gc
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.controls.epo import turn_indices
from trl_entropy.critics import CriticEnsemble
from trl_entropy.tasks.multi_turn import EnvironmentCrash, MultiTurnRollout, Step, episode_reward
from trl_entropy.telemetry.metrics import TokenMeans, turn_entropies

CHAT = (
    "{% for m in messages %}{{ m.role[0] + '-' + m.content }}{{ '<eos>' if m.role == 'assistant' else '' }} "
    "{% endfor %}{{ 'a-' if add_generation_prompt else '' }}"
)
EOS = 1


class Countdown:
    """Episode `"3"` needs three turns; `"k"` crashes. Answers with the action's last letter, or `"o"`."""

    made: list["Countdown"]

    def __init__(self):
        self.actions, self.closed = [], False
        Countdown.made.append(self)

    def reset(self, episode):
        self.left = int(episode)
        self.actions.clear()
        return f"{episode}="

    def step(self, action):
        assert not self.closed
        self.actions.append(action)
        if "k" in action:
            raise EnvironmentCrash("the simulator died")
        self.left -= 1
        return Step(action[-1:] or "o", reward=0.25, done=self.left == 0, success=self.left == 0)

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def _fresh():
    Countdown.made = []


def stub_trainer(tokenizer, turns, *, logprobs=False, chat_template=None, processes=1, other_ranks=()):
    """What the rollout needs of a trainer; `turns` are the batches of texts it generates, turn by turn."""
    batches, others = iter(turns), iter(other_ranks)
    calls = []

    def generate(prompt_ids, images, multimodal_fields, num_generations):
        assert num_generations == 1
        calls.append([tokenizer.decode(ids) for ids in prompt_ids])
        ids = [tokenizer(text)["input_ids"] for text in next(batches)]
        assert len(ids) == len(prompt_ids)
        return ids, [[-0.1 * (i + 1) for i in range(len(turn))] for turn in ids] if logprobs else None

    def gather(count):
        return torch.cat([count, torch.tensor([next(others, 0)])])

    return SimpleNamespace(
        _tokenizer=tokenizer,
        _generate_single_turn=generate,
        chat_template=chat_template,
        chat_template_kwargs={},
        accelerator=SimpleNamespace(num_processes=processes, device=torch.device("cpu"), gather=gather),
        calls=calls,
    )


def rollout(**limits):
    return MultiTurnRollout(Countdown, **{"max_turns": 5, "max_episode_tokens": 20, **limits})


def decoded(tokenizer, output):
    return [tokenizer.decode(ids) for ids in output["completion_ids"]]


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


def test_environments_left_open_are_closed_with_the_rollout(tiny_tokenizer):
    play = rollout()
    assert play._finalizer.atexit
    play(["1"], stub_trainer(tiny_tokenizer, [["a"]]))
    del play
    gc.collect()
    assert Countdown.made[0].closed


def test_workers_step_in_parallel(tiny_tokenizer):
    turns = [["ab", "cd", "e"], ["f", "g"], ["h"]]
    outputs = []
    for num_workers in (1, 3):
        play = rollout(num_workers=num_workers)
        outputs.append(play(["3", "2", "1"], stub_trainer(tiny_tokenizer, turns)))
    assert outputs[0] == outputs[1]


def chat_prompt(episode):
    return [{"role": "system", "content": "ab"}, {"role": "user", "content": "go", "episode": episode}]


def test_chat_is_what_the_template_writes(tiny_tokenizer):
    trainer = stub_trainer(tiny_tokenizer, [["ab<eos>"], ["c"], ["d<eos>"]], chat_template=CHAT)
    output = rollout(max_episode_tokens=99)([chat_prompt("3")], trainer)
    # the second turn was cut before its end-of-sequence token, which the template then writes
    messages = [
        chat_prompt("3")[0],
        {"role": "user", "content": "go\n\n3="},
        {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    whole = tiny_tokenizer.apply_chat_template(messages, chat_template=CHAT, return_dict=False)
    assert output["prompt_ids"][0] + output["completion_ids"][0] == whole[:-1]  # but for the last space
    written = [token for token, flag in zip(output["completion_ids"][0], output["env_mask"][0], strict=True) if flag]
    assert tiny_tokenizer.decode(written) == "ab<eos>cd<eos>"


def test_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer):
    template = CHAT.replace("{{ m.role[0]", "{{ ('l' if loop.last else 'm') + m.role[0]")
    with pytest.raises(ValueError, match="writes a turn differently once another follows"):
        rollout()([chat_prompt("2")], stub_trainer(tiny_tokenizer, [["a<eos>"]], chat_template=template))


def test_answer_without_tokens_is_refused(tiny_tokenizer):
    class Silent(Countdown):
        def step(self, action):
            return Step("")

    play = MultiTurnRollout(Silent, max_turns=5, max_episode_tokens=20)
    with pytest.raises(ValueError, match="has no tokens"):
        play(["1"], stub_trainer(tiny_tokenizer, [["a"]]))


def test_prompt_without_episode_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="does not name its episode"):
        rollout()([[{"role": "user", "content": "go"}]], stub_trainer(tiny_tokenizer, []))


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


class Guess:
    """Right actions are odd digits; an episode has two turns, each answered with two tokens. Crashes on request."""

    def __init__(self, crash_on=None):
        self.crash_on, self.crashes = crash_on, 0

    def reset(self, episode):
        self.right, self.turn, self.episode = 0, 0, episode
        return f"{episode}="

    def step(self, action):
        self.turn += 1
        if self.episode == self.crash_on and self.turn == 2:
            raise EnvironmentCrash("on request")
        self.right += any(letter in "13579" for letter in action)
        return Step("+?", reward=float(self.right > 0 and self.turn == 2), done=self.turn == 2, success=self.right > 0)

    def close(self):
        pass


def multi_turn_trainer(make_trainer, environment=Guess, **config) -> Any:
    settings = {"max_completion_length": 3, "steps_per_generation": 2, "per_device_train_batch_size": 8, **config}
    return make_trainer(
        rollout_func=MultiTurnRollout(environment, max_turns=4, max_episode_tokens=12),
        reward_funcs=episode_reward,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(8)]}),
        **settings,
    )


def watch_loss(monkeypatch):
    """Keep the inputs of each call of the loss, and the log-probs and entropies with their gradients."""
    seen: list[tuple[dict, torch.Tensor, torch.Tensor]] = []
    forward, compute_loss = GRPOTrainer._get_per_token_logps_and_entropies, GRPOTrainer._compute_loss

    def watched_forward(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        if result[0].requires_grad:
            result[0].retain_grad()
            if result[1].requires_grad:  # TRL below 1.16 detaches the entropies where nothing needs them
                result[1].retain_grad()
            seen[-1] = (seen[-1][0], *result[:2])
        return result

    def watched_loss(self, model, inputs):
        seen.append((dict(inputs), None, None))
        return compute_loss(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", watched_forward)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", watched_loss)
    return seen


CONTROLS = {"epo_coef": 0.1, "erc_low": 0.5, "erc_high": 1.5, "ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}


def test_training_never_touches_observations(make_trainer, monkeypatch):
    seen = watch_loss(monkeypatch)
    trainer = multi_turn_trainer(make_trainer, **CONTROLS)
    trainer.train()
    assert len(seen) == 4
    reached = 0
    for inputs, logps, entropies in seen:
        written = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        observations = inputs["completion_mask"].bool() & ~written
        assert (
            (inputs["completion_ids"][observations].reshape(-1, 1) == torch.tensor([2 + 10, 2 + 13, EOS])).any(1).all()
        )
        assert (observations.sum(1) >= 2).all()
        for values in (logps, entropies):
            assert (values.grad[~written] == 0).all()
            reached += int((values.grad[written] != 0).sum())
    assert reached > 50
    log = trainer.state.log_history[0]
    assert 0 <= log["episode/success_rate"] <= 1
    assert log["episode/turns"] == 2
    assert log["episode/discarded_fraction"] == 0
    assert log["reward"] == pytest.approx(log["episode/success_rate"])
    assert log["completions/max_length"] <= 6  # two turns of three tokens: observations are not counted


def test_critics_and_controls_leave_observations_alone(make_trainer, tiny_model_path, monkeypatch):
    """AsyPPO with EPO and the clipping controls: neither the policy nor a critic is trained on an observation."""
    seen, trained_masks, own = watch_loss(monkeypatch), [], CriticEnsemble.train_on

    def train_on(self, ids, attention, mask, targets, **kwargs):
        trained_masks.append(mask)
        return own(self, ids, attention, mask, targets, **kwargs)

    monkeypatch.setattr(CriticEnsemble, "train_on", train_on)
    settings = {"trainer_class": partial(AsyPPOTrainer, critics=tiny_model_path), "config_class": AsyPPOConfig}
    trainer = multi_turn_trainer(make_trainer, **settings, **CONTROLS)
    trainer.train()
    assert (len(seen), len(trained_masks)) == (4, 2)
    advantages = []
    for inputs, logps, entropies in seen:
        written = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        assert (inputs["completion_mask"].bool() & ~written).any(1).all()
        for values in (logps, entropies):
            assert (values.grad[~written] == 0).all()
            assert (values.grad[written] != 0).any()
        assert (inputs["advantages"][~written] == 0).all()
        advantages.append(inputs["advantages"][written])
    assert torch.cat(advantages).std() > 0
    for mask in trained_masks:
        assert turn_indices(mask).amax(1).tolist() == [1] * len(mask)  # two turns with an observation between them
    log = trainer.state.log_history[0]
    assert {"epo/beta", "entropy/turn_1", "entropy/turn_2", "asyppo/explained_variance"} <= set(log)
    assert len(trainer._entropy_history.turn_steps[0]) == 2


def turn_means(batches):
    """Mean entropy of each turn over the tokens of all batches, found token by token."""
    turns = {}
    for inputs, _, entropies in batches:
        for flags, row in zip((inputs["completion_mask"] * inputs["tool_mask"]).tolist(), entropies, strict=True):
            turn, previous = 0, 0
            for flag, entropy in zip(flags, row.tolist(), strict=True):
                turn += flag and not previous
                previous = flag
                if flag:
                    turns.setdefault(turn, []).append(entropy)
    return {f"entropy/turn_{turn}": sum(values) / len(values) for turn, values in turns.items()}


@pytest.mark.parametrize("controls", [{}, {"epo_coef": 0.1}, CONTROLS], ids=["none", "epo", "all"])
def test_entropy_by_turn_is_logged(make_trainer, monkeypatch, controls):
    seen = watch_loss(monkeypatch)
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    trainer = multi_turn_trainer(make_trainer, max_steps=2, **settings, **controls)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert len(logs) == 2
    for step, log in enumerate(logs):
        expected = turn_means(seen[2 * step : 2 * step + 2])  # two micro-batches an optimizer step
        assert set(expected) == {"entropy/turn_1", "entropy/turn_2"}
        assert {key: log[key] for key in log if key.startswith("entropy/")} == pytest.approx(expected, rel=1e-5)
        assert abs(log["entropy/turn_1"] - log["entropy/turn_2"]) > 1e-3


def test_entropy_of_many_turns_is_logged_in_bounded_metrics():
    # 40 turns of one token each, with entropy = number of the turn, and an observation after each
    mask = torch.tensor([[True, False] * 40])
    entropies = torch.arange(1.0, 41.0).repeat_interleave(2).unsqueeze(0)
    means = TokenMeans()
    means.add(turn_entropies(entropies, mask))
    means.close_window(lambda totals: totals)
    assert means.pop() == {
        **{f"entropy/turn_{turn}": turn for turn in range(1, 9)},
        "entropy/turns_9_to_16": 12.5,
        "entropy/turns_17_to_32": 24.5,
        "entropy/turns_from_33": 36.5,
    }


def test_episodes_of_one_turn_have_no_entropy_by_turn(make_trainer):
    trainer = make_trainer(epo_coef=0.1, max_steps=1)
    trainer.train()
    assert not [key for entry in trainer.state.log_history for key in entry if key.startswith("entropy/")]


def test_without_control_episodes_are_trained_on_as_trl_does(make_trainer, tmp_path):
    weights = []
    for trainer_class, config_class in (
        (EntropyGRPOTrainer, EntropyGRPOConfig),
        (EntropyGRPOTrainer, GRPOConfig),
        (GRPOTrainer, GRPOConfig),
    ):
        trainer = multi_turn_trainer(
            make_trainer,
            output_dir=tmp_path / str(len(weights)),
            trainer_class=trainer_class,
            config_class=config_class,
            num_iterations=2,
        )
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        weights.append(trainer.model.state_dict())
        assert any(not torch.equal(before[name], value) for name, value in weights[-1].items())
    assert all(torch.equal(found[name], value) for found in weights[:2] for name, value in weights[2].items())


def test_discarded_episode_teaches_nothing(make_trainer, monkeypatch):
    seen = watch_loss(monkeypatch)
    crashed = []

    class Crashing(Guess):
        def step(self, action):
            self.crash_on = self.episode if not crashed else None
            if self.turn == 1 and not crashed:
                crashed.append(self.episode)
            return super().step(action)

    trainer = multi_turn_trainer(make_trainer, Crashing, max_steps=2, **CONTROLS)
    trainer.train()
    assert len(crashed) == 1
    inputs = {name: torch.cat([batch[name] for batch, *_ in seen]) for name in ("tool_mask", "completion_mask")}
    advantages = torch.cat([batch["advantages"] for batch, *_ in seen])
    gone = (inputs["tool_mask"] * inputs["completion_mask"]).sum(1) == 0
    assert gone.sum() == 1
    assert advantages[gone] == 0
    for gradient in (torch.cat([logps.grad for _, logps, _ in seen]), torch.cat([h.grad for *_, h in seen])):
        assert (gradient[gone] == 0).all()
        assert (gradient[~gone] != 0).any()
    log = trainer.state.log_history[0]
    assert log["episode/discarded_fraction"] == 1 / 16
    # the other three of its group are normalised among themselves, so all advantages sum to nearly nothing
    assert advantages.sum().abs() < 1e-3


def test_rollout_whose_episodes_were_all_discarded_leaves_the_policy_alone(make_trainer):
    class Broken(Guess):
        def step(self, action):
            raise EnvironmentCrash("on request")

    trainer = multi_turn_trainer(make_trainer, Broken, max_steps=2, **CONTROLS)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert [entry["episode/discarded_fraction"] for entry in trainer.state.log_history[:1]] == [1.0]
    trainer._entropy_history.finish_step(lambda totals: totals)
    assert len(trainer._entropy_history) == 0


def test_evaluation_plays_too(make_trainer):
    trainer = multi_turn_trainer(
        make_trainer, max_steps=1, eval_dataset=Dataset.from_dict({"prompt": ["8", "9"]}), epo_coef=0.1
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_episode/turns"] == 2
    assert len(trainer._entropy_history.turn_steps) == 0
