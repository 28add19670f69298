r"""The maths task: its columns, its refusals, and grading with golds as the datasets have them."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from trl_entropy.tasks import get_task
from trl_entropy.tasks.maths import load, parsable
from trl_entropy.tasks.templates import INSTRUCTION

KLEAR_ROW = {
    "data_source": "math_longcot_math_verify",
    "prompt": [{"content": "Let $n=9867$. What is the unit digit of $n^{3}-n^{2}$?", "role": "user"}],
    "ability": "math",
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "__index_level_0__": "29999",
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_klear_rows(tmp_path: Path) -> None:
    (row,) = load("train", source=write(tmp_path / "rows.jsonl", [KLEAR_ROW]))
    assert row == {
        "prompt": [{"role": "user", "content": KLEAR_ROW["prompt"][0]["content"]}],
        "solution": r"\boxed{4}",
    }


@pytest.mark.parametrize("prompt", ["prompt", "problem", "question"])
@pytest.mark.parametrize("answer", ["solution", "answer"])
def test_other_columns(prompt: str, answer: str, tmp_path: Path) -> None:
    (row,) = load("train", source=write(tmp_path / "rows.jsonl", [{prompt: "1+1?", answer: 2}]))
    assert row == {"prompt": [{"role": "user", "content": "1+1?"}], "solution": r"\boxed{2}"}


UNUSABLE = ["#### ", r"\boxed{}", "N/A", "None", "nan", "We get $x=3$ and $y=4$, thus 7", "x" * 3000]


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"problem": f"{i}?", "answer": answer} for i, answer in enumerate(["1", None, "  ", "0", *UNUSABLE])]
    source = write(tmp_path / "rows.jsonl", rows)
    assert list(load("train", source=source)["solution"]) == [r"\boxed{1}", r"\boxed{0}"]
    assert f"{2 + len(UNUSABLE)} of {len(rows)} rows have no answer" in caplog.text
    with pytest.raises(ValueError, match="none of the 2 rows"):
        load("train", source=write(tmp_path / "blank.jsonl", rows[1:3]))


def test_the_short_answer_is_the_gold(tmp_path: Path) -> None:
    worked = "Let $a=3$. Then $a^2=9$."
    rows = [
        {"problem": "q", "solution": worked, "answer": "9", "reward_model": None},
        {"problem": "q", "solution": worked, "answer": " ", "reward_model": {"ground_truth": "9"}},
        {"problem": "q", "solution": rf"{worked} Thus $\boxed{{9}}$.", "answer": None, "reward_model": None},
    ]
    golds = load("train", source=write(tmp_path / "rows.jsonl", rows))["solution"]
    assert list(golds) == [r"\boxed{9}", r"\boxed{9}", rf"{worked} Thus $\boxed{{9}}$."]
    pytest.importorskip("math_verify", reason="the extra `maths` is not installed")
    (reward,) = get_task("maths").reward_funcs
    assert reward(completions=[r"\boxed{9}", r"\boxed{9}", r"\boxed{3}"], solution=list(golds)) == [1.0, 1.0, 0.0]


def test_numbers_in_numeric_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = [1e-05, 1e16, 70.0, float("nan"), -2.5e-7, float("inf")]
    rows = Dataset.from_list([{"problem": "?", "answer": answer} for answer in answers])
    rows.to_parquet(tmp_path / "rows.parquet")
    golds = load("train", source=str(tmp_path / "rows.parquet"))["solution"]
    numbers = ["0.00001", "10000000000000000", "70.0", "-0.00000025", r"\infty"]
    assert list(golds) == [rf"\boxed{{{number}}}" for number in numbers]
    assert "1 of 6 rows have no answer and are left out" in caplog.text


def test_the_model_familys_instruction_to_box_the_answer(tmp_path: Path) -> None:
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": r"1+2? Use \boxed{}.", "answer": "3"}]
    source = write(tmp_path / "rows.jsonl", rows)
    asked, as_it_was = load("train", source=source, template="qwen3")["prompt"]
    assert asked == [{"role": "user", "content": f"1+1?\n{INSTRUCTION}"}]
    assert as_it_was == [{"role": "user", "content": r"1+2? Use \boxed{}."}]
    with pytest.raises(ValueError, match="template='gpt' is unknown"):
        load("train", source="not/looked/up", template="gpt")


def test_configuration_of_a_dataset_that_has_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """GSM8K's rows, whose answers end the derivation."""
    rows = Dataset.from_list([{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}])
    asked: list[Any] = []

    def load_source(source: str, *, config: str | None = None) -> DatasetDict:
        asked.append((source, config))
        return DatasetDict(train=rows)

    monkeypatch.setattr("trl_entropy.tasks.maths.load_source", load_source)
    (row,) = load("train", source="openai/gsm8k", config="main")
    assert asked == [("openai/gsm8k", "main")]
    assert row["solution"] == r"\boxed{2}"


