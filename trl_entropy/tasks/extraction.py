"""Which part of a text is the answer: of a completion, and of a dataset's solution."""

import re

BOX_TOKENS = re.compile(
    r"\\(?:boxed|fbox)\s*(?:(?P<box>\{)|(?P<bare>-?\d[\d.,/]*(?<![.,])))|(?P<escaped>\\.)|(?P<brace>[{}])", re.DOTALL
)
BETWEEN_BOXES = re.compile(
    r"(?:[\s$*,;&{}]|\\[()\[\],;:! ]|\\(?:q?quad|text|mathrm)\b|\band\b|\bor\b|[A-Za-z](?:_\{?\w+\}?)?\s*=)*"
)
AFTER_BOX = re.compile(r"[\s$]{0,8}(\\?%|\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|°)")
MATHS = re.compile(
    r"\$\$(.+?)\$\$|(?<![\\\d])\$(?=\S)((?:[^$\\]|\\.)+?)\$(?!\d)|(?<!\\)\\\((.+?)\\\)|(?<!\\)\\\[(.+?)\\\]",
    re.DOTALL,
)
"""Mathematics between delimiters; `$5 and $6` is none."""
ANNOUNCED = re.compile(r"\banswer\*{0,3}(?:\s+is\b|\s*:)[\s:*]{0,8}", re.IGNORECASE)
FAR = 4_000
"""Characters after an announcement in which its answer ends: a search to the end of the text could be quadratic."""


def completion_answer(text: str) -> str | None:
    r"""The last box of a completion, or what follows `####` in its last line, or an announced answer.

    `None` if there is none of these. Boxes that only a comma, "and" or "or" parts are one answer. A box that is not
    closed is no answer, nor is one before it.
    """
    boxes, is_open = _boxes(text)
    if is_open:
        return None
    if boxes:
        return _joined(text, boxes)
    last_line = text.rstrip().rpartition("\n")[2].lstrip()
    if last_line.startswith("####"):
        return last_line.removeprefix("####").strip() or None
    return _announced(text)


def _announced(text: str) -> str | None:
    """The mathematics directly after the last "answer is" or "answer:", to the end of a list."""
    announcements = list(ANNOUNCED.finditer(text))
    pieces: list[tuple[int, int, str]] = []
    position = announcements[-1].end() if announcements else len(text)
    for match in MATHS.finditer(text, position, position + FAR):
        if match.start() != position and not (pieces and BETWEEN_BOXES.fullmatch(text, position, match.start())):
            break
        position = match.end()
        pieces.append((match.start(), position, _piece(match)))
    return _joined(text, pieces) if pieces else None


def _piece(match: re.Match[str]) -> str:
    return next(filter(None, match.groups()))


def gold_answer(text: str) -> str:
    r"""The final answer in a dataset's answer: the last box, what follows `####`, or the last piece of mathematics.

    Empty if the text goes on behind several pieces: which of them is the answer cannot be told.
    """
    boxes, _ = _boxes(text)
    if boxes:
        return _joined(text, boxes)
    text = text.rsplit("####", 1)[-1].strip()
    pieces = list(MATHS.finditer(text))
    if not pieces:
        return text
    rest = MATHS.sub("", text)
    is_list = re.fullmatch(r"(?:[\s,;.*]|\band\b|\bor\b)*", rest)
    if is_list or (pieces[0].start() == 0 and re.fullmatch(r"\s*(?:\\?%|°|[A-Za-z./ ]+)[.]?", rest)):
        return MATHS.sub(_piece, text)
    if len(pieces) > 1 and re.search(r"\w", text[pieces[-1].end() :]):
        return ""
    return _piece(pieces[-1])


def _boxes(text: str) -> tuple[list[tuple[int, int, str]], bool]:
    """Start, end and content of the outermost boxes that are not empty; and whether the last one is not closed."""
    stack: list[tuple[bool, int, int]] = []
    boxes: list[tuple[int, int, str]] = []
    for match in BOX_TOKENS.finditer(text):
        if match["bare"]:
            boxes.append((match.start(), match.end(), match["bare"]))
        elif match["box"] or match["brace"] == "{":
            stack.append((match["box"] is not None, match.start(), match.end()))
        elif match["brace"] and stack:
            is_box, start, inside = stack.pop()
            if is_box and text[inside : match.start()].strip():
                while boxes and boxes[-1][0] > start:  # those inside this one
                    boxes.pop()
                boxes.append((start, match.end(), text[inside : match.start()]))
    last = boxes[-1][0] if boxes else -1
    return boxes, any(is_box and start > last for is_box, start, _ in stack)


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str:
    first = len(boxes) - 1
    while first > 0 and BETWEEN_BOXES.fullmatch(text, boxes[first - 1][1], boxes[first][0]):
        first -= 1
    contents = list(dict.fromkeys(content.strip() for _, _, content in boxes[first:]))
    sign = AFTER_BOX.match(text, boxes[-1][1])
    return ", ".join(contents) + (sign[1] if sign else "")
