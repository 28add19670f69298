"""What repeated samples of a benchmark's problems say: avg@n, pass@k and their confidence intervals.

The samples have two levels: a benchmark's problems are drawn from all problems like them, and each has `n` samples.
The samples of one problem are not independent evidence about the others, so the intervals here resample problems and
keep the samples of each together. That covers both levels, because a problem's score already carries the noise of its
samples; resampling within problems too would count that noise twice (Davison and Hinkley, Bootstrap Methods and their
Application, 1997, section 3.8).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
NUM_RESAMPLES = 10_000
CHUNK = 1_000_000
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t with 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and the bounds of its 95 % confidence interval, all as fractions (0.42, not 42)."""

    value: float
    low: float
    high: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of `k` samples of a problem is correct.

    `1 - C(n - c, k) / C(n, k)` for `c` correct ones of `n` (Chen et al. 2021, arXiv 2107.03374, equation 1), computed
    as a product so that no factorial overflows. With `k = 1` it is the fraction that is correct.

    Args:
        num_samples: `n`.
        num_correct: `c`, in 0..n.
        k: In 1..n.

    Raises:
        ValueError: If `k` or `num_correct` is out of range.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct={num_correct} must be in 0..num_samples={num_samples}.")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} must be in 1..num_samples={num_samples}.")
    if num_samples - num_correct < k:
        return 1.0
    terms = 1.0 - k / np.arange(num_samples - num_correct + 1, num_samples + 1)
    return float(1.0 - np.prod(terms))


def estimate(scores: list[float], seed: int = 0) -> Estimate:
    """Mean of one score per problem, with a percentile bootstrap over problems.

    The same scores and seed give the same interval. Where every problem scores 0, or every one 1, the bootstrap has no
    width, so the exact binomial bound takes its place: with none of `P` problems solved, an accuracy above
    `1 - 0.025 ** (1 / P)` would have shown at least one in 97.5 % of the cases. With few problems the bootstrap is
    slightly narrow: in simulations with 30 problems it covered the truth 93 to 94 times in 100.

    Args:
        scores: One value in 0..1 per problem, such as its fraction of correct samples.
        seed: Seeds the resampling.

    Raises:
        ValueError: If there is no score.
    """
    if not scores:
        raise ValueError("There are no scores to estimate from: grade at least one problem.")
    if set(scores) in ({0.0}, {1.0}):
        slack = 1.0 - ((1.0 - LEVEL) / 2) ** (1.0 / len(scores))
        return Estimate(scores[0], max(0.0, scores[0] - slack), min(1.0, scores[0] + slack))
    return _bootstrap(np.asarray(scores, dtype=np.float64), seed)


def estimate_difference(scores: list[float], baseline: list[float], seed: int = 0) -> Estimate:
    """Mean of `scores - baseline`, two models' scores of the same problems, with a percentile bootstrap over problems.

    Pairing takes the difficulty of the problems out, so the interval is narrower than those of the two means.

    Raises:
        ValueError: If the lists are empty or differ in length.
    """
    if not scores or len(scores) != len(baseline):
        raise ValueError(f"{len(scores)} scores and {len(baseline)} of the baseline: give one of each per problem.")
    return _bootstrap(np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64), seed)


def estimate_proportion(num_correct: int, num_problems: int) -> Estimate:
    """A share of problems with one sample each, with the score interval of a proportion (Wilson 1927).

    Args:
        num_correct: In 0..num_problems.
        num_problems: At least 1.

    Raises:
        ValueError: If either is out of range.
    """
    if not 0 <= num_correct <= num_problems or num_problems < 1:
        raise ValueError(f"num_correct={num_correct} must be in 0..num_problems={num_problems}, which is at least 1.")
    z = 1.959964
    share, spread = num_correct / num_problems, z * z / num_problems
    centre = (share + spread / 2) / (1 + spread)
    margin = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return Estimate(share, max(0.0, centre - margin), min(1.0, centre + margin))


def half_width(values: Sequence[float]) -> float:
    """Half-width of the 95 % interval of the mean of a few independent values, such as one per seed (Student's t).

    Args:
        values: 2 to 10, in any unit.

    Raises:
        ValueError: If they are fewer or more.
    """
    if not 2 <= len(values) <= len(STUDENT) + 1:
        raise ValueError(f"{len(values)} values: an interval of their mean is for 2 to {len(STUDENT) + 1} of them.")
    return STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5


def _bootstrap(values: NDArray[np.float64], seed: int) -> Estimate:
    low, high = np.quantile(_resampled_means(values, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """`NUM_RESAMPLES` means of as many values drawn with replacement, in chunks that bound the memory."""
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // len(values))
    sizes = [min(rows, NUM_RESAMPLES - start) for start in range(0, NUM_RESAMPLES, rows)]
    return np.concatenate([values[generator.integers(len(values), size=(n, len(values)))].mean(1) for n in sizes])
