"""What training makes of episodes: gradients, critics, entropies by turn, discarded episodes."""

from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.controls.turns import turn_indices
from trl_entropy.critics import CriticEnsemble
from trl_entropy.tasks.environments import EnvironmentCrash, Step
from trl_entropy.tasks.multi_turn import MultiTurnRollout, episode_reward
from trl_entropy.telemetry.metrics import TokenMeans, turn_entropies

EOS = 1


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
    assert len(trainer.active.states["epo"].turn_steps[0]) == 2


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
    trainer.active.states["epo"].finish_step(lambda totals: totals)
    assert len(trainer.active.states["epo"]) == 0


def test_evaluation_plays_too(make_trainer):
    trainer = multi_turn_trainer(
        make_trainer, max_steps=1, eval_dataset=Dataset.from_dict({"prompt": ["8", "9"]}), epo_coef=0.1
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_episode/turns"] == 2
    assert len(trainer.active.states["epo"].turn_steps) == 0


def test_what_is_counted_holds_no_graph(make_trainer, monkeypatch):
    """It would keep the activations of each micro-batch until the optimizer step."""
    counted: list[Any] = []
    add = TokenMeans.add
    monkeypatch.setattr(TokenMeans, "add", lambda self, found: counted.extend(found.values()) or add(self, found))
    multi_turn_trainer(make_trainer, max_steps=1, epo_coef=0.1, positive_nll_coef=0.1).train()
    assert counted
    assert not any(mean.value.requires_grad for mean in counted)
