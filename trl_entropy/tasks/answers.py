r"""What an answer of mathematics may mean: its value, sign and unit, in all readings that its notation allows.

Where a notation has several meanings:

- Signs of percent, degrees and currencies and units may be missing on one side; where both sides have one, it must be
  the same.
  `50\%` is `\frac{1}{2}` too, and `30^\circ` is `\frac{\pi}{6}`. Unknown units are not compared, none is converted.
- A missing number base is no fault, a wrong one is.
- `a:b` and `a:b:c` are ratios; with two digits after it, `h:mm` may be a time too, and then agrees with no other time.
- Values without names are in the order of a gold's names: `(3,4)` and `x=3, y=4`. Those of one letter have no order.
- Words count without case and spaces. `ACD` are the choices A, C and D.
"""

import math
import re
from decimal import Decimal

from trl_entropy.tasks.latex import MARKDOWN

UNITS = {
    alias: unit
    for unit, aliases in {
        "mm": "mm millimeter millimetre",
        "cm": "cm centimeter centimetre",
        "dm": "dm decimeter decimetre",
        "m": "m meter metre",
        "km": "km kilometer kilometre",
        "inch": "inch in",
        "ft": "ft foot feet",
        "yd": "yd yard",
        "mile": "mi mile",
        "mg": "mg milligram",
        "g": "g gram",
        "kg": "kg kilogram",
        "lb": "lb lbs pound",
        "oz": "oz ounce",
        "ml": "ml milliliter millilitre",
        "l": "l liter litre",
        "ms": "ms millisecond",
        "s": "s sec second",
        "min": "min minute",
        "h": "h hr hour",
        "day": "day",
        "week": "week",
        "month": "month",
        "year": "yr year",
        "dollar": "dollar usd",
        "cent": "cent",
        "euro": "euro eur",
        "yen": "yen",
        "rupee": "rupee",
        "mph": "mph",
        "km/h": "km/h kmh kph kmph",
        "m/s": "m/s",
    }.items()
    for alias in aliases.split()
}
DEGREE = r"\^\s*(?:\\circ|\{\s*\\circ\s*\})"
SCALES = {"%": r"\frac{1}{100}", "°": r"\frac{\pi}{180}"}
WORD = r"[A-Za-z][A-Za-z./]*"
POWER = r"(?:\s*\^\s*(?:\d|\{\s*-?\d\s*\}))?"


def split_unit(text: str) -> tuple[str, str, str | None]:
    """A LaTeX answer as its value, its sign (`"%"`, `"°"` or none) and its unit (`None` if it has none of `UNITS`)."""
    match = re.fullmatch(rf"(.*[\d}})\s])\s*{DEGREE}\s*(?:\\text\{{\s*)?([CF])\s*\}}?", text)
    if match:
        return match[1].strip(), "", "°" + match[2]
    value, words = _split_words(text)
    unit = _unit(words)
    if match := re.fullmatch(r"(.*[^\s\\])\s*(?:\\%)", value, re.DOTALL):
        return match[1], "%", unit
    if (match := re.fullmatch(rf"(.*\S)\s*{DEGREE}", value, re.DOTALL)) and not TRIGONOMETRY.search(value):
        return match[1], "°", unit
    return value, "", unit


TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")


def _split_words(text: str) -> tuple[str, str]:
    r"""Cuts `\text{ cm}^2`, ` cm^2`, `cm`, ` (days)`, `^{\text{rd}}` off a value that ends in a digit or bracket."""
    for pattern in (ORDINAL, MODULUS, FRACTION_OF_UNITS, TEXT_UNIT, WORDS_IN_PARENTHESES, BARE_UNIT):
        match = pattern.fullmatch(text)
        if match and not match["value"].startswith(r"\text") and (pattern is not BARE_UNIT or _is_unit(match)):
            return match["value"].strip(), text[match.end("value") :].strip()
    return text, ""


ORDINAL = re.compile(r"(?P<value>-?\d+)\s*\^?\s*\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th)\s*\}?\s*\}?")
MODULUS = re.compile(r"(?P<value>.*\S)\s*\\pmod\s*(?:\w|\{[^{}]*\})")
FRACTION_OF_UNITS = re.compile(r"(?P<value>.*[\d})])\s*\\frac\{\s*\\text\{[^{}]*\}\s*\}\{\s*\\text\{[^{}]*\}\s*\}")
TEXT_UNIT = re.compile(rf"(?P<value>.*?[\d}})!A-Za-z%])\s*(?:\\text\s*\{{[^{{}}]*\}}{POWER}[\s/]*)+", re.DOTALL)
WORDS_IN_PARENTHESES = re.compile(r"(?P<value>.*\d)\s*\(\s*[A-Za-z][A-Za-z ]+\)")
BARE_UNIT = re.compile(rf"(?P<value>.*[\d}})])(?P<space>\s*)(?P<words>{WORD}(?:\s+{WORD})*{POWER})", re.DOTALL)


