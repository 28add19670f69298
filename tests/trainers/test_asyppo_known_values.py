"""AsyPPO on a policy whose values are known exactly."""

import pytest
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.conftest import VOCABULARY
from tests.trainers.test_grpo import logged
from trl_entropy import AsyPPOConfig, AsyPPOTrainer
from trl_entropy.critics import explained_variance

START, ODD, EVEN, EOS = "=", "13", "02", "<eos>"
SWITCH, END = 0.0004, 0.04


def markov_chain():
    """Transition probabilities of the tokens: odd and even digits seldom follow each other, any may be the last."""
    chain = torch.full((len(VOCABULARY), len(VOCABULARY)), 1e-9, dtype=torch.float64)
    index = {token: i for i, token in enumerate(VOCABULARY)}
    for own, other in ((ODD, EVEN), (EVEN, ODD)):
        for token in own:
            chain[index[START], index[token]] = 0.25
            chain[index[token], [index[t] for t in own]] = (1 - SWITCH - END) / 2
            chain[index[token], [index[t] for t in other]] = SWITCH / 2
            chain[index[token], index[EOS]] = END
    return chain / chain.sum(1, keepdim=True)


def chain_policy():
    """A policy that writes this chain: one-hot embeddings, a block that adds nothing, the logs in the head."""
    size = 36
    shape = {"vocab_size": len(VOCABULARY), "hidden_size": size, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    policy = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    block = policy.model.layers[0]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
        policy.model.embed_tokens.weight.copy_(torch.eye(len(VOCABULARY), size))
        # RMSNorm makes a one-hot vector sqrt(size) long
        policy.lm_head.weight[:, : len(VOCABULARY)] = markov_chain().log().T.float() / size**0.5
    return policy


def last_digit_is_odd(completions, **kwargs):
    return [float(text[-1:] in ("1", "3")) for text in completions]


def known_values():
    """Solution of `V = P V + P(end) payoff`, with the state as the last token, float64 `(vocabulary,)`."""
    chain, end = markov_chain(), VOCABULARY.index(EOS)
    payoff = torch.tensor([float(token in ODD) for token in VOCABULARY], dtype=torch.float64)
    going_on = chain.clone()
    going_on[:, end] = 0.0
    return torch.linalg.solve(torch.eye(len(chain), dtype=torch.float64) - going_on, chain[:, end] * payoff)


@pytest.mark.slow
def test_critics_learn_the_known_values_and_the_policy_then_improves(make_trainer, tiny_model_path, monkeypatch):
    warm_up, found = 30, []
    trainer = make_trainer(
        model=chain_policy(),
        reward_funcs=last_digit_is_odd,
        train_dataset=Dataset.from_dict({"prompt": [f"{i % 10}=" for i in range(64)]}),
        trainer_class=lambda **kwargs: AsyPPOTrainer(**kwargs, critics=tiny_model_path),
        config_class=AsyPPOConfig,
        entropy_coef=0.001,
        critic_learning_rate=1e-2,
        critic_warmup_rollouts=warm_up,
        critic_per_device_train_batch_size=8,
        bootstrap_truncated=False,
        learning_rate=3e-3,
        max_steps=15,
        per_device_train_batch_size=64,
        steps_per_generation=1,
        max_completion_length=100,
    )
    train_on = trainer.critics.train_on

    def compare(ids, attention, mask, targets, **kwargs):
        values = trainer.critics.state_values(ids, attention, mask.shape[1], 64)[:, :, :-1].mean(0)
        states = ids[:, -mask.shape[1] - 1 : -1]
        distance = (values - known_values()[states])[mask].abs().mean().item()
        found.append((explained_variance(values, targets, mask, lambda sums: sums), distance))
        return train_on(ids, attention, mask, targets, **kwargs)

    monkeypatch.setattr(trainer.critics, "train_on", compare)
    trainer.train()
    assert found[0][0] < 0.1
    explained, distance = found[warm_up]  # the policy has not moved yet
    assert explained > 0.9
    assert distance < 0.1
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.6
    assert min(rewards[-3:]) > 0.9
