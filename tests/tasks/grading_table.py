# ruff: noqa: E501
r"""Golds, and completions with the reward that each should get, by kind. Written for this test, taken from no dataset.

`BOXED` has, for each gold, what stands in the completion's `\boxed{}`: right answers, then wrong ones. `TEXTS` has whole
completions. Where a notation has several readings, the comment of its kind says which is meant. `UNMET` has what is
graded wrongly.

`python -m tests.tasks.grading_table` counts how many of them TRL's `accuracy_reward` grades rightly.
"""

from tests.tasks.grading_boxed import BOXED

TEXTS: dict[str, list[tuple[object, list[str], list[str]]]] = {
    "several boxes": [  # the last counts; boxes with nothing but a comma, "and" or "or" between them are one answer
        (
            "4",
            [
                r"\boxed{3}. Wait, that is wrong. \boxed{4}",
                r"\boxed{3} no, \boxed{4}",
                r"First I thought \boxed{3}, but the case $n=1$ is impossible, or so it seems, hence \boxed{4}.",
                r"\boxed{4}. To check: \boxed{4}",
                r"\boxed{3}\boxed{4}" + "\n\n" + r"The final answer is \boxed{4}",
                "The answer is $\\boxed{5}$.\n\nLet me recompute.\n\nThe answer is $\\boxed{4}$.",
            ],
            [
                r"\boxed{4}. Wait, that is wrong. \boxed{3}",
                r"\boxed{4} no, \boxed{3}",
                r"\boxed{3} or \boxed{4}",
                r"\boxed{4}, \boxed{3}",
                r"\boxed{4} \boxed{5}",
                r"Either \boxed{4} or \boxed{5} or \boxed{6}",
                r"\boxed{4} is the value at $n=1$, but at $n=2$ it is \boxed{5}.",
            ],
        ),
        (
            "2, 3",
            [
                r"\boxed{2} and \boxed{3}",
                r"\boxed{2}, \boxed{3}",
                r"$x=\boxed{2}$ or $x=\boxed{3}$",
                r"\boxed{3} \text{ and } \boxed{2}",
                "$\\boxed{2}$ and $\\boxed{3}$.",
                r"$x_1 = \boxed{2}$, $x_2 = \boxed{3}$",
                r"\boxed{1}, no, that fails, so we are left with the two roots \boxed{2} and \boxed{3}",
            ],
            [r"\boxed{2}. Then \boxed{3}", r"\boxed{2} and \boxed{4}", r"\boxed{2}", r"\boxed{2}, \boxed{3}, \boxed{4}"],
        ),
    ],
    "unclosed boxes": [  # what is cut off is no answer
        ("42", [], [r"The answer is \boxed{42", r"\boxed{42 so", r"\boxed{", r"\boxed", r"\boxed{42} is what I thought, but it is \boxed{43", r"$\boxed{42"]),
        (r"\frac{1}{2}", [], [r"\boxed{\frac{1}{2}", r"\boxed{\frac{1}{2"]),
        ("{1,2}", [], [r"\boxed{\{1,2"]),
    ],
    "boxes in other forms": [
        ("42", [r"\boxed {42}", r"\boxed{ 42 }", r"$$\boxed{42}$$", r"\[\boxed{42}\]", r"**\boxed{42}**", r"\fbox{42}", r"$\boxed{x=42}$", r"\boxed 42", r"\boxed{\boxed{42}}",
                "\\boxed{\n42\n}", r"\( \boxed{42} \).", r"\boxed{42}$ dollars", r"$\boxed{42}\text{ cm}$"],
         [r"boxed{42}", r"\boxed{43} (not 42)", r"\boxed{}", r"\boxed{} 42", r"\box{42}"]),
        (r"\{1,2\}", [r"\boxed{\{1,2\}}", r"\boxed{\left\{1,2\right\}}"], [r"\boxed{\{1,3\}}"]),
        (r"50\%", [r"$\boxed{50}\%$", r"\boxed{50\%}", r"\boxed{50}%"], [r"\boxed{5}\%"]),
        (r"\frac{1}{2}", [r"$\boxed{\dfrac{1}{2}}$", r"\boxed{\frac12}.", r"$\boxed{\tfrac12}$"], [r"\boxed{\frac{1}{3}}"]),
        ("30°", [r"$\boxed{30}^\circ$", r"$\boxed{30^\circ}$"], [r"$\boxed{60}^\circ$"]),
    ],
    "answers without a box": [  # an announced answer counts, a number that merely stands there does not
        ("72", ["6 * 12 = 72\n#### 72", "The final answer is $72$.", "The final answer is $72$. I hope it is correct.", "#### 72.", "**Final answer:** $72$"], ["72", "6 * 12 = 72", "#### 6", "The final answer is $71$.", "Let $n=72$.", "#### 72\n#### 73"]),
        (r"\frac14", [r"The final answer is $\frac14$.", r"The final answer is $\frac{1}{4}$."], [r"The final answer is $\frac41$."]),
        ("5", ["The answer is $5$.", "**Answer**: $5$", r"Answer: \(5\)", "The answer is: $$5$$", "The answer is $4$. No, the answer is $5$."],
         ["", " ", "I do not know.", "5", "None", "\n", "I do not know the answer. $5$", "The answer is 5.", "The answer is $5$. No, the answer is $4$.", "The answer is not $5$."]),
        ("2, 3 ", ["The answer is $2$ and $3$.", "The answers are 2 and 3.\n#### 3, 2"], ["The answer is $2$. And $3$ is none."]),
        ("50% ", [r"The answer is $50$\%."], [r"The answer is $5$\%."]),
    ],
    "think tags": [
        ("4", [r"<think>maybe \boxed{3}</think>The answer is \boxed{4}.", r"<think>\boxed{4}</think> \boxed{4}"], [r"<think>\boxed{4}</think>So \boxed{3}", "<think>4</think>", "<think>the answer is 4"]),
    ],
    "huge texts": [
        ("4", ["Let $a=1$. " * 3000 + r"\boxed{4}", r"so \boxed{3}, " * 500 + "and now for something else entirely: " + r"\boxed{4}"], ["$a$ and " * 3000, "{" * 5000 + r"\boxed{5}", r"\boxed{" * 3000 + "4", r"\boxed{" + "(" * 2000 + "5" + ")" * 2000 + "}"]),
    ],
}  # fmt: skip


