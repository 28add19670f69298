"""CE-GPPO by hand."""

import pytest
import torch

from trl_entropy.controls import PolicyTokens, ce_gppo, log_importance_weight

CLIP = {"eps_low": 0.2, "eps_high": 0.2}


def shape(ratios, advantages, level="token", mask=None, **settings):
    logps = torch.tensor(ratios, dtype=torch.float64).log()
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else torch.tensor(mask)
    tokens = PolicyTokens(logps, torch.zeros_like(logps), torch.tensor(advantages, dtype=torch.float64), mask)
    log_weight = log_importance_weight(tokens.logps, tokens.old_logps, mask, level)
    return ce_gppo(tokens, log_weight, **{"alpha1": 0.75, "alpha2": 0.5, **CLIP, **settings})


def test_token_level_by_hand():
    # r = 0.5: A < 0 is clipped, weight 0.75 * 0.8 = 0.6; A > 0 is not
    # r = 2:   A > 0 is clipped, weight 0.5 * 1.2 = 0.6; A < 0 is not
    # r = 1, and A = 0: never
    shaped, metrics = shape([[0.5, 0.5, 2.0, 2.0, 1.0, 2.0]], [[-1.0, 2.0, 3.0, -4.0, 5.0, 0.0]])
    assert shaped.advantages.tolist() == [[pytest.approx(-0.6), 2.0, pytest.approx(1.8), -4.0, 5.0, 0.0]]
    assert torch.equal(shaped.old_logps == shaped.logps, torch.tensor([[True, False, True, False, True, False]]))
    assert metrics["ce_gppo/low_fraction"].totals().tolist() == [1.0, 6.0]
    assert metrics["ce_gppo/high_fraction"].totals().tolist() == [1.0, 6.0]


def test_asymmetric_range():
    # clip-higher: 1.25 lies inside [0.8, 1.28]; 1.3 outside, weight 0.5 * 1.28 = 0.64
    shaped, _ = shape([[1.25, 1.3]], [[1.0, 1.0]], eps_high=0.28)
    assert shaped.advantages.tolist() == [[1.0, pytest.approx(0.64)]]


def test_sequence_level_by_hand():
    # first row: mean log-ratio (log 0.25 + log 1) / 2 = log 0.5, so r_seq = 0.5 < 0.8; the third token is padding
    # token 0 has A < 0: clipped, weight 0.6; token 1 has A > 0: not clipped, keeps r_seq A = 0.5 * 2
    # second row: r_seq = 1, untouched
    shaped, metrics = shape(
        [[0.25, 1.0, 9.0], [1.0, 1.0, 1.0]],
        [[-1.0, 2.0, -1.0], [-1.0, 2.0, -1.0]],
        level="sequence",
        mask=[[True, True, False], [True, True, True]],
    )
    assert shaped.advantages[0, :2].tolist() == [pytest.approx(-0.6), pytest.approx(1.0)]
    assert torch.equal(shaped.old_logps[0], shaped.logps[0])
    assert shaped.advantages[1].tolist() == [-1.0, 2.0, -1.0]
    assert shaped.old_logps[1].tolist() == [0.0, 0.0, 0.0]
    assert metrics["ce_gppo/low_fraction"].totals().tolist() == [1.0, 5.0]


def test_dual_clip_in_a_shifted_sequence():
    # r_seq = 16 with delta = 10: A > 0 is clipped above (weight 0.6), A < 0 lies beyond the dual clip: no gradient
    shaped, _ = shape([[16.0, 16.0]], [[1.0, -1.0]], level="sequence", delta=10.0)
    assert shaped.advantages.tolist() == [[pytest.approx(0.6), 0.0]]
    shaped, _ = shape([[16.0, 16.0]], [[1.0, -1.0]], level="sequence")
    assert shaped.advantages.tolist() == [[pytest.approx(0.6), pytest.approx(-16.0)]]


def test_underflowing_ratio_is_finite():
    # exp(-119) / exp(-119) is 0/0 in the released loss in float32; here the weight does not see the ratio
    logps = torch.full((1, 1), -119.0)
    tokens = PolicyTokens(logps, torch.zeros(1, 1), torch.full((1, 1), -1.0), torch.ones(1, 1, dtype=torch.bool))
    shaped, _ = ce_gppo(tokens, logps, alpha1=1.0, alpha2=1.0, **CLIP)
    assert shaped.advantages.item() == pytest.approx(-0.8)
    assert shaped.old_logps.item() == -119.0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        PolicyTokens(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(2), torch.ones(1, 2, dtype=torch.bool))


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match="importance_sampling_level='word'"):
        log_importance_weight(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "word")
