r"""Mathematics problems with a verifiable answer, graded by math-verify through `trl_entropy.tasks.grading`.

The default rows are those the Klear papers train on, KlearReasoner-MathSub-30K (arXiv 2508.07629).
"""

import logging
import re
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from trl_entropy.tasks import Task
from trl_entropy.tasks.answers import as_text, tidy
from trl_entropy.tasks.extraction import gold_answer
from trl_entropy.tasks.grading import maths_reward, read
from trl_entropy.tasks.sources import load_source, select_split
from trl_entropy.tasks.templates import Messages, add_instruction, check_template, text_of

DEFAULT_SOURCE = "Kwai-Klear/KlearReasoner-MathSub-30K"
PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "reward_model", "solution")
"""Where the gold is, the first that is not blank: `solution` may be the whole derivation."""
DELIMITED = re.compile(r"\\boxed\b|\$[^$]+\$|\\\(.+\\\)|\\\[.+\\\]", re.DOTALL)

logger = logging.getLogger(__name__)


def load(
    split: str,
    source: str = DEFAULT_SOURCE,
    limit: int | None = None,
    test_size: int | float = 0,
    seed: int = 0,
    config: str | None = None,
    template: str | None = None,
) -> Dataset:
    r"""Problems of a split, each with its answer in the form that math-verify parses.

    The rows need a prompt (`prompt`, `problem` or `question`: text, or chat messages) and an answer: `answer`, or
    `reward_model`, a mapping with `ground_truth`, or `solution`; of several, the first of these that is not blank.
    Rows whose answer is missing, blank, "N/A", "None" or NaN are left out, and so are derivations that go on behind
    several pieces of mathematics without a box; a warning says how many.

    Args:
        split: `"train"` or `"test"`.
        source: See `trl_entropy.tasks.sources.load_source`.
        limit: Number of rows to read, from the first; `None` for all.
        test_size: Rows (or, below 1, the share of the rows) of `"train"` to hold out as `"test"`, for a source without
            a `"test"` split; 0 for none.
        seed: Seeds which rows are held out.
        config: Configuration of a dataset that has several, such as `"main"` of `openai/gsm8k`.
        template: Model family whose instruction to box the answer is added to prompts that have none, a name of
            `trl_entropy.tasks.templates.TEMPLATES`; `None` leaves prompts as they are.

    Returns:
        Columns `prompt` (chat messages) and `solution` (such as `"\boxed{\frac{1}{2}}"`).

    Raises:
        ValueError: If a column is missing or a row has the wrong type (the message names it), if no row has an answer,
            if the template is unknown, or as `load_source` and `select_split`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or left out for all rows.")
    if template is not None:
        check_template(template)
    rows = select_split(load_source(source, config=config), split, test_size=test_size, seed=seed, source=source)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    problems = list(_problems(rows, source))
    unanswered = len(rows) - len(problems)
    if unanswered:
        logger.warning("%s: %d of %d rows have no answer and are left out.", source, unanswered, len(rows))
    if not problems:
        raise ValueError(f"{source}: none of the {len(rows)} rows of split {split!r} has an answer.")
    if template is not None:
        for problem in problems:
            problem["prompt"] = add_instruction(problem["prompt"], template)
    return Dataset.from_list(problems)


def parsable(answer: str) -> str:
    r"""`answer` in a form that math-verify parses whole: `\boxed{...}` unless it has LaTeX delimiters of its own.

    Without them math-verify finds only a part of many answers (2 of `2\sqrt{3}`) and nothing in others (`(1,2)`, `A`).
    What precedes `####`, as in GSM8K, is dropped; in a box, so are markdown and final punctuation, which bare answers
    may have.
    """
    answer = answer.rsplit("####", 1)[-1].strip()
    return answer if DELIMITED.search(answer) else rf"\boxed{{{tidy(answer)}}}"


def _problems(rows: Dataset, source: str) -> Iterator[dict[str, Any]]:
    prompt_column = _first_column(rows, PROMPT_COLUMNS, source, "a prompt")
    _first_column(rows, ANSWER_COLUMNS[::-1], source, "an answer")
    answer_columns = [name for name in ANSWER_COLUMNS if name in rows.column_names]
    for number, row in enumerate(rows):
        where = f"{source}, row {number}"
        prompt = _messages(row[prompt_column], f"{where}, column {prompt_column!r}")
        answers = (_answer(row[column], f"{where}, column {column!r}") for column in answer_columns)
        answer = next(filter(None, answers), "")
        gold = parsable(answer)
        if read(gold_answer(gold)):
            yield {"prompt": prompt, "solution": gold}


def _first_column(rows: Dataset, names: tuple[str, ...], source: str, what: str) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    raise ValueError(
        f"{source} has no column with {what}, only {', '.join(rows.column_names)}. Rename one to "
        f"{' or '.join(map(repr, names))}."
    )


def _messages(prompt: Any, where: str) -> Messages:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(messages, list) and all(map(_is_message, messages)) and any(text_of(m).strip() for m in messages):
        return [{**message, "content": text_of(message)} for message in messages]
    raise ValueError(
        f"{where}: {prompt!r} is not a prompt. Use text, or a list of messages, each with a 'role' and a 'content' of "
        "text."
    )


def _is_message(message: Any) -> bool:
    """Whether it has a role and text: as it is, in parts, or none beside calls of tools."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        return False
    content = message["content"]
    if isinstance(content, list):
        return all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _answer(answer: Any, where: str) -> str:
    """The answer as text; empty where there is none."""
    if isinstance(answer, dict):
        if "ground_truth" not in answer:
            raise ValueError(f"{where}: no 'ground_truth' among its keys {', '.join(answer)}. Add it.")
        answer = answer["ground_truth"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise ValueError(f"{where}: {answer!r} is not an answer. Use text or a number.")
    return as_text(answer)


TASK = Task(name="maths", load=load, reward_funcs=(maths_reward,))