def tidy(answer: str) -> str:
    """A plain answer without markdown and final punctuation, its unit as text; all else as it was."""
    text = re.sub(MARKDOWN, r"\2", answer.strip(), flags=re.DOTALL).replace("°", r"^\circ")
    text = re.sub(r"(?<=[^\s.,;:?])[.,;:?\s]+$", "", text)
    value, words = _split_words(text)
    if not words or "\\" in words or ORDINAL.fullmatch(text):
        return text
    return re.sub(rf"^(.*?)({POWER})$", lambda unit: rf"{value} \text{{ {unit[1]}}}{unit[2]}", words)


def _is_unit(match: re.Match[str]) -> bool:
    """Whether words are a unit, not a product of variables: `5 m` and `5cm` have one, `5m` and `5ab` do not."""
    words = match["words"]
    bare = re.sub(rf"{POWER}$", "", words)
    if match["space"]:
        return _unit(words) is not None or bool(re.fullmatch(r"(?:[A-Za-z./]{3,}(?:\s+|$))+", bare))
    return len(bare) > 1 and _unit(words) is not None and bare != "in"


def _unit(words: str) -> str | None:
    """A unit by the name that all its spellings share; `None` if it is not in `UNITS`."""
    if words.startswith(r"\pmod"):
        return re.sub(r"[{}\s]", "", words)
    words = re.sub(r"\\frac\{(.*)\}\{(.*)\}", r"\1/\2", words)
    words = re.sub(r"\\text|[{}()\s]+", " ", words).replace(" /", "/").replace("/ ", "/").strip().rstrip(".").lower()
    words = re.sub(r"^(?:square|sq)\.? (.*)$", r"\1^2", words)
    words = re.sub(r"^(?:cubic|cu)\.? (.*)$", r"\1^3", words)
    match = re.fullmatch(r"([a-z/]+?)\s*(?:\^\s*(\d))?", words)
    if not match:
        return None
    name = match[1]
    for spelling in (name, name.removesuffix("s"), name.removesuffix("es")):
        if spelling in UNITS:
            return UNITS[spelling] + (match[2] or "")
    return None


def readings(right: str, answer: str) -> tuple[list[str], list[str]]:
    """The values of gold and answer in all readings that their signs, units and bases allow."""
    (gold, gold_sign, gold_unit), (given, sign, unit) = split_unit(right), split_unit(answer)
    marks = (gold_unit or gold_sign, unit or sign)
    if "°" in marks:  # `37^\circ` may be `37^\circ\text{C}`
        marks = (marks[0][:1], marks[1][:1])
    if all(marks) and marks[0] != marks[1]:
        return [gold], []
    golds, answers = _values(gold) or [gold], _values(given)[:1]
    if gold_sign != sign and gold_sign:
        golds.append(_scaled(gold, gold_sign))
    if gold_sign != sign and sign:
        bare = answers if sign == "°" or re.match(r"-?[1-9]", gold) else []
        answers = [*bare, _scaled(given, sign)]
    if (
        re.fullmatch(r"\d{1,3}(?:,\d{3})+", given)
        and "," in gold
        and not re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", gold)
    ):
        answers.append(given.replace(",", ", "))
    return golds, answers


def _scaled(value: str, sign: str) -> str:
    return rf"\left({formula(value)}\right) \cdot {SCALES[sign]}"


BASED = re.compile(r"(\d[\dA-Za-z]*|[\dA-F]+(?=_\{?16))_\{?(\d{1,2})\}?")


def _values(value: str) -> list[str]:
    r"""A gold's value and, if it has a number base, its digits as a decimal number."""
    match = BASED.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", value).replace(" ", ""))
    if not match:
        return [value]
    try:
        return [str(int(match[1], int(match[2]))), match[1]]
    except ValueError:
        return []


NAMES_OF_POINT = re.compile(r"^\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)\s*=\s*(?=\()")


def formula(text: str) -> str:
    """LaTeX that math-verify misreads, in LaTeX that it reads."""
    text = NAMES_OF_POINT.sub("", text)
    if r"\pm" in text or r"\begin" in text:
        text = re.sub(r"^[A-Za-z]\w*\s*=\s*", "", text)
    if re.search(r"[{(][^{}()]*\\pm", text):  # math-verify knows it between terms alone
        text = ", ".join(re.sub(r"\\pm(?![a-z])", sign, text) for sign in "+-")
    if TRIGONOMETRY.search(text):
        text = re.sub(rf"(\d+(?:\.\d+)?)\s*{DEGREE}", r"{(\\frac{\1 \\pi}{180})}", text)
    text = re.sub(rf"{DEGREE}", "", text)
    text = re.sub(r"(?<![\d_^{A-Za-z.])(\d+)\s*\(", r"\1 \\cdot (", text)
    text = re.sub(r"(?<![A-Za-z\\])d(?=\s*\\)", "{d}", text)  # not a differential
    return re.sub(r"\\log_\s*\{?e\}?(?![a-z])", r"\\ln ", text)


def as_text(answer: str | float | None) -> str:
    r"""An answer as LaTeX has it: without exponents such as `1e-05`; empty where there is none, as in "N/A"."""
    if isinstance(answer, float):
        if math.isinf(answer):
            return r"\infty" if answer > 0 else r"-\infty"
        answer = "" if math.isnan(answer) else format(Decimal(repr(answer)), "f")
    text = "" if answer is None else str(answer).strip()
    return "" if text.lower() in {"nan", "none", "null", "n/a"} else text
