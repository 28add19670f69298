r"""The benchmarks' columns, on local files shaped like the datasets of the hub, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from trl_entropy.evaluation import benchmarks
from trl_entropy.evaluation.benchmarks import BENCHMARKS, load_benchmark

ROWS: dict[str, dict[str, Any]] = {
    "aime24": {"id": 60, "problem": "Find $m+n$.", "solution": r"\boxed{204}", "answer": "204", "year": "2024"},
    "aime25": {"problem_idx": 1, "problem": "Find $m+n$.", "answer": 70, "problem_type": ["Number Theory"]},
    "hmmt25": {"problem_idx": 1, "problem": "Compute it.", "answer": r"\frac{2304}{25}", "problem_type": ["Geometry"]},
    "math500": {"problem": "Convert.", "solution": r"$\boxed{...}$", "answer": r"\left( 3, \frac{\pi}{2} \right)",
                "subject": "", "level": 2, "unique_id": ""},
    "amc23": {"id": 0, "question": "How many?", "answer": "27.0", "url": ""},
    "olympiadbench": {"id": 1, "question": "Find all.", "solution": ["..."], "final_answer": ["$2$,$3$"],
                      "is_multiple_answer": True, "answer_type": "Numerical"},
}  # fmt: skip
RIGHT = {
    "aime24": "204",
    "aime25": "70",
    "hmmt25": "92.16",
    "math500": r"(3, \pi/2)",
    "amc23": "27",
    "olympiadbench": "3, 2",
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_are_read_and_graded(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    from trl_entropy.tasks.grading import maths_reward

    (row,) = load_benchmark(name, write(tmp_path / "rows.jsonl", [ROWS[name]]))
    assert row["prompt"] == [{"role": "user", "content": ROWS[name][BENCHMARKS[name].problem]}]
    answers = [rf"so \boxed{{{text}}}" for text in (RIGHT[name], "1")]
    completions = [[{"role": "assistant", "content": text}] for text in answers]
    assert maths_reward(completions, solution=[row["solution"]] * 2) == [1.0, 0.0]
    assert f"has 1 rows, and {name} has {BENCHMARKS[name].num_problems} problems" in caplog.text


def test_parquet_files_as_the_hub_has_them(tmp_path: Path) -> None:
    Dataset.from_list([ROWS["olympiadbench"]] * 2).to_parquet(tmp_path / "rows.parquet")
    assert load_benchmark("olympiadbench", str(tmp_path / "rows.parquet"))["solution"][:] == ["$2$,$3$"] * 2


def test_hub_datasets_are_asked_for_by_name_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_source(source: str, *, config: str | None = None) -> dict[str, Dataset]:
        asked.append((source, config))
        rows = Dataset.from_list([ROWS["olympiadbench"]])
        return {"train": rows, "test": rows.select([])}

    monkeypatch.setattr(benchmarks, "load_source", load_source)
    assert len(load_benchmark("olympiadbench")) == 1
    assert asked == [("Hothan/OlympiadBench", "OE_TO_maths_en_COMP")]


@pytest.mark.parametrize("error", [ConnectionError("no route\ntrace"), FileNotFoundError("no dataset")])
def test_an_unreachable_hub_says_what_to_do(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_source(source: str, *, config: str | None = None) -> None:
        raise error

    monkeypatch.setattr(benchmarks, "load_source", load_source)
    with pytest.raises(
        ConnectionError, match=r"cannot load 'HuggingFaceH4/aime_2024'.*download.*'train'.*--dataset_file"
    ):
        load_benchmark("aime24")


def test_bad_rows_are_refused_by_number(tmp_path: Path) -> None:
    good = ROWS["aime24"]
    for change, message in [
        ({"answer": None}, r"row 1, column 'answer': no answer"),
        ({"answer": "  "}, r"row 1, column 'answer': no answer"),
        ({"problem": ""}, r"row 1, column 'problem': no text"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_benchmark("aime24", write(tmp_path / "rows.jsonl", [good, {**good, **change}]))


def test_missing_columns_and_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'answer' and 'question', only problem.*math-ai/amc23"):
        load_benchmark("amc23", write(tmp_path / "rows.jsonl", [{"problem": "1+1?"}]))
    with pytest.raises(ValueError, match=r"benchmark='aime2024' is unknown\. Choose one of aime24, aime25, hmmt25"):
        load_benchmark("aime2024")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_benchmark("aime24", str(tmp_path / "none.jsonl"))
