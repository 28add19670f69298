"""What an evaluation's samples add up to, as data and as a Markdown table."""

from dataclasses import asdict
from math import isnan
from typing import Any

from trl_entropy.evaluation.estimates import estimate, estimate_difference, pass_at_k
from trl_entropy.evaluation.samples import Sample
from trl_entropy.telemetry.markdown import markdown_table

CORRECT_REWARD = 1.0
"""A sample is correct if its rewards add up to at least this."""


def summarise(samples: list[list[Sample]], k: list[int], seed: int) -> dict[str, Any]:
    """One model's results on one suite.

    Samples without a reward are left out of the estimates and counted, as training leaves them out of a group's mean:
    a problem's accuracy is that of its scored samples, and `pass` for a `k` is over the problems that have as many.

    Returns:
        `avg` and `pass` (by k) as `trl_entropy.evaluation.estimates.Estimate`s with their `num_problems` (`None` where
        no problem has `k` scored samples), `correct` and `scored` (samples per problem; `correct` is `None` where none
        is scored), `num_problems`, `num_ungraded` (problems without a scored sample), `num_unscored` (samples),
        `num_samples` per problem, `mean_tokens` and `truncated_fraction`.

    Raises:
        ValueError: If no sample was scored.
    """
    rewards = [_rewards(problem) for problem in samples]
    scored = [len(of_problem) for of_problem in rewards]
    correct = [sum(reward >= CORRECT_REWARD for reward in of_problem) for of_problem in rewards]
    graded = [(count, n) for count, n in zip(correct, scored, strict=True) if n]
    if not graded:
        raise ValueError("The rewards could grade none of the problems: their answers cannot be parsed.")
    every = [sample for problem in samples for sample in problem]
    return {
        "avg": _estimate([count / n for count, n in graded], seed),
        "pass": {str(size): _estimate([pass_at_k(n, c, size) for c, n in graded if n >= size], seed) for size in k},
        "correct": [count if n else None for count, n in zip(correct, scored, strict=True)],
        "scored": scored,
        "num_problems": len(samples),
        "num_ungraded": len(samples) - len(graded),
        "num_unscored": len(every) - sum(scored),
        "num_samples": len(samples[0]),
        "mean_tokens": sum(sample.num_tokens for sample in every) / len(every),
        "truncated_fraction": sum(sample.truncated for sample in every) / len(every),
    }


def compare(result: dict[str, Any], baseline: dict[str, Any], seed: int) -> dict[str, float] | None:
    """The difference in avg@n of two models on one suite, paired by problem; `None` if no problem has both graded."""
    pairs = [pair for pair in zip(_accuracies(result), _accuracies(baseline), strict=True) if None not in pair]
    if not pairs:
        return None
    scores, others = map(list, zip(*pairs, strict=True))
    return asdict(estimate_difference(scores, others, seed))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, in per cent with 95 % confidence intervals over problems."""
    first = next(result for by_model in results.values() for result in by_model.values())
    head = ["suite", "model", f"avg@{first['num_samples']}", *(f"pass@{k}" for k in first["pass"])]
    head += ["- first model", "tokens", "cut off", "problems"]
    rows = []
    for suite, by_model in results.items():
        for model, result in by_model.items():
            difference = _per_cent(result["difference"], "+.1f") if result.get("difference") else ""
            graded = result["num_problems"] - result["num_ungraded"]
            problems = f"{graded} of {result['num_problems']}"
            if result["num_unscored"]:
                problems += f", {result['num_unscored']} samples not scored"
            estimates = [_over_problems(value, graded) for value in (result["avg"], *result["pass"].values())]
            lengths = [f"{result['mean_tokens']:.0f}", f"{100 * result['truncated_fraction']:.1f} %"]
            rows.append([suite, model, *estimates, difference, *lengths, problems])
    return markdown_table(head, rows)


def _rewards(problem: list[Sample]) -> list[float]:
    """Of the scored samples."""
    return [sample.reward for sample in problem if sample.reward is not None and not isnan(sample.reward)]


def _accuracies(result: dict[str, Any]) -> list[float | None]:
    return [c if c is None else c / n for c, n in zip(result["correct"], result["scored"], strict=True)]


def _estimate(scores: list[float], seed: int) -> dict[str, Any] | None:
    return {**asdict(estimate(scores, seed)), "num_problems": len(scores)} if scores else None


def _over_problems(value: dict[str, Any] | None, graded: int) -> str:
    """An estimate in per cent; with its number of problems where it leaves out some that others have."""
    if value is None:
        return "-"
    return _per_cent(value) + ("" if value["num_problems"] == graded else f" ({value['num_problems']} problems)")


def _per_cent(value: dict[str, float], form: str = ".1f") -> str:
    mean, low, high = (format(100 * value[key], form) for key in ("value", "low", "high"))
    return f"{mean} [{low}, {high}]"