def test_limit_and_held_out_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"problem": f"{i}?", "answer": str(i)} for i in range(10)])
    assert list(load("train", source=source, limit=2)["solution"]) == [r"\boxed{0}", r"\boxed{1}"]
    train, test = (load(split, source=source, test_size=4, seed=3)["solution"] for split in ("train", "test"))
    assert len(test) == 4
    assert sorted([*train, *test]) == [rf"\boxed{{{i}}}" for i in range(10)]
    with pytest.raises(ValueError, match="no split 'test'"):
        load("test", source=source)
    with pytest.raises(ValueError, match="limit=0"):
        load("train", source=source, limit=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "1+1?", "answer": "2"}, r"no column with a prompt, only text, answer\. Rename one to 'prompt'"),
        (
            {"problem": "1+1?", "label": "2"},
            r"no column with an answer, only problem, label\. Rename one to 'solution'",
        ),
        ({"problem": " ", "answer": "2"}, r"row 0, column 'problem': ' ' is not a prompt"),
        ({"problem": [{"content": "1+1?"}], "answer": "2"}, r"row 0, column 'problem'.*'role' and a 'content'"),
        ({"problem": "1+1?", "answer": ["2"]}, r"row 0, column 'answer': \['2'\] is not an answer"),
        ({"problem": "1+1?", "answer": True}, r"row 0, column 'answer': True is not an answer"),
        ({"problem": "1+1?", "reward_model": {"style": "rule"}}, r"row 0, column 'reward_model': no 'ground_truth'"),
    ],
)
def test_refusals_name_the_row_and_the_column(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load("train", source=write(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("4", r"\boxed{4}"),
        (r" \frac{1}{2} ", r"\boxed{\frac{1}{2}}"),
        (r"\boxed{7}", r"\boxed{7}"),
        (r"so it is $\frac{1}{2}$", r"so it is $\frac{1}{2}$"),
        (r"\(x\)", r"\(x\)"),
        ("$5", r"\boxed{$5}"),
        ("73.", r"\boxed{73}"),
        ("**12**", r"\boxed{12}"),
        ("30°", r"\boxed{30^\circ}"),
        ("24 cm^2", r"\boxed{24 \text{ cm}^2}"),
        ("180 (days)", r"\boxed{180 \text{ (days)}}"),
        ("5ab", r"\boxed{5ab}"),
        ("5!", r"\boxed{5!}"),
        ("(0,1]", r"\boxed{(0,1]}"),
        ("6 * 12 = <<6*12=72>>72\n#### 72", r"\boxed{72}"),
    ],
)
def test_parsable(answer: str, gold: str) -> None:
    assert parsable(answer) == gold


# Each answer as datasets write it, and the same value as a model may write it. Those marked are graded wrongly, or not
# at all, when the bare answer is handed to TRL's accuracy_reward.
SAME_VALUE = [
    ("4", "4"),
    ("-3", "-3.0"),
    ("1,000", "1000"),
    ("0.5", r"\frac{1}{2}"),
    (r"\frac{1}{2}", "0.5"),
    (r"$\frac{1}{2}$", "1/2"),
    (r"\dfrac{9}{4}", r"\frac{9}{4}"),  # None bare
    (r"\frac12", r"\frac{1}{2}"),  # None bare
    (r"2\sqrt{3}", r"\sqrt{12}"),  # 0 bare
    ("10^{5}", "100000"),  # 0 bare
    ("(1,2)", "(1, 2)"),  # None bare
    (r"(-\infty, 2)", r"(-\infty,2)"),  # 0 bare
    (r"\{1,2\}", r"\{2, 1\}"),  # None bare
    ("2, 3", "3, 2"),  # 0 bare
    (r"\pi", r"\pi"),  # None bare
    ("A", r"\text{A}"),  # None bare
    ("x^2+1", "1+x^2"),  # None bare
    ("2n^2", "2n^{2}"),  # 0 bare
    (r"90^\circ", "90"),
    (r"50\%", r"50\%"),
    (r"4\sqrt{2} \text{ cm}", r"4\sqrt{2}"),  # 0 bare
]


@pytest.mark.parametrize(("answer", "written"), SAME_VALUE)
def test_answers_are_graded_by_value(answer: str, written: str) -> None:
    pytest.importorskip("math_verify", reason="the extra `maths` is not installed")
    (reward,) = get_task("maths").reward_funcs
    right, wrong, unboxed = (
        [{"role": "assistant", "content": text}]
        for text in (rf"Hence \boxed{{{written}}}.", r"Hence \boxed{-77777}.", "I do not know.")
    )
    graded = reward(completions=[right, wrong, unboxed], solution=[parsable(answer)] * 3)
    assert graded == [1.0, 0.0, 0.0]


def test_last_boxed_answer_counts() -> None:
    pytest.importorskip("math_verify", reason="the extra `maths` is not installed")
    (reward,) = get_task("maths").reward_funcs
    # math-verify reads boxes that are close to each other as one set of answers
    between = "is what the first case would give, but it is impossible, so the second must hold:"
    texts = (rf"\boxed{{{first}}} {between} \boxed{{{last}}}." for first, last in ((3, 4), (4, 3)))
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(completions=completions, solution=[r"\boxed{4}"] * 2) == [1.0, 0.0]


def test_the_instruction_is_the_users_whatever_follows(tmp_path: Path) -> None:
    user, opened = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "Let me see:"}
    rows = [{"prompt": [user, opened], "answer": "2"}, {"prompt": [user], "answer": "2"}]
    prompts = load("train", source=write(tmp_path / "rows.jsonl", rows), template="qwen3")["prompt"]
    asked = {"role": "user", "content": f"1+1?\n{INSTRUCTION}"}
    assert list(prompts) == [[asked, opened], [asked]]


def test_messages_keep_what_belongs_to_them(tmp_path: Path) -> None:
    """Text in parts becomes text, and calls of tools stay: the chat template writes them."""
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}]
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "name": "add", "content": [{"type": "text", "text": "2"}]},
    ]
    source = write(tmp_path / "rows.jsonl", [{"prompt": prompt, "answer": "2"}])
    (found,) = load("train", source=source, template="qwen2.5")["prompt"]
    kept = [{key: value for key, value in message.items() if value is not None} for message in found]
    assert kept == [
        {"role": "user", "content": f"1+1?\n{INSTRUCTION}"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "add", "content": "2"},
    ]


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"role": "user", "content": " "}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "1+1?"}]}],
    ],
)
def test_prompts_without_text_or_with_more_are_refused(prompt: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": prompt, "answer": "2"}])
    with pytest.raises(ValueError, match=r"row 0, column 'prompt': \[.*\] is not a prompt"):
        load("train", source=source)
