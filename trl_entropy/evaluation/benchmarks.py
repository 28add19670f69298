r"""The benchmarks of the papers: where each is on the Hugging Face hub, and which columns hold problem and answer.

The answers are graded by math-verify through `trl_entropy.tasks.grading`, as in training. OlympiadBench gives an
answer as a list of texts, which are joined by commas, and its tolerances for numerical answers are not used.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from trl_entropy.tasks.maths import as_text, parsable
from trl_entropy.tasks.sources import load_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's problems are.

    Attributes:
        dataset: Name of the dataset on the hub.
        split: Its split.
        problem: Column of the problem's text.
        answer: Column of the final answer: text, a number, or a list of texts.
        num_problems: How many there are.
        config: The dataset's configuration, where it has several.
    """

    dataset: str
    split: str
    problem: str
    answer: str
    num_problems: int
    config: str | None = None


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30),
    "aime25": Benchmark("MathArena/aime_2025", "train", "problem", "answer", 30),
    "hmmt25": Benchmark("MathArena/hmmt_feb_2025", "train", "problem", "answer", 30),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer", 500),
    "amc23": Benchmark("math-ai/amc23", "test", "question", "answer", 40),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench", "train", "question", "final_answer", 674, config="OE_TO_maths_en_COMP"
    ),
}


def load_benchmark(name: str, dataset_file: str | None = None) -> Dataset:
    r"""A benchmark's problems, in its own order.

    Args:
        name: A key of `BENCHMARKS`.
        dataset_file: A local copy of the dataset's file (`.parquet`, `.json`, `.jsonl` or `.csv`), for machines that
            do not reach the hub.

    Returns:
        Columns `prompt` (one user message) and `solution` (such as `"\boxed{204}"`).

    Raises:
        ValueError: If the name is unknown, a column is missing, or a row has no problem or no answer (it is numbered).
        FileNotFoundError: If `dataset_file` does not exist.
        ConnectionError: If the hub cannot be reached.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark={name!r} is unknown. Choose one of {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    source = dataset_file or benchmark.dataset
    rows = load_source(source)["train"] if dataset_file else _load_from_hub(name, benchmark)
    missing = {benchmark.problem, benchmark.answer} - set(rows.column_names)
    if missing:
        raise ValueError(
            f"{source} has no column {' and '.join(map(repr, sorted(missing)))}, only {', '.join(rows.column_names)}. "
            f"benchmark={name!r} needs the columns of {benchmark.dataset} on the hub."
        )
    if len(rows) != benchmark.num_problems:
        logger.warning("%s has %d rows, and %s has %d problems.", source, len(rows), name, benchmark.num_problems)
    return Dataset.from_list(list(_problems(rows, benchmark, source)))


def _load_from_hub(name: str, benchmark: Benchmark) -> Dataset:
    try:
        return load_source(benchmark.dataset, config=benchmark.config)[benchmark.split]
    except OSError as error:  # the hub's errors, ConnectionError and FileNotFoundError
        raise ConnectionError(
            f"benchmark={name!r}: cannot load {benchmark.dataset!r} from the hub ({str(error).splitlines()[0]}). On a "
            f"machine that reaches it, download the file of its split {benchmark.split!r} from "
            f"https://huggingface.co/datasets/{benchmark.dataset}, and give its path as --dataset_file."
        ) from error


def _problems(rows: Iterable[dict[str, Any]], benchmark: Benchmark, source: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        problem, answer = row[benchmark.problem], _answer(row[benchmark.answer])
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(f"{source}, row {number}, column {benchmark.problem!r}: no text. Mend the row.")
        if not answer:
            raise ValueError(f"{source}, row {number}, column {benchmark.answer!r}: no answer. Mend the row.")
        yield {"prompt": [{"role": "user", "content": problem.strip()}], "solution": parsable(answer)}


def _answer(answer: Any) -> str:
    parts = answer if isinstance(answer, list) else [answer]
    return ", ".join(filter(None, map(as_text, parts)))
