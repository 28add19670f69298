"""What an evaluation's samples add up to, as data and as a Markdown table."""

from dataclasses import asdict
from typing import Any

from trl_entropy.telemetry.estimates import estimate, estimate_difference, pass_at_k
from trl_entropy.telemetry.samples import Sample

CORRECT_REWARD = 1.0
"""A sample is correct if its rewards add up to at least this."""


def summarise(samples: list[list[Sample]], k: list[int], seed: int) -> dict[str, Any]:
    """A cell's results.

    Problems that a reward could not grade are left out of the estimates and counted.

    Returns:
        `avg` and `pass` (by k) as `trl_entropy.telemetry.estimates.Estimate`s, `correct` (per problem, `None` if not
        graded), `num_problems`, `num_ungraded`, `num_samples` per problem, `mean_tokens` and `truncated_fraction`.

    Raises:
        ValueError: If no problem could be graded.
    """
    correct = [_num_correct(problem) for problem in samples]
    graded = [count for count in correct if count is not None]
    if not graded:
        raise ValueError("The rewards could grade none of the problems: their answers cannot be parsed.")
    n, every = len(samples[0]), [sample for problem in samples for sample in problem]
    return {
        "avg": asdict(estimate([count / n for count in graded], seed)),
        "pass": {str(size): asdict(estimate([pass_at_k(n, c, size) for c in graded], seed)) for size in k},
        "correct": correct,
        "num_problems": len(samples),
        "num_ungraded": len(samples) - len(graded),
        "num_samples": n,
        "mean_tokens": sum(sample.num_tokens for sample in every) / len(every),
        "truncated_fraction": sum(sample.truncated for sample in every) / len(every),
    }


def compare(result: dict[str, Any], baseline: dict[str, Any], seed: int) -> dict[str, float] | None:
    """The difference in avg@n of two models on one suite, paired by problem; `None` if no problem has both graded."""
    pairs = [pair for pair in zip(result["correct"], baseline["correct"], strict=True) if None not in pair]
    if not pairs:
        return None
    scores, others = ([count / result["num_samples"] for count in counts] for counts in zip(*pairs, strict=True))
    return asdict(estimate_difference(scores, others, seed))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, in per cent with 95 % confidence intervals over problems."""
    first = next(result for by_model in results.values() for result in by_model.values())
    head = ["suite", "model", f"avg@{first['num_samples']}", *(f"pass@{k}" for k in first["pass"])]
    head += ["- first model", "tokens", "cut off", "problems"]
    rows = [head, ["---"] * len(head)]
    for suite, by_model in results.items():
        for model, result in by_model.items():
            difference = _per_cent(result["difference"], "+.1f") if result.get("difference") else ""
            problems = f"{result['num_problems'] - result['num_ungraded']} of {result['num_problems']}"
            estimates = [_per_cent(value) for value in (result["avg"], *result["pass"].values())]
            lengths = [f"{result['mean_tokens']:.0f}", f"{100 * result['truncated_fraction']:.1f} %"]
            rows.append([suite, model, *estimates, difference, *lengths, problems])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    rows[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def _num_correct(problem: list[Sample]) -> int | None:
    rewards = [sample.reward for sample in problem]
    return None if None in rewards else sum(reward >= CORRECT_REWARD for reward in rewards if reward is not None)


def _per_cent(value: dict[str, float], form: str = ".1f") -> str:
    mean, low, high = (format(100 * value[key], form) for key in ("value", "low", "high"))
    return f"{mean} [{low}, {high}]"
