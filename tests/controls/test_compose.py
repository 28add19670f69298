"""The order in which the clipping controls act on a token."""

import pytest
import torch

from trl_entropy.controls import PolicyTokens, clip_controls

LEVEL = {"level": "token", "eps_low": 0.2, "eps_high": 0.2}


def tokens(log_ratios: list[float], advantages: list[float]) -> PolicyTokens:
    logps = torch.full((1, len(log_ratios)), -1.0, dtype=torch.float64)
    return PolicyTokens(
        logps=logps,
        old_logps=logps - torch.tensor([log_ratios], dtype=torch.float64),
        advantages=torch.tensor([advantages], dtype=torch.float64),
        mask=torch.ones(1, len(log_ratios), dtype=torch.bool),
    )


def test_nothing_on_changes_nothing_and_counts_the_clip_region() -> None:
    before = tokens([0.0, 0.3, -0.3], [1.0, 2.0, -2.0])
    after, metrics = clip_controls(before, torch.ones(1, 3), None, **LEVEL)
    assert torch.equal(after.advantages, before.advantages)
    assert torch.equal(after.old_logps, before.old_logps)
    assert set(metrics) == {"ppo_clip/low_fraction", "ppo_clip/high_fraction"}


def test_erc_gates_what_ce_gppo_has_given_back() -> None:
    """Ratios e^-0.3 with A < 0 and e^0.3 with A > 0 are outside 1 -+ 0.2; the first token also doubles its entropy."""
    before = tokens([-0.3, 0.3, 0.1], [-2.0, 2.0, 1.0])
    entropies = torch.tensor([[2.0, 1.0, 1.0]])
    after, metrics = clip_controls(
        before, entropies, torch.ones(1, 3), **LEVEL, ce_gppo_alphas=(0.5, 1.0), erc_bounds=(0.95, 1.05)
    )
    # alpha1 (1 - 0.2) A = -0.8, then gated; alpha2 (1 + 0.2) A = 2.4; untouched
    assert after.advantages.tolist() == [[0.0, pytest.approx(2.4), 1.0]]
    assert after.old_logps.tolist() == [[-1.0, -1.0, -1.1]]
    assert (metrics["ce_gppo/low_fraction"].value & before.mask).sum() == 1  # counted before the gate
    assert metrics["erc/clip_fraction"].value.tolist() == [[True, False, False]]


def test_erc_without_the_rollouts_entropies_is_refused() -> None:
    with pytest.raises(ValueError, match="old_entropies"):
        clip_controls(tokens([0.0], [1.0]), torch.ones(1, 1), None, **LEVEL, erc_bounds=(0.95, 1.05))


def test_the_floor_and_the_level_reach_erc() -> None:
    before, new, old = tokens([0.0, 0.0], [1.0, 1.0]), torch.tensor([[0.02, 2.0]]), torch.tensor([[0.01, 1.0]])
    erc = {"erc_bounds": (0.9, 1.1), "erc_entropy_floor": 0.1}
    after, _ = clip_controls(before, new, old, **LEVEL, **erc)
    assert after.advantages.tolist() == [[1.0, 0.0]]
    assert after.frozen is None
    sequence = {**LEVEL, **erc, "level": "sequence"}
    after, _ = clip_controls(before, new, old, **sequence)
    assert after.advantages.tolist() == [[1.0, 1.0]]
    assert after.frozen is not None
    assert after.frozen.tolist() == [[False, True]]
    after, _ = clip_controls(before, new, old, **sequence, constant_ratio=True)
    assert after.advantages.tolist() == [[1.0, 0.0]]
    assert after.frozen is None
