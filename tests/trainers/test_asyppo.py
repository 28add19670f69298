"""AsyPPO through the real trainer."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.stubbed import stub_forward
from tests.trainers.test_grpo import ALL_CONTROLS, logged, weights
from trl_entropy import AsyPPOConfig, AsyPPOTrainer
from trl_entropy.critics import CriticEnsemble

CLASSIC = {"num_critics": 1, "advantage_mask_fraction": 0.0, "entropy_filter_fraction": 0.0}


def rollout(trainer, mode="train"):
    trainer.model.train(mode == "train")
    return trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_a_rollout_asks_for_entropies_only_where_tokens_are_filtered(make_asyppo, fraction):
    assert ("old_entropies" in rollout(make_asyppo(entropy_filter_fraction=fraction))) == (fraction > 0)


def critic_values(critic, output):
    """V of the state before every completion token, and of the one after the last, (B, T + 1)."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = critic(input_ids=ids, attention_mask=attention).logits.squeeze(-1)
    return logits[:, output["prompt_ids"].shape[1] - 1 :].double()


def loop_advantages(values, rewards, lengths, truncated, gamma, lam):
    """GAE by its recursion, row by row; the reward is given at the last token."""
    found = []
    for row, reward, length, cut in zip(values.tolist(), rewards, lengths, truncated, strict=True):
        advantages, following = [0.0] * (len(row) - 1), 0.0
        for t in reversed(range(length)):
            last = t == length - 1
            next_value = (row[length] if cut else 0.0) if last else row[t + 1]
            following = (reward if last else 0.0) + gamma * next_value - row[t] + gamma * lam * following
            advantages[t] = following
        found.append(advantages)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("bootstrap", [True, False])
def test_rollout_has_gae_on_the_mean_value_and_exact_fractions(make_asyppo, bootstrap):
    trainer = make_asyppo(
        gae_gamma=0.9,
        gae_lambda=0.8,
        bootstrap_truncated=bootstrap,
        whiten_advantages=False,
        advantage_mask_fraction=0.3,
    )
    before = copy.deepcopy(trainer.critics.critics)
    output = rollout(trainer)
    per_critic = torch.stack([critic_values(critic, output) for critic in before])
    mask = output["completion_mask"].bool()
    lengths = mask.sum(1).tolist()
    eos = trainer._tokenizer.eos_token_id
    finished = [eos in ids.tolist() for ids in output["completion_ids"]]
    texts = trainer._tokenizer.batch_decode(output["completion_ids"], skip_special_tokens=True)
    rewards = [float(ord(text[0]) % 2) if text else 0.0 for text in texts]
    truncated = [bootstrap and not done for done in finished]
    expected = loop_advantages(per_critic.mean(0), rewards, lengths, truncated, 0.9, 0.8)
    torch.testing.assert_close(output["advantages"].double()[mask], expected[mask], rtol=1e-4, atol=1e-5)

    deviation = per_critic[:, :, :-1].std(0, unbiased=False)
    order = sorted(deviation[mask].tolist())
    masked, filtered = output["advantage_masked"], output["entropy_filtered"]
    assert masked.sum() == int(0.3 * len(order))
    assert filtered.sum() == int(0.2 * len(order))
    assert deviation[masked].max() <= order[int(0.3 * len(order))] + 1e-5
    assert deviation[filtered].min() >= order[-int(0.2 * len(order))] - 1e-5