UNMET = [
    ("2 m", "200 cm", 1.0),  # no unit is converted
    ("75 cents", r"\$0.75", 1.0),
    ("2", r"\text{two}", 1.0),  # no number is read from words
    ("3rd", "third", 1.0),
    (r"\{}_5C_2", "10", 1.0),
    ("6^{100000}", r"2^{100000}\cdot 3^{100000}", 1.0),  # too large to compute, and compared by its form
    ("0.123456", "0.1234561", 0.0),  # decimals agree to six places
    ("12 apples", "12 pears", 0.0),  # units that are not known are not compared
]
"""Golds, box contents and rewards that are not met: by math-verify, and by what is in front of it."""


def pairs() -> list[tuple[str, object, str, float]]:
    """Rows of kind, gold, completion and reward."""
    rows = []
    for table, template in ((BOXED, r"Hence \boxed{%s}."), (TEXTS, "%s")):
        for kind, golds in table.items():
            for gold, right, wrong in golds:
                rows += [(kind, gold, template % text, 1.0) for text in right]
                rows += [(kind, gold, template % text, 0.0) for text in wrong]
    return rows


def count_of_trl() -> int:
    """How many pairs TRL's reward grades rightly, with the golds as they are."""
    from tqdm import tqdm
    from trl.rewards import accuracy_reward

    graded = (
        accuracy_reward([[{"role": "assistant", "content": text}]], [str(gold)]) == [reward]
        for _, gold, text, reward in tqdm(pairs())
    )
    return sum(graded)


if __name__ == "__main__":
    print(f"{count_of_trl()} of {len(pairs())}")
