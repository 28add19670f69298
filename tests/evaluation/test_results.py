"""What an evaluation's samples add up to, by hand."""

import pytest

from trl_entropy.evaluation.results import compare, summarise, table
from trl_entropy.evaluation.samples import Sample


def problem(number, *rewards, truncated=0):
    return [Sample(number, i, reward, 10 + i, i < truncated) for i, reward in enumerate(rewards)]


def test_counts_and_means():
    # three problems of four samples with 4, 1 and 0 correct ones; a reward of 0.99 is not enough, 1.5 is
    samples = [problem(0, 1, 1, 1, 1.5), problem(1, 0, 1, 0.99, 0, truncated=3), problem(2, 0, 0, -1, 0)]
    result = summarise(samples, [1, 2, 4], seed=0)
    assert result["correct"] == [4, 1, 0]
    assert result["avg"]["value"] == result["pass"]["1"]["value"] == pytest.approx(5 / 12)
    # pass@2 of 1 correct in 4: 1 - C(3, 2) / C(4, 2) = 1/2
    assert result["pass"]["2"]["value"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert result["pass"]["4"]["value"] == pytest.approx(2 / 3)
    assert (result["num_problems"], result["num_ungraded"], result["num_samples"]) == (3, 0, 4)
    assert result["mean_tokens"] == 11.5
    assert result["truncated_fraction"] == 3 / 12


def test_problems_that_cannot_be_graded_are_left_out_and_counted():
    result = summarise([problem(0, 1, 0), problem(1, None, None)], [1], seed=0)
    assert (result["correct"], result["num_ungraded"], result["avg"]["value"]) == ([1, None], 1, 0.5)
    assert result["pass"]["1"]["value"] == 0.5
    with pytest.raises(ValueError, match="could grade none"):
        summarise([problem(0, None, None)], [1], seed=0)


def test_difference_is_paired_by_problem():
    first = summarise([problem(0, 1, 0), problem(1, 0, 0), problem(2, None, None)], [1], seed=0)
    second = summarise([problem(0, 1, 1), problem(1, 1, 0), problem(2, 1, 1)], [1], seed=0)
    # both graded problems gain one of two
    assert compare(second, first, seed=0) == {"value": 0.5, "low": 0.5, "high": 0.5}
    nothing = summarise([problem(0, None), problem(1, None), problem(2, 1)], [1], seed=0)
    assert compare(nothing, first, seed=0) is None


def test_table_is_markdown_in_per_cent():
    first = summarise([problem(0, 1, 0), problem(1, 0, 0, truncated=1)], [1, 2], seed=0)
    second = summarise([problem(0, 1, 1), problem(1, 1, 0)], [1, 2], seed=0)
    second["difference"] = compare(second, first, seed=0)
    lines = table({"aime24": {"a": first, "b": second}}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = ["suite", "model", "avg@2", "pass@1", "pass@2", "- first model", "tokens", "cut off", "problems"]
    assert cells[0] == names
    assert set(lines[1]) == set("| -")
    assert cells[2][:2] + cells[2][5:] == ["aime24", "a", "", "10", "25.0 %", "2 of 2"]
    assert cells[3][:2] + cells[3][5:] == ["aime24", "b", "+50.0 [+50.0, +50.0]", "10", "0.0 %", "2 of 2"]
    assert cells[2][2] == "25.0 [0.0, 50.0]"
    assert len({len(line) for line in lines}) == 1


NAN = float("nan")


def test_samples_that_are_not_scored_are_left_out_and_counted():
    # of four samples each: 2 of 3 scored ones, 1 of 1, none scored, 0 of 4
    problems = [problem(0, 1, NAN, 1, 0), problem(1, None, 1, NAN, None), problem(2, *[NAN] * 4), problem(3, *[0] * 4)]
    result = summarise(problems, [1, 3, 4], seed=0)
    assert (result["correct"], result["scored"]) == ([2, 1, None, 0], [3, 1, 0, 4])
    assert (result["num_ungraded"], result["num_unscored"], result["num_problems"]) == (1, 8, 4)
    assert result["avg"]["value"] == result["pass"]["1"]["value"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    # three scored samples: the first and the last problem, 2 of 3 and 0 of 4 correct; four: the last alone
    assert (result["pass"]["3"]["value"], result["pass"]["3"]["num_problems"]) == (0.5, 2)
    assert (result["pass"]["4"]["value"], result["pass"]["4"]["num_problems"]) == (0.0, 1)
    lines = table({"s": {"m": result}}).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[-1] == "3 of 4, 8 samples not scored"
    assert cells[4].endswith("] (2 problems)")
    assert cells[5].endswith("] (1 problems)")
    assert summarise([problem(0, 1, NAN)], [1, 2], seed=0)["pass"]["2"] is None
    assert "| - " in table({"s": {"m": summarise([problem(0, 1, NAN)], [1, 2], seed=0)}})


def test_difference_of_problems_with_samples_left_out():
    first = summarise([problem(0, 1, NAN, 0), problem(1, 0, 0, 0), problem(2, NAN, NAN, NAN)], [1], seed=0)
    second = summarise([problem(0, 1, 1, 1), problem(1, NAN, NAN, 1), problem(2, 1, 1, 1)], [1], seed=0)
    # 1 - 1/2 and 1 - 0
    assert compare(second, first, seed=0)["value"] == pytest.approx(0.75)
