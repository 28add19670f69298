"""`EntropyPPOTrainer` as a whole: rollouts, training with every control, saving, adapters, and what it refuses."""

import inspect
import math
import os
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

ppo = pytest.importorskip("trl.experimental.ppo", reason="trl.experimental.ppo is in TRL 1.12 alone")

from trl_entropy.ppo import EntropyPPOTrainer  # noqa: E402
from trl_entropy.ppo.critics import critic_sources  # noqa: E402

CONTROLS = {
    "erc_low": 0.95,
    "erc_high": 1.05,
    "ce_gppo_alpha1": 0.75,
    "ce_gppo_alpha2": 1.0,
    "epo_coef": 0.1,
    "entropy_coef": 0.01,
}
CONTROL_METRICS = {
    "ppo_clip/low_fraction",
    "ppo_clip/high_fraction",
    "ce_gppo/low_fraction",
    "ce_gppo/high_fraction",
    "erc/clip_fraction",
    "erc/low_fraction",
    "erc/high_fraction",
    "epo/beta",
    "epo/outside_fraction",
}


def queries_of(trainer: Any) -> Tensor:
    return next(iter(trainer.dataloader))["input_ids"]


def logged(trainer: Any, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def random_heads(trainer: Any) -> None:
    """Value heads that differ, as critics that have learnt would."""
    generator = torch.Generator().manual_seed(7)
    for critic in trainer.critics.critics:
        head = critic.score.weight
        head.data.copy_(0.3 * torch.randn(head.shape, generator=generator))


def test_constructor_is_trls_with_critics_after_it() -> None:
    own = list(inspect.signature(EntropyPPOTrainer.__init__).parameters)
    theirs = list(inspect.signature(ppo.PPOTrainer.__init__).parameters)
    assert own == [*theirs, "critics", "critic_peft_config"]


@torch.no_grad()
def test_old_entropies_are_those_of_the_policy_that_wrote(make_ppo) -> None:
    trainer = make_ppo(**CONTROLS)
    rollout = trainer.make_rollout(queries_of(trainer))
    ids, tokens = rollout["query_responses"], rollout["responses"].shape[1]
    attention = (ids != 0).long()  # <pad> is token 0
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = trainer.policy_model(input_ids=ids, attention_mask=attention, position_ids=positions).logits.double()
    every = (logits[:, -tokens - 1 : -1] / 0.9).log_softmax(-1)
    entropies, valid = -(every.exp() * every).sum(-1), ~rollout["padding_mask"]
    assert entropies[valid].std() > 0.1
    torch.testing.assert_close(rollout["old_entropies"][valid].double(), entropies[valid], rtol=1e-4, atol=1e-5)


def test_ratios_start_at_one_in_bfloat16_too(make_ppo) -> None:
    """Low precision makes generation and a forward pass differ by more than ERC's bounds."""
    trainer = make_ppo(erc_low=0.95, erc_high=1.05, learning_rate=0.0, response_length=12, total_episodes=32)
    trainer.policy_model.to(torch.bfloat16)
    trainer.train()
    assert logged(trainer, "erc/clip_fraction") == [0.0] * 4
    assert logged(trainer, "policy/approxkl_avg") == pytest.approx([0.0] * 4, abs=1e-6)


def test_rollout_has_no_entropies_where_no_control_reads_them(make_ppo) -> None:
    trainer = make_ppo(entropy_coef=0.01, ce_gppo_alpha1=0.5, ce_gppo_alpha2=1.0)
    assert "old_entropies" not in trainer.make_rollout(queries_of(trainer))


def test_a_token_that_generation_ruled_out_has_no_entropy() -> None:
    from trl_entropy.ppo.loss import token_entropies

    logits = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf]]], dtype=torch.bfloat16)
    torch.testing.assert_close(token_entropies(logits), torch.tensor([[math.log(2), 0.0]]))


def test_training_with_every_control(make_ppo) -> None:
    trainer, rollouts = make_ppo(**CONTROLS), []
    make_rollout = trainer.make_rollout
    trainer.make_rollout = lambda queries: rollouts.append(make_rollout(queries)) or rollouts[-1]
    trainer.train()
    for log in trainer.state.log_history:
        assert all(math.isfinite(value) for value in log.values())
    assert trainer.state.log_history[-1].keys() >= CONTROL_METRICS
    assert min(logged(trainer, "erc/clip_fraction")) > 0
    means = [rollout["old_entropies"][~rollout["padding_mask"]].mean().item() for rollout in rollouts]
    assert trainer.active.states["epo"].steps == pytest.approx(means[:-1], rel=1e-5)
    # 3 rollouts, so k_mid = 1
    assert logged(trainer, "epo/beta") == pytest.approx([1 + math.exp(-3.0 * k) for k in range(3)], rel=1e-5)
    assert logged(trainer, "epo/corridor_low") == pytest.approx([0.8 * means[0], 0.4 * sum(means[:2])], rel=1e-4)


