r"""Rewards for answers of mathematics, in place of TRL's `accuracy_reward` and `reasoning_accuracy_reward`.

TRL hands gold and completion to math-verify as they are. Here the text of the answer goes there (`answers`), under
limits (`equality`); words, choices and times of day, which are no mathematics, are compared as text.
"""

import atexit
import logging
import math
import re
import sys
import threading
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from trl_entropy.tasks.answers import NAMES_OF_POINT, as_text, formula, readings
from trl_entropy.tasks.environments import EnvironmentCrash
from trl_entropy.tasks.extraction import completion_answer, gold_answer
from trl_entropy.tasks.latex import latex
from trl_entropy.tasks.simulators import ChildProcess
from trl_entropy.tasks.templates import text_of

MAX_CHARACTERS = 2_000
MAX_DEPTH = 30
"""Longer answers, and those with brackets nested deeper, are wrong, unread."""
CHILD_SECONDS = 120.0

logger = logging.getLogger(__name__)

Completions = list[str] | list[list[dict[str, Any]]]


def maths_reward(
    completions: Completions, solution: list[str], log_extra: Callable[[str, list], None] | None = None, **kwargs: Any
) -> list[float | None]:
    r"""1 for a completion whose last `\boxed{}` has the gold's value, 0 for others.

    Like `trl.rewards.accuracy_reward`, whose arguments these are, it is `None` where the gold is not understood. It is
    `None`, with a warning, where math-verify runs out of time too.

    Args:
        completions: Text, or messages, of which the last counts.
        solution: The golds: LaTeX or plain text, boxed or not.
        log_extra: Takes columns for the table of completions.
        kwargs: Not used.
    """
    texts = map(_text, completions)
    grades = [_grade(gold, text) for gold, text in zip(solution, texts, strict=True)]
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", [gold for _, gold, _ in grades])
        log_extra("answer_parsed", [answer for _, _, answer in grades])
    return [reward for reward, _, _ in grades]


