"""The weights of the policy reach vLLM: its greedy output is the policy's own."""

from collections.abc import Callable
from typing import Any

import pytest

from .observe import POLICIES, PROMPTS, agreeing, change_a_lot, logged

pytestmark = pytest.mark.vllm

STALE = 8
"""At most so many prompts agree by chance when vLLM's weights are out of date."""


@pytest.mark.parametrize("policy", POLICIES)
def test_a_large_change_reaches_vllm(make_vllm_trainer: Callable[..., Any], policy: str) -> None:
    trainer = make_vllm_trainer(**POLICIES[policy])
    trainer.vllm_generation.sync_weights()
    assert agreeing(trainer) == len(PROMPTS)
    change_a_lot(trainer)
    assert agreeing(trainer) <= STALE
    trainer.vllm_generation.sync_weights()
    assert agreeing(trainer) == len(PROMPTS)


def agreement_at_rollouts(trainer: Any) -> list[int]:
    """Train, and count the agreeing prompts whenever vLLM is about to sample a rollout."""
    counts, generate = [], trainer.vllm_generation.generate

    def observed(*args: Any, **kwargs: Any) -> Any:
        counts.append(agreeing(trainer))
        return generate(*args, **kwargs)

    trainer.vllm_generation.generate = observed
    trainer.train()
    return counts


@pytest.mark.parametrize("policy", POLICIES)
def test_every_rollout_is_sampled_from_the_updated_policy(make_vllm_trainer: Callable[..., Any], policy: str) -> None:
    trainer = make_vllm_trainer(max_steps=12, erc_low=0.95, erc_high=1.05, **POLICIES[policy])
    assert agreement_at_rollouts(trainer) == [len(PROMPTS)] * 3


@pytest.mark.parametrize("policy", POLICIES)
def test_a_missing_sync_is_noticed(make_vllm_trainer: Callable[..., Any], policy: str) -> None:
    """The counterpart of the test above: four updates change what the policy says."""
    trainer = make_vllm_trainer(max_steps=12, erc_low=0.95, erc_high=1.05, **POLICIES[policy])
    trainer.vllm_generation.sync_weights()
    trainer.vllm_generation.sync_weights = lambda: None
    first, *later = agreement_at_rollouts(trainer)
    assert first == len(PROMPTS)
    assert max(later) <= STALE
    differences = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert differences[0] < 1e-5
    assert min(differences[1:]) > 1e-2