def loop_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    found, following_advantage, following_value = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * following_value - values[t]
        found[t] = following_advantage = delta + gamma * lam * following_advantage
        following_value = values[t]
    return found


@torch.no_grad()
def test_advantages_come_from_the_mean_of_the_critics(make_ppo, tiny_model_path) -> None:
    fields = {"gamma": 0.97, "lam": 0.8, "critic_gae_lambda": 0.9, "entropy_coef": 0.1}
    trainer = make_ppo(critics=tiny_model_path, advantage_mask_fraction=0.3, entropy_filter_fraction=0.25, **fields)
    random_heads(trainer)
    rollout = trainer.make_rollout(queries_of(trainer))
    ids, tokens = rollout["query_responses"], rollout["responses"].shape[1]
    values = torch.stack(
        [
            critic(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, -tokens - 1 : -1, 0]
            for critic in trainer.critics.critics
        ]
    )
    values[:, rollout["padding_mask_p1"]] = 0.0
    mean, valid = values.mean(0).tolist(), ~rollout["padding_mask"]
    rewards = rollout["rewards"].tolist()
    advantages = torch.tensor([loop_gae(*row, 0.97, 0.8) for row in zip(rewards, mean, strict=True)])
    returns = torch.tensor([loop_gae(*row, 0.97, 0.9) for row in zip(rewards, mean, strict=True)]) + values.mean(0)
    whitened = (advantages - advantages[valid].mean()) / advantages[valid].std()
    torch.testing.assert_close(rollout["advantages"][valid], whitened[valid], rtol=1e-4, atol=1e-4)
    assert (rollout["advantages"][~valid] == 0).all()
    learnt = ~rollout["padding_mask_p1"]
    torch.testing.assert_close(rollout["returns"][learnt], returns[learnt], rtol=1e-4, atol=1e-4)

    deviation = (values[0] - values[1]).abs() / 2
    order = deviation[valid].sort().values
    count = len(order)
    assert rollout["advantage_masked"].sum() == math.floor(0.3 * count)
    assert rollout["entropy_filtered"].sum() == math.floor(0.25 * count)
    assert deviation[rollout["advantage_masked"]].max() <= order[math.floor(0.3 * count)] + 1e-6
    assert deviation[rollout["entropy_filtered"]].min() >= order[-math.floor(0.25 * count)] - 1e-6


def test_critics_train_and_are_saved_with_the_policy(make_ppo, tiny_model_path, tmp_path) -> None:
    trainer = make_ppo(
        **CONTROLS, critics=[tiny_model_path] * 2, critic_learning_rate=1e-2, save_strategy="steps", save_steps=2
    )
    start = [[value.clone() for value in critic.parameters()] for critic in trainer.critics.critics]
    trainer.train()
    ends = [list(critic.parameters()) for critic in trainer.critics.critics]
    for before, after in zip(start, ends, strict=True):
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    # disjoint shares of the rollouts: the two, equal at the start, differ now
    assert any(not torch.equal(first, second) for first, second in zip(*ends, strict=True))
    last = trainer.state.log_history[-1]
    assert last["asyppo/masked_fraction"] == pytest.approx(0.2, abs=0.03)
    assert last["loss/value_avg"] == pytest.approx((last["asyppo/critic_0/loss"] + last["asyppo/critic_1/loss"]) / 2)
    assert "val/clipfrac_avg" not in last
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "final"):
        AutoModelForCausalLM.from_pretrained(folder)
        assert sorted(os.listdir(folder / "critics")) == ["critic_0", "critic_1", "state_0.pt", "state_1.pt"]
    saved = AutoModelForTokenClassification.from_pretrained(tmp_path / "final" / "critics" / "critic_1")
    for value, expected in zip(saved.parameters(), ends[1], strict=True):
        assert torch.equal(value, expected)


def test_critics_may_lack_the_padding_token_that_the_policy_was_given(make_ppo, tiny_model_path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    trainer = make_ppo(critics=tiny_model_path, processing_class=tokenizer, entropy_coef=0.1, total_episodes=8)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["asyppo/explained_variance"])
    tokenizer.add_tokens(["unknown to the critic"])
    with pytest.raises(ValueError, match="has another tokenizer than the policy"):
        critic_sources(tiny_model_path, 2, tokenizer, batch_size=8)


