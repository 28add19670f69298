"""Critics learn the value function of a Markov chain written as tokens."""

from types import SimpleNamespace

import pytest
import torch

from trl_entropy.critics import CriticEnsemble, Episodes, critic_targets, explained_variance, load_critic

STATES, STEPS = 6, 10
END, JUMP = 0.4, 0.005
FIRST = 2  # token ids of the states follow those of padding and end of sequence
PAYOFFS = torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0, 1.5])


def analytic_values(gamma):
    """Values of the states: `V = 0.4 payoff + gamma 0.6 P V`.

    With probability 0.4 the next token ends the sequence, and brings the payoff of the state. Otherwise it is the same
    state again, or with probability 0.005 any state.
    """
    transition = (1 - JUMP) * torch.eye(STATES) + JUMP / STATES
    return torch.linalg.solve(torch.eye(STATES) - gamma * (1 - END) * transition, END * PAYOFFS)


def play(num_chains, draw):
    """Chains as completions: the prompt is padding and the first state, the reward the payoff of the last state."""
    state = torch.randint(STATES, (num_chains,), generator=draw)
    ids, mask = torch.zeros(num_chains, 2 + STEPS, dtype=torch.long), torch.zeros(num_chains, STEPS, dtype=torch.bool)
    ids[:, 1] = state + FIRST
    running = torch.ones(num_chains, dtype=torch.bool)
    for step in range(STEPS):
        ends = torch.rand(num_chains, generator=draw) < END
        jumps = torch.rand(num_chains, generator=draw) < JUMP
        target = torch.randint(STATES, (num_chains,), generator=draw)
        state = torch.where(running & ~ends & jumps, target, state)
        ids[:, 2 + step] = torch.where(running, torch.where(ends, 1, state + FIRST), 0)
        mask[:, step] = running
        running = running & ~ends
    attention = torch.cat([torch.zeros(num_chains, 1), torch.ones(num_chains, 1), mask], 1).long()
    rewards = torch.where(running, 0.0, PAYOFFS[state])
    episode = (rewards, mask, mask.sum(1), running)
    return SimpleNamespace(input_ids=ids, attention_mask=attention, mask=mask, episode=episode)


def local(sums):
    return sums


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.5)])
def test_critics_converge_to_the_analytic_values(tiny_model_path, gamma, lam):
    group = CriticEnsemble([load_critic(tiny_model_path) for _ in range(2)], learning_rate=1e-2, device="cpu", seed=0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        chains = play(64, draw)
        values = group.state_values(chains.input_ids, chains.attention_mask, STEPS, batch_size=64)
        targets = critic_targets(Episodes(values.mean(0), *chains.episode), gamma=gamma, lam=lam)
        rollout = (chains.input_ids, chains.attention_mask, chains.mask, targets)
        group.train_on(*rollout, group.assign([8] * 8), torch.arange(64), epochs=2, batch_size=8)
    chains = play(512, draw)
    values = group.state_values(chains.input_ids, chains.attention_mask, STEPS, batch_size=512)[:, :, :STEPS]
    states = chains.input_ids[:, 1:-1] - FIRST
    expected = torch.where(chains.mask, analytic_values(gamma)[states.clamp(min=0)], 0.0)
    returns = critic_targets(Episodes(torch.zeros(512, STEPS + 1), *chains.episode), gamma=gamma, lam=1.0)
    for found in values:
        assert explained_variance(found, returns, chains.mask, local) > 0.9
        assert explained_variance(found, expected, chains.mask, local) > 0.97
        assert (found - expected)[chains.mask].abs().mean() < 0.1