def reasoning_maths_reward(
    completions: Completions,
    solution: list[str],
    reasoning_delimiters: list[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """`maths_reward` of what follows the reasoning; 0 where the reasoning does not end.

    Args:
        completions: As in `maths_reward`.
        solution: As in `maths_reward`.
        reasoning_delimiters: What ends the reasoning: the first of these that a completion has, at its last place.
            `None` for `["</think>"]`.
        log_extra: As in `maths_reward`.
        kwargs: Not used.
    """
    delimiters = reasoning_delimiters or ["</think>"]
    texts = list(map(_text, completions))
    ends = [next((end for end in delimiters if end in text), None) for text in texts]
    finals = [text.split(end)[-1] if end else "" for text, end in zip(texts, ends, strict=True)]
    rewards = maths_reward(finals, solution, log_extra)
    return [reward if end else 0.0 for reward, end in zip(rewards, ends, strict=True)]


def _text(completion: str | list[dict[str, Any]] | None) -> str:
    """The text of a completion's last message."""
    if isinstance(completion, str):
        return completion
    return "" if not completion else text_of({"content": None, **completion[-1]})


def _grade(gold: Any, completion: str) -> tuple[float | None, str, str]:
    """The reward, and what was read as the gold and as the answer."""
    right = read(gold_answer(as_text(gold))) if isinstance(gold, str | int | float) else None
    if not right:
        return None, "[not read]", "[not read]"
    found = completion_answer(completion)
    answer = None if found is None else read(found)
    if answer is None:
        return 0.0, right, "[none]" if found is None else "[too long]"
    try:
        return compare(right, answer), right, answer
    except TimeoutError:
        logger.warning("No reward, math-verify ran out of time: gold %r, answer %r.", right[:200], answer[-200:])
        return None, right, "[timeout]"


def read(text: str) -> str | None:
    """The answer in plain LaTeX; `None` if it is too long or too deep."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = latex(text)
    depths = [0, *accumulate((character in "([{") - (character in ")]}") for character in text)]
    return text if max(depths) - min(depths) <= MAX_DEPTH else None


def compare(right: str, answer: str) -> float | None:
    """Whether two answers in plain LaTeX have the same value; `None` if the gold is not understood."""
    if right.replace(" ", "") == answer.replace(" ", ""):
        return 1.0 if right else None
    for rule in (_compare_choices, _compare_words, _compare_colons, _compare_named):
        reward = rule(right, answer)
        if reward is not None:
            return reward
    if any(POINT.fullmatch(a) and SET.fullmatch(b) for a, b in ((right, answer), (answer, right))):
        return 0.0
    golds, answers = readings(right, answer)
    verdict = _equal([_boxed(text) for text in golds], [_boxed(text) for text in answers])
    return None if verdict is None else float(verdict)


def _boxed(text: str) -> str:
    return rf"\boxed{{{formula(text)}}}"


def _equal(golds: list[str], answers: list[str]) -> bool | None:
    """`equality.equal`, in a child process unless this is the main thread, where its time-outs work.

    Raises:
        TimeoutError: If it takes too long.
    """
    if threading.current_thread() is threading.main_thread():
        from trl_entropy.tasks.equality import equal

        return equal(golds, answers)
    with _LOCK:
        if not _CHILDREN or not _CHILDREN[0].alive:
            _CHILDREN[:] = [ChildProcess([sys.executable, str(SERVER)], CHILD_SECONDS)]
            atexit.register(_CHILDREN[0].close)
        child = _CHILDREN[0]
    try:
        reply = child.call({"golds": golds, "answers": answers})
    except EnvironmentCrash as error:
        raise TimeoutError(str(error)) from error
    if "timeout" in reply:
        raise TimeoutError("math-verify ran out of time")
    return reply["equal"]


SERVER = Path(__file__).with_name("equality.py")
_CHILDREN: list[ChildProcess] = []
_LOCK = threading.Lock()

POINT, SET = re.compile(r"\([^()]*\)"), re.compile(r"\\\{[^()]*\\\}")
CHOICE = re.compile(r"\(?\s*(?:\\text\s*\{)?\s*\(?([A-J])\s*(?:\)\s*\}?\s*[:.]?\s*|[:.]\s+)(\S.*)", re.DOTALL)


def _compare_choices(right: str, answer: str) -> float | None:
    r"""`(A) 5` is the choice `A` and the value 5."""
    gold, given = CHOICE.fullmatch(right), CHOICE.fullmatch(answer)
    if gold and given:
        return float(gold[1] == given[1])
    if gold:
        return max(compare(gold[1], answer) or 0.0, compare(latex(gold[2]), answer) or 0.0)
    if given:
        return (compare(right, given[1]) and 1.0) or compare(right, latex(given[2]))
    return None


CHOICES = re.compile(r"^(?:\\text\s*\{)?(?=[A-J]{2,5}\}?$)(A?B?C?D?E?F?G?H?I?J?)\}?$")
"""`ACD`, which is `A, C, D`."""


def _compare_words(right: str, answer: str) -> float | None:
    if "," in right + answer:
        right, answer = (CHOICES.sub(lambda choices: ",".join(choices[1]), text) for text in (right, answer))
    gold, given = _words(right), _words(answer)
    if gold is not None and given is not None:
        return float(gold == given)
    return 0.0 if any(len(word) > 1 for word in (gold or []) + (given or [])) else None


def _words(text: str) -> list[str] | None:
    """The words or letters that an answer consists of; `None` if it is something else, such as `xyz`."""
    words = []
    text = re.sub(r"\s+only$", "", re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip())
    for part in re.sub(r"^([A-Z])\)$", r"\1", text.strip()).split(","):
        part = re.sub(r"[{}]", "", part).strip(" .")
        part = re.sub(r"^(?:\(\s*([A-Za-z])\s*\)|\[([A-Za-z])\])$", r"\1\2", part)
        if not re.fullmatch(r"[A-Za-z]|[A-Za-z]{2}[A-Za-z0-9' -]*", part) or re.fullmatch(r"[abcxyz]{2,}", part):
            return None
        if len(part) == 2 and part.lower() != "no" and not re.fullmatch("[IVX]+", part):
            return None
        words.append(re.sub(r"[\s-]+", "", part.lower()))
    return sorted(words)


CLOCK = re.compile(r"0?(\d{1,2}):([0-5]\d)\s*(?:([ap])\.?\s*m\.?|noon|midnight)?", re.IGNORECASE)


def _compare_colons(right: str, answer: str) -> float | None:
    """Times of day as they are written, and ratios by their value."""
    gold, given = map(_with_colons, (right, answer))
    if ":" not in gold + given:
        return None
    clock = CLOCK.fullmatch(gold)
    if clock and clock[2] == "00" and re.fullmatch(r"\d{1,2}", given):
        given += ":00"
    clock_given = CLOCK.fullmatch(given)
    if clock and clock_given:
        times = _time(clock, clock_given[3]), _time(clock_given, clock[3])
        return float(times[0][:2] == times[1][:2] and len({half for *_, half in times if half}) < 2)
    if clock and (":" in given or _is_time(clock)):
        return 0.0
    ratios = [_ratio(text) for text in (gold, given)]
    return None if ratios == [gold, given] else compare(*ratios)


def _time(clock: re.Match[str], other_half: str | None) -> tuple[int, str, str]:
    """Hour, minute and half of the day; `15:30` is 3:30 p.m. where the other side names a half."""
    hour, half = int(clock[1]), (clock[3] or "").lower()
    return (hour - 12, clock[2], "p") if other_half and 12 < hour < 24 else (hour, clock[2], half)


NAMED = re.compile(r"\s*(\\[a-z]+|[A-Za-z])\s*=([^=<>]+)")


def _compare_named(right: str, answer: str) -> float | None:
    """The gold `x=3, y=4` and values without names, which are in its order."""
    named = [NAMED.fullmatch(part) for part in right.split(",")]
    answer = re.sub(r"^\\\{(.*)\\\}$", r"\1", NAMES_OF_POINT.sub("", answer))
    if "=" in answer or len({match[1] for match in named if match}) != len(named) or len(named) < 2:
        return None
    values = ",".join(match[2].strip() for match in named if match)
    return compare(f"({values})", answer if answer.startswith("(") else f"({answer})")


def _with_colons(text: str) -> str:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^(\d{1,2})\s*(?=[ap]\.?\s?m\b)", r"\1:00 ", text, flags=re.IGNORECASE)
    return re.sub(r"\s*:\s*", ":", text)


def _is_time(clock: re.Match[str]) -> bool:
    """Whether `h:mm` is no ratio in lowest terms."""
    return bool(clock[3]) or clock[2][0] == "0" or math.gcd(int(clock[1]), int(clock[2])) > 1


def _ratio(text: str) -> str:
    parts = text.split(":")
    if len(parts) == 2:
        return rf"\frac{{{parts[0]}}}{{{parts[1]}}}"
    if len(parts) > 2:
        return "(1," + ",".join(rf"\frac{{{part}}}{{{parts[0]}}}" for part in parts[1:]) + ")"
    return text
