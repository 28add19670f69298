"""Where rows come from: a dataset of the Hugging Face hub, local files, or a saved dataset."""

import logging
from pathlib import Path
from typing import Any, TypeAlias

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)

from trl_entropy.tasks.templates import render

Rows: TypeAlias = Dataset | IterableDataset

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""File name endings that are read as local files, and the `datasets` builder that reads each."""

logger = logging.getLogger(__name__)


def load_source(
    source: str, *, config: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """Load every split of a dataset.

    Args:
        source: A local `.json`, `.jsonl`, `.parquet` or `.csv` file (one split, `"train"`), a folder written by
            `Dataset.save_to_disk` or holding such files, or else the name of a dataset of the hub.
        config: Configuration of a dataset that has several; for the hub and folders of files.
        streaming: Read rows as they are asked for, not all at once; not for a saved dataset.

    Raises:
        FileNotFoundError: If `source` looks like a local path and is not there.
        ValueError: If a local file is empty or has an ending that is not read, or a saved dataset is to be streamed.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"{source!r} ends in {path.suffix!r}. Use a file that ends in {_endings()}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{source!r} is empty. Name a file with rows.")
        return load_dataset(FILE_FORMATS[path.suffix], data_files={"train": str(path)}, streaming=streaming)
    if path.is_dir():
        if not _is_saved_dataset(path):
            return load_dataset(str(path), name=config, streaming=streaming)
        if streaming:
            raise ValueError(f"{source!r} is a saved dataset, which cannot be streamed. Leave streaming off.")
        saved = load_from_disk(str(path))
        return DatasetDict(train=saved) if isinstance(saved, Dataset) else saved
    if path.suffix in FILE_FORMATS or source.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{source!r} does not exist. Give an existing file or folder, or a dataset of the hub."
        )
    return load_dataset(source, name=config, streaming=streaming)


def select_split(
    splits: DatasetDict | IterableDatasetDict,
    split: str,
    *,
    test_size: int | float = 0,
    seed: int = 0,
    source: str = "the dataset",
) -> Rows:
    """Split `"train"` or `"test"` of a dataset, holding out rows of `"train"` where it has no `"test"` of its own.

    Args:
        splits: The dataset.
        split: Name of the split to return.
        test_size: Rows (or, below 1, the share of the rows) of `"train"` to hold out as `"test"`; 0 for none.
        seed: Seeds which rows are held out.
        source: What to call the dataset in an error.

    Raises:
        ValueError: If the split does not exist, if `test_size` would take all the rows, or if it is set although the
            dataset has a `"test"` split.
    """
    if test_size:
        if "test" in splits:
            raise ValueError(f"{source} has a 'test' split of its own: set the test size, {test_size}, to 0.")
        rows = len(splits["train"]) if "train" in splits else 0
        if not 0 < test_size < rows:
            raise ValueError(f"A test size of {test_size} must be above 0 and below the {rows} rows of {source}.")
        held_out = test_size if test_size < 1 else int(test_size)
        splits = splits["train"].train_test_split(test_size=held_out, seed=seed)
    if split not in splits:
        raise ValueError(
            f"{source} has no split {split!r}, only {', '.join(map(repr, splits))}. Name one of those, or set a test "
            "size to hold rows of 'train' out as 'test'."
        )
    return splits[split]


def drop_long_prompts(
    dataset: Rows, tokenizer: Any, max_prompt_length: int, chat_template_kwargs: dict[str, Any] | None = None
) -> Rows:
    """The rows whose prompt has at most `max_prompt_length` tokens, as the trainer renders it.

    TRL's `GRPOTrainer` neither drops nor truncates long prompts. A warning says how many rows are left out.

    Args:
        dataset: Column `prompt` holds text or chat messages.
        tokenizer: The policy's.
        max_prompt_length: Tokens, at least 1.
        chat_template_kwargs: The trainer's.

    Raises:
        ValueError: If no row is left, or as `trl_entropy.tasks.templates.render`.
    """

    def is_short(row: dict[str, Any]) -> bool:
        return len(render(tokenizer, row["prompt"], chat_template_kwargs)) <= max_prompt_length

    kept = dataset.filter(is_short)
    if isinstance(dataset, IterableDataset):
        return kept
    if len(kept) == 0:
        raise ValueError(f"max_prompt_length={max_prompt_length} leaves out all {len(dataset)} rows. Raise it.")
    if len(kept) < len(dataset):
        dropped = len(dataset) - len(kept)
        logger.warning("max_prompt_length=%d leaves out %d of %d rows.", max_prompt_length, dropped, len(dataset))
    return kept


def _endings() -> str:
    return ", ".join(FILE_FORMATS)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