def test_one_fresh_critic_is_ppo_with_the_return_as_advantage(make_trainer, tiny_model_path):
    # a new value head is zero, so with gamma = lambda = 1 every token's advantage is the completion's reward
    trainer_class = lambda **kwargs: AsyPPOTrainer(**kwargs, critics=tiny_model_path)  # noqa: E731
    trainer = make_trainer(trainer_class=trainer_class, config_class=AsyPPOConfig, **CLASSIC, whiten_advantages=False)
    output = rollout(trainer)
    texts = trainer._tokenizer.batch_decode(output["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor([float(ord(text[0]) % 2) if text else 0.0 for text in texts])
    expected = rewards.unsqueeze(1) * output["completion_mask"]
    torch.testing.assert_close(output["advantages"], expected)
    assert not output["advantage_masked"].any()
    assert not output["entropy_filtered"].any()


def test_whitening_is_over_the_valid_tokens(make_asyppo):
    output = rollout(make_asyppo())
    valid = output["advantages"][output["completion_mask"].bool()]
    assert valid.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert valid.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-3)


def test_completions_without_a_reward_teach_nothing(make_asyppo):
    trainer = make_asyppo(
        reward_funcs=lambda completions, **_: [None, 1.0] * (len(completions) // 2), whiten_advantages=False
    )
    output = rollout(trainer)
    assert (output["advantages"][::2] == 0).all()
    assert (output["advantages"][1::2] != 0).any()
    assert not output["advantage_masked"][::2].any()


@pytest.mark.parametrize("controls", [{}, ALL_CONTROLS], ids=["alone", "with-all-controls"])
def test_masks_act_on_exactly_their_term(make_asyppo, monkeypatch, controls):
    """Gradients of `mean[I_A min(r A, clip(r) A) + beta I_H H]` in float64, and with the other controls around it."""
    stub_forward(monkeypatch)
    trainer = make_asyppo(**{**controls, "entropy_coef": 0.3})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = 4
    g = torch.Generator().manual_seed(0)

    def uniform(low, high):
        return low + (high - low) * torch.rand(4, 6, generator=g, dtype=torch.float64)

    lp, entropy = uniform(-3, 0), uniform(0, 2)
    masked, filtered = uniform(0, 1) < 0.3, uniform(0, 1) < 0.3
    mask = torch.arange(6) < torch.tensor([[6], [4], [1], [5]])
    batch = {
        "prompt_ids": torch.full((4, 1), 5),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.full((4, 6), 7),
        "completion_mask": mask.long(),
        "advantages": uniform(-1, 1),
        "old_per_token_logps": lp + uniform(-0.4, 0.4),
        "old_entropies": entropy * uniform(0.9, 1.1),
        "num_items_in_batch": mask.sum() * 4,
        "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        "num_correct_tokens": torch.tensor(28),
        "num_trajectories": torch.tensor(16),
        "value_std": uniform(0, 1),
        "advantage_masked": masked,
        "entropy_filtered": filtered,
    }

    def gradients(trainer, **changes):
        trainer.leaves = (lp.clone().requires_grad_(), entropy.clone().requires_grad_())
        trainer.compute_loss(trainer.model, batch | changes).backward()
        return [torch.zeros_like(lp) if leaf.grad is None else leaf.grad for leaf in trainer.leaves]

    nothing = torch.zeros_like(masked)
    found_lp, found_entropy = gradients(trainer)
    free_lp, free_entropy = gradients(trainer, advantage_masked=nothing, entropy_filtered=nothing)
    no_advantage, _ = gradients(trainer, advantages=torch.zeros_like(lp), advantage_masked=nothing)
    # where the mask acts only what does not come from the advantage is left (the positive NLL, where it is on)
    torch.testing.assert_close(found_lp, torch.where(masked, no_advantage, free_lp), rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(found_entropy, torch.where(filtered, 0.0, free_entropy), rtol=1e-12, atol=1e-16)
    if not controls:
        ratio, advantages = (lp - batch["old_per_token_logps"]).exp(), batch["advantages"]
        clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
        keep = mask & ~masked & ~clipped
        torch.testing.assert_close(found_lp, -(keep * ratio * advantages) / mask.sum(), rtol=1e-10, atol=1e-16)
        expected = -0.3 * (mask & ~filtered).double() / mask.sum()
        torch.testing.assert_close(found_entropy, expected, rtol=1e-10, atol=1e-16)


def test_it_trains_with_every_control_and_logs_its_metrics(make_asyppo, tiny_dataset):
    trainer = make_asyppo(
        **ALL_CONTROLS, max_steps=8, eval_dataset=tiny_dataset.select(range(2)), eval_strategy="steps", eval_steps=8
    )
    policy = weights(trainer)
    critics = [copy.deepcopy(critic.state_dict()) for critic in trainer.critics.critics]
    trainer.train()
    assert any(not torch.equal(policy[name], value) for name, value in weights(trainer).items())
    for critic, before in zip(trainer.critics.critics, critics, strict=True):
        assert any(not torch.equal(before[name], value) for name, value in critic.state_dict().items())
    for name in ("masked_fraction", "filtered_fraction", "entropy_masked", "value_std", "value_std_p50"):
        assert logged(trainer, f"asyppo/{name}"), name
    for name in ("explained_variance", "entropy_overlap"):
        assert len(logged(trainer, f"asyppo/{name}")) == 2, name
    for index in (0, 1):
        for name in ("loss", "explained_variance", "value_mean"):
            assert len(logged(trainer, f"asyppo/critic_{index}/{name}")) == 2, name
    # the fraction is that of the rollout; its four micro-batches differ
    shares = logged(trainer, "asyppo/masked_fraction")[:4]
    assert sum(shares) / 4 == pytest.approx(0.2, abs=0.03)
    assert max(shares) > min(shares)
    assert logged(trainer, "erc/clip_fraction")
    assert logged(trainer, "epo/beta")
    assert logged(trainer, "eval_asyppo/explained_variance")
    assert not logged(trainer, "eval_asyppo/critic_0/loss")


@pytest.fixture
def seen_by_critics(monkeypatch):
    """What the critics were trained on: `(targets, mask, settings)` of each rollout; they do not train."""
    seen = []

    def record(self, ids, attention, mask, targets, **settings):
        seen.append((targets, mask, settings))
        return {}

    monkeypatch.setattr(CriticEnsemble, "train_on", record)
    return seen


def test_the_settings_of_the_critics_reach_their_training(make_asyppo, seen_by_critics):
    trainer = make_asyppo(
        gae_gamma=0.9,
        gae_lambda=0.8,
        critic_gae_lambda=0.5,
        critic_num_epochs=3,
        critic_per_device_train_batch_size=2,
        critic_learning_rate=0.25,
        bootstrap_truncated=False,
    )
    output = rollout(trainer)
    targets, mask, settings = seen_by_critics[0]
    value = torch.stack([critic_values(critic, output) for critic in trainer.critics.critics]).mean(0)
    texts = trainer._tokenizer.batch_decode(output["completion_ids"], skip_special_tokens=True)
    rewards = [float(ord(text[0]) % 2) if text else 0.0 for text in texts]
    advantages = loop_advantages(value, rewards, mask.sum(1).tolist(), [False] * 8, 0.9, 0.5)
    torch.testing.assert_close(targets.double()[mask], (advantages + value[:, :-1])[mask], rtol=1e-4, atol=1e-5)
    assert (settings["epochs"], settings["batch_size"]) == (3, 2)
    assert {group["lr"] for own in trainer.critics._optimizers for group in own._adamw.param_groups} == {0.25}


def test_logged_values_and_quantiles_are_those_of_the_critics(make_asyppo, seen_by_critics):
    trainer = make_asyppo()
    output = rollout(trainer)
    per_critic = torch.stack([critic_values(critic, output)[:, :-1] for critic in trainer.critics.critics])
    mask, metrics = output["completion_mask"].bool(), trainer._metrics["train"]
    trainer._token_means["train"].close_window(lambda totals: totals)
    means = trainer._token_means["train"].pop()
    for index, value in enumerate(per_critic):
        assert means[f"asyppo/critic_{index}/value_mean"] == pytest.approx(value[mask].mean().item(), rel=1e-4)
    spread = per_critic.std(0, unbiased=False)[mask].sort().values
    for name, share in {"p10": 0.1, "p50": 0.5, "p90": 0.9}.items():
        expected = spread[int(share * (len(spread) - 1))].item()
        assert metrics[f"asyppo/value_std_{name}"] == [pytest.approx(expected, rel=1e-4)]


def test_warm_up_trains_the_critics_and_leaves_the_policy(make_asyppo, monkeypatch):
    trainer = make_asyppo(critic_warmup_rollouts=3, max_steps=1)
    policy, seen = weights(trainer), []
    train_on = trainer.critics.train_on

    def spy(*args, **kwargs):
        seen.append(all(torch.equal(policy[name], value) for name, value in weights(trainer).items()))
        return train_on(*args, **kwargs)

    monkeypatch.setattr(trainer.critics, "train_on", spy)
    trainer.train()
    assert seen == [True] * 4
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("rollouts", [1, 3])
def test_warm_up_on_streamed_rows_takes_those_at_hand(make_asyppo, tiny_dataset, rollouts):
    """Three rollouts are 24 prompts, more than the data has."""
    trainer = make_asyppo(
        train_dataset=tiny_dataset.to_iterable_dataset(),
        eval_dataset={"streamed": tiny_dataset.select(range(4)).to_iterable_dataset()},
        eval_strategy="steps",
        eval_steps=1,
        critic_warmup_rollouts=rollouts,
        max_steps=2,
        epo_coef=0.01,
    )
    before = copy.deepcopy(trainer.critics.critics)
    prompts = []
    generate = trainer._generate_and_score_completions

    def spy(rows):
        if trainer.mode == "train":
            prompts.append([row["prompt"] for row in rows])
        return generate(rows)

    trainer._generate_and_score_completions = spy
    trainer.train()
    assert len(prompts) == rollouts + 1
    assert prompts.count(prompts[0]) == rollouts + 1
    assert all(
        not torch.equal(a.score.weight, b.score.weight) for a, b in zip(before, trainer.critics.critics, strict=True)
    )
    assert logged(trainer, "epo/beta") == [2.0, 2.0]
    assert logged(trainer, "eval_reward")


def test_warm_up_leaves_the_controls_states_alone(make_trainer, tiny_model_path):
    states, weights = [], []
    for rollouts in (0, 3):
        trainer = make_trainer(
            config_class=AsyPPOConfig,
            trainer_class=partial(AsyPPOTrainer, critics=tiny_model_path),
            entropic_target=0.5,
            critic_warmup_rollouts=rollouts,
            critic_learning_rate=1e-6,
            learning_rate=0.0,
            max_steps=1,
        )
        seen = []
        on_rollout = trainer.active.on_rollout
        trainer.active.on_rollout = lambda *args, seen=seen, run=on_rollout: seen.append(1) or run(*args)
        trainer.train()
        states.append(len(seen))
        weights.append("entropic/integral" in trainer.state.log_history[0])
    assert states == [1, 1]
    assert weights == [True, True]


def test_processes_share_the_prompts_of_a_warm_up():
    def rows(processes, rank):
        trainer = SimpleNamespace(
            train_dataset=list(range(50)),
            args=SimpleNamespace(generation_batch_size=16),
            num_generations=4,
            accelerator=SimpleNamespace(num_processes=processes, process_index=rank),
            _prompt_generator=torch.Generator().manual_seed(0),
        )
        return AsyPPOTrainer._warmup_prompts(trainer, [])

    assert rows(2, 0) + rows(2, 1) == rows(1, 0)
    assert rows(2, 0) != rows(2, 1)