class Counter(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def test_adapters_callbacks_and_sample_generations(make_ppo, tmp_path, prompts) -> None:
    counter = Counter()
    trainer = make_ppo(
        **CONTROLS,
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
        callbacks=[counter],
        eval_dataset=prompts,
        num_sample_generations=1,
        save_strategy="steps",
        save_steps=3,
    )
    base = trainer.policy_model.base_model.model.model.embed_tokens.weight.clone()
    trainer.train()
    assert counter.steps == 3
    assert torch.equal(trainer.policy_model.base_model.model.model.embed_tokens.weight, base)
    assert (tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors").exists()
    adapters = [value for name, value in trainer.policy_model.named_parameters() if "lora_B" in name]
    assert any(value.abs().sum() > 0 for value in adapters)


def test_a_subclass_can_override_the_loss(make_ppo) -> None:
    class Frozen(EntropyPPOTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            return 0.0 * super().compute_loss(model, inputs)

    trainer = make_ppo(Frozen, total_episodes=8)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, start[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value_model": None}, "value_model and critics: neither given"),
        ({"critics": "model", "value_model": torch.nn.Linear(1, 1)}, "value_model and critics: both given"),
        ({"num_critics": 3}, "num_critics=3 is for an ensemble of critics, and there is a value_model"),
        ({"advantage_mask_fraction": 0.1}, "leave advantage_mask_fraction out"),
        ({"critics": "model", "num_critics": 9}, "num_critics=9 needs as many responses per rollout.*has 8"),
        ({"critics": ["model"]}, "critics lists 1 and num_critics=2"),
    ],
)
def test_nonsense_is_refused(make_ppo, tiny_model_path, fields, message) -> None:
    if fields.get("critics"):
        fields = fields | {"critics": tiny_model_path if fields["critics"] == "model" else [tiny_model_path]}
        fields = fields | {"entropy_coef": 0.1}
    with pytest.raises(ValueError, match=message):
        make_ppo(**fields)


def test_an_entropy_filter_without_a_bonus_warns(make_ppo, tiny_model_path) -> None:
    with pytest.warns(UserWarning, match="entropy_filter_fraction=0.2 does nothing"):
        make_ppo(critics=tiny_model_path)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_gradient_of_the_entropy_beside_a_ruled_out_token_is_that_of_the_others(scale) -> None:
    from trl_entropy.ppo.loss import token_entropies

    values = torch.tensor([0.5, 1.5, -1.0])
    masked = torch.cat([values, torch.tensor([-math.inf])]).requires_grad_()
    alone = values.clone().requires_grad_()
    for logits in (masked, alone):
        (scale * token_entropies(logits.reshape(1, 1, -1)).sum()).backward()
    torch.testing.assert_close(masked.grad[:3], alone.grad)
    assert masked.grad[3] == 0


def test_a_policy_with_masked_vocabulary_trains_with_every_control(make_ppo) -> None:
    trainer = make_ppo(erc_low=0.95, erc_high=1.05, epo_coef=0.1, entropy_coef=0.1)
    head = trainer.policy_model.lm_head
    head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([5, 6]), -math.inf))
    trainer.train()
    assert all(value.isfinite().all() for value in trainer.policy_model.parameters())
    for name in ("policy/entropy_avg", "erc/clip_fraction", "epo/history"):
        assert logged(trainer, name)
        assert all(map(math.isfinite, logged(trainer, name))), name
    assert min(logged(trainer, "erc/clip_fraction")) < 1


@pytest.mark.parametrize("as_folder", [False, True], ids=["module", "folder"])
def test_the_value_model_serves_as_critic(make_ppo, make_scorer, tmp_path, tiny_tokenizer, as_folder) -> None:
    critics = make_scorer(2)
    if as_folder:
        critics.save_pretrained(tmp_path / "value")
        tiny_tokenizer.save_pretrained(tmp_path / "value")
        critics = str(tmp_path / "value")
    trainer = make_ppo(critics=critics, entropy_coef=0.1)
    head = make_scorer(2).score.weight
    assert all(torch.equal(critic.score.weight, head) for critic in trainer.critics.critics)
    trainer.train()
    assert all(not torch.equal(critic.score.weight, head) for critic in trainer.critics.critics)


def test_dropout_that_trl_leaves_on_is_warned_of(make_ppo, monkeypatch) -> None:
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: load(*args, **kwargs, attention_dropout=0.1)
    )
    with pytest.warns(UserWarning, match=r"attention_dropout=0\.1.*ERC"):
        make_ppo(erc_low=0.95, erc_high=1.05)
