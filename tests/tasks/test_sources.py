"""Rows from local files, folders and saved datasets; no test reaches the hub."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerFast

from trl_entropy.tasks.sources import drop_long_prompts, load_source, select_split

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(10)]

WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    "rows.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8"),
    "rows.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    "rows.csv": lambda path: Dataset.from_list(ROWS).to_csv(path),
    "saved": lambda path: Dataset.from_list(ROWS).save_to_disk(path),
    "saved_splits": lambda path: DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_reads_local_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    splits = load_source(str(tmp_path / name))
    assert list(splits) == ["train"]
    assert [row["prompt"] for row in splits["train"]] == [row["prompt"] for row in ROWS]
    assert [str(row["answer"]) for row in splits["train"]] == [row["answer"] for row in ROWS]


def test_reads_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[0]), encoding="utf-8")
    splits = load_source(str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 10, "test": 1}


def test_streams_a_file(tmp_path: Path) -> None:
    WRITERS["rows.jsonl"](tmp_path / "rows.jsonl")
    train = load_source(str(tmp_path / "rows.jsonl"), streaming=True)["train"]
    assert isinstance(train, IterableDataset)
    assert next(iter(train))["prompt"] == "0+1="


@pytest.mark.parametrize("name", ["rows.json", "./rows", "/no/such/folder"])
def test_missing_local_path_is_not_looked_up_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_source(name)


def test_unknown_file_format(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("1+1=", encoding="utf-8")
    with pytest.raises(ValueError, match=r"ends in '\.txt'.*\.json, \.jsonl, \.parquet, \.csv"):
        load_source(str(tmp_path / "rows.txt"))


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ValueError, match=r"rows\.jsonl' is empty"):
        load_source(str(tmp_path / "rows.jsonl"))


def test_saved_dataset_cannot_be_streamed(tmp_path: Path) -> None:
    WRITERS["saved"](tmp_path / "saved")
    with pytest.raises(ValueError, match="cannot be streamed"):
        load_source(str(tmp_path / "saved"), streaming=True)


@pytest.mark.parametrize(("test_size", "held_out"), [(3, 3), (3.0, 3), (0.2, 2)])
def test_held_out_rows_are_the_same_each_time_and_not_trained_on(test_size: float, held_out: int) -> None:
    splits = DatasetDict(train=Dataset.from_list(ROWS))
    test = select_split(splits, "test", test_size=test_size, seed=1)["prompt"]
    train = select_split(splits, "train", test_size=test_size, seed=1)["prompt"]
    assert len(test) == held_out
    assert sorted([*train, *test]) == sorted(row["prompt"] for row in ROWS)
    assert list(select_split(splits, "test", test_size=test_size, seed=1)["prompt"]) == list(test)
    assert list(select_split(splits, "test", test_size=test_size, seed=2)["prompt"]) != list(test)


def test_nothing_is_held_out_unasked() -> None:
    splits = DatasetDict(train=Dataset.from_list(ROWS))
    assert len(select_split(splits, "train")) == 10
    with pytest.raises(ValueError, match="my rows has no split 'test', only 'train'"):
        select_split(splits, "test", source="my rows")


def test_test_size_out_of_range() -> None:
    splits = DatasetDict(train=Dataset.from_list(ROWS))
    with pytest.raises(ValueError, match="test size of 10 must be above 0 and below the 10 rows"):
        select_split(splits, "test", test_size=10)
    with pytest.raises(ValueError, match="'test' split of its own"):
        select_split(DatasetDict(train=splits["train"], test=splits["train"]), "test", test_size=2)


def test_long_prompts_are_left_out_and_counted(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """One token a character: "12", "123" and "1234" have 2, 3 and 4."""
    rows = Dataset.from_dict({"prompt": ["12", "123", "1234"]})
    assert list(drop_long_prompts(rows, tiny_tokenizer, 3)["prompt"]) == ["12", "123"]
    assert "leaves out 1 of 3 rows" in caplog.text
    with pytest.raises(ValueError, match="max_prompt_length=1 leaves out all 3 rows"):
        drop_long_prompts(rows, tiny_tokenizer, 1)


def test_chat_prompts_are_measured_with_their_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The template of this test adds 5 tokens, "user:", to the 2 of the content."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "12"}]]})
    assert len(drop_long_prompts(rows, tokenizer, 7)) == 1
    with pytest.raises(ValueError, match="leaves out all 1 rows"):
        drop_long_prompts(rows, tokenizer, 6)


def test_chat_prompts_are_measured_with_the_trainers_arguments(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """`<|user|>12<eos><|assistant|>` are 8 + 2 + 1 + 13 tokens, an empty thought another 15."""
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "12"}]]})
    assert len(drop_long_prompts(rows, chat_tokenizer, 24)) == 1
    no_thinking = {"enable_thinking": False}
    with pytest.raises(ValueError, match="max_prompt_length=38 leaves out all 1 rows"):
        drop_long_prompts(rows, chat_tokenizer, 38, no_thinking)
    assert len(drop_long_prompts(rows, chat_tokenizer, 39, no_thinking)) == 1
    (row,) = drop_long_prompts(rows.to_iterable_dataset(), chat_tokenizer, 39, no_thinking)
    assert row == rows[0]
    assert list(drop_long_prompts(rows.to_iterable_dataset(), chat_tokenizer, 38, no_thinking)) == []
