"""avg@n, pass@k and their intervals against values worked by hand and against simulation."""

from itertools import combinations

import numpy as np
import pytest

from trl_entropy.evaluation import estimates
from trl_entropy.evaluation.estimates import estimate, estimate_difference, estimate_proportion, half_width, pass_at_k


@pytest.mark.parametrize(
    ("correct", "k", "expected"), [(2, 1, 0.4), (2, 2, 0.7), (2, 3, 0.9), (2, 4, 1.0), (0, 5, 0.0)]
)
def test_pass_at_k_by_hand(correct, k, expected):
    # n = 5, c = 2: 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10, and 1 - C(3, 3) / C(5, 3) = 1 - 1 / 10
    assert pass_at_k(5, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    outcomes = [True, False, False, True, False, False, False]
    for k in range(1, 8):
        share = np.mean([any(subset) for subset in combinations(outcomes, k)])
        assert pass_at_k(7, 2, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    # C(100000, 50000) has 30,000 digits; 1 - (1 - 1/100000 x 50000)
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5, abs=1e-9)
    assert pass_at_k(100_000, 100_000, 50_000) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=r"must be in"):
        pass_at_k(n, c, k)


def test_interval_of_two_problems_by_hand():
    # two problems, scores 0 and 1: the resampled means are 0, 0.5, 1 with chances 1/4, 1/2, 1/4
    result = estimate([0.0, 1.0])
    assert (result.value, result.low, result.high) == (0.5, 0.0, 1.0)


def test_interval_is_seeded_and_holds_the_mean():
    scores = [0.01, 0.26, 0.47, 0.53, 0.99, 0.74]
    assert estimate(scores, seed=1) == estimate(scores, seed=1) != estimate(scores, seed=2)
    result = estimate(scores)
    assert result.value == pytest.approx(0.5)
    assert result.low < 0.5 < result.high


def test_problems_are_resampled_not_samples():
    # 20 problems, half always solved and half never, 32 samples each. The mean's standard error is
    # sqrt(0.25 / 20) = 0.112 over problems; over 640 pooled samples it would be 0.020.
    result = estimate([0.0] * 10 + [1.0] * 10)
    assert result.high - result.low == pytest.approx(2 * 1.96 * 0.112, rel=0.1)


@pytest.mark.parametrize(("score", "low", "high"), [(0.0, 0.0, 0.1157), (1.0, 0.8843, 1.0)])
def test_none_or_all_solved_still_has_an_interval(score, low, high):
    # 30 problems: 1 - 0.025 ** (1 / 30) = 0.1157
    result = estimate([score] * 30)
    assert (result.value, result.low, result.high) == (
        score,
        pytest.approx(low, abs=1e-4),
        pytest.approx(high, abs=1e-4),
    )


def test_interval_covers_the_truth(monkeypatch):
    monkeypatch.setattr(estimates, "NUM_RESAMPLES", 500)
    generator, truth, covered = np.random.default_rng(0), 0.5 / 1.2, 0
    for _ in range(300):
        solve_rates = generator.beta(0.5, 0.7, size=30)
        result = estimate(list(generator.binomial(32, solve_rates) / 32))
        covered += result.low <= truth <= result.high
    assert 0.90 <= covered / 300 <= 0.98


def test_difference_is_paired():
    easy_and_hard = [0.1, 0.9, 0.2, 0.8, 0.0, 1.0]
    better = [score * 0.9 + 0.05 for score in easy_and_hard]
    result = estimate_difference(better, easy_and_hard)
    # 0.05 - 0.1 x score, so each problem's difference is within 0.05 of 0
    assert result.value == pytest.approx(0.0, abs=1e-12)
    assert -0.05 < result.low < 0 < result.high < 0.05
    assert estimate_difference([0.5, 0.5], [0.5, 0.5]) == estimates.Estimate(0.0, 0.0, 0.0)


def test_chunks_do_not_change_the_interval(monkeypatch):
    scores = list(np.linspace(0, 1, 100))
    expected = estimate(scores)
    # 7 resamples each, and 4 in the last
    monkeypatch.setattr(estimates, "CHUNK", 700)
    assert estimate(scores) == expected


def test_nothing_to_estimate_is_refused():
    with pytest.raises(ValueError, match="at least one problem"):
        estimate([])
    with pytest.raises(ValueError, match="one of each per problem"):
        estimate_difference([1.0], [])


@pytest.mark.parametrize(
    ("num_correct", "num_problems", "interval"),
    # By hand, z = 1.96: (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n).
    [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1.0)), (254, 1016, (0.2243, 0.2775))],
)
def test_interval_of_a_proportion_by_hand(num_correct: int, num_problems: int, interval: tuple[float, float]) -> None:
    found = estimate_proportion(num_correct, num_problems)
    assert found.value == num_correct / num_problems
    assert (found.low, found.high) == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize(("num_correct", "num_problems"), [(3, 2), (-1, 2), (0, 0)])
def test_a_proportion_of_nothing_is_refused(num_correct: int, num_problems: int) -> None:
    with pytest.raises(ValueError, match=f"num_correct={num_correct} must be in 0..num_problems={num_problems}"):
        estimate_proportion(num_correct, num_problems)


def test_half_width_by_hand() -> None:
    # standard deviation of 1..5 is sqrt(2.5): 2.776 sqrt(2.5 / 5); of 0 and 2 sqrt(2): 12.706 sqrt(2 / 2)
    assert half_width([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.96293, abs=1e-5)
    assert half_width([0.0, 2.0]) == pytest.approx(12.706)
    for few_or_many in ([1.0], [1.0] * 11):
        with pytest.raises(ValueError, match=f"{len(few_or_many)} values: an interval of their mean is for 2 to 10"):
            half_width(few_or_many)


def test_half_widths_cover_the_mean_as_often_as_they_say() -> None:
    """Of the means of normal values, of each number that there is a quantile for; 3.2 standard errors of the share."""
    generator = np.random.default_rng(0)
    for size in range(2, 11):
        drawn = generator.normal(size=(2000, size)).tolist()
        covered = np.mean([abs(np.mean(values)) <= half_width(values) for values in drawn])
        assert covered == pytest.approx(0.95, abs=0.0155)
