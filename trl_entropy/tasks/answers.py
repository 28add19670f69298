r"""Answers of mathematics as text: which part of a text is the answer, and that part in LaTeX as math-verify reads it.

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
import unicodedata
from decimal import Decimal

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
WORDS_OF_NUMBERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|infinity|infty|inf|theta"
SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "π": r"\pi ",  # noqa: RUF001
    "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ",
    "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}",  # noqa: RUF001
    "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}", "∖": r"\setminus ",  # noqa: RUF001
    "⁻": "-", "。": ".", "“": '"', "”": '"', "’": "'",  # noqa: RUF001
    "α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "λ": r"\lambda ", "φ": r"\phi ",  # noqa: RUF001
}  # fmt: skip
CURRENCIES = {
    r"\$": "dollars", "$": "dollars", "¢": "cents", "€": "euros", r"\euro": "euros",
    "£": "pounds", r"\pounds": "pounds", "¥": "yen", r"\yen": "yen", "₹": "rupees",
}  # fmt: skip
SIGN = r"(?:\bUS\s*)?(?P<sign>\\?\$|[€£¥₹¢]|\\(?:pounds|euro|yen)\b)"
AMOUNT = r"(?P<amount>\d[\d.,{}\\!;: ]*?)"
MONEY = (
    re.compile(rf"(?P<minus>-?)\s*{SIGN}\s*{AMOUNT}[\s.]*"),
    re.compile(rf"(?P<minus>-?)\s*{AMOUNT}\s*{SIGN}[\s.]*"),
)


MARKDOWN = r"^(\*\*|__|`+|[*_\"'])(.+)\1$"
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


def latex(answer: str) -> str:
    """An answer in plain LaTeX: no markdown, delimiters, formatting, spacing or final punctuation."""
    text = answer.strip()
    if not text.isascii():
        text = _ascii(text)
    text = _without_formatting(text)
    text = _as_words_say(text)
    text = _as_tex_groups(text)
    text = _numbers(text)
    return _sets(_trimmed(text))


def _ascii(text: str) -> str:
    """Symbols as LaTeX, digits of all scripts as ASCII, nothing of no width."""
    text = re.sub("[¼-¾⅐-⅞]", _fraction, text)
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", re.sub("[₀-₉]+", r"_{\g<0>}", text))
    for symbol, command in SYMBOLS.items():
        text = text.replace(symbol, command)
    text = re.sub("[\u200b-\u200f\u2060\ufeff]", "", _compatible(text))
    return re.sub(r"\d", lambda digit: str(int(digit[0])), text)


def _fraction(match: re.Match[str]) -> str:
    top, bottom = re.findall(r"\d+", _compatible(match[0]))
    return rf"\frac{{{top}}}{{{bottom}}}"


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _sets(text: str) -> str:
    r"""`]0,1[` as `(0,1)`, `\{x \mid x>2\}` as `x>2`, and single parentheses for double ones."""
    text = re.sub(r"^\](?=[^\[\]]*,)", "(", text)
    text = re.sub(r"(?<=[^\[\]])\[$", ")", text) if text[:1] in "([" else text
    text = re.sub(r"\\\{\s*\\\}", r"\\emptyset ", text)
    text = re.sub(r"^\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|[|:])\s*(.+)\\\}$", r"\1", text)
    count = 1
    while count:
        text, count = re.subn(r"\(\s*(\([^()]*\))\s*\)", r"\1", text)
    return text


def _without_formatting(text: str) -> str:
    text = re.sub(MARKDOWN, r"\2", text, flags=re.DOTALL).strip()
    if money := next(filter(None, (pattern.fullmatch(text) for pattern in MONEY)), None):
        text = rf"{money['minus']}{money['amount']}\text{{ {CURRENCIES[money['sign']]}}}"
    text = re.sub(rf"{SIGN}|\s*o'clock", "", text)
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    text = re.sub(r"\{\s*([,:])\s*\}", r"\1", text)
    text = re.sub(r"\\!", "", text)
    text = re.sub(
        r"(?<!\\)\\[,;: ]|~|&nbsp;|\\(?:q?quad|enspace|thinspace|displaystyle|textstyle|limits)\b", " ", text
    )
    text = re.sub(r"\\(?:left|right|[bB]igg?)\s*\.", "", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\(?:mathbf|mathbb|Bbb)\s*\{?\s*([RQZ])\s*\}?", r"\\mathbb{\1}", text)
    text = re.sub(
        r"\\(?:mathrm|textrm|textbf|textit|textnormal|textsf|mbox|operatorname|mathsf|rm|emph)\s*\{", r"\\text{", text
    )
    text = re.sub(r"\\(?:text)?color\s*\{\w*\}|\\(?:bf|rm|it|bfseries)\b", "", text)
    text = re.sub(r"\\(?:mathbf|bm|boldsymbol)\s*\{\s*([a-z])\s*\}", r" \1", text)
    text = re.sub(r"\\(?:boxed|fbox|underline|mathbf|mathit|bm|boldsymbol|mathnormal|hbox)\s*(?=\{)", "", text)
    text = re.sub(
        r"\\(?:vec|overrightarrow|overline(?=\s*\{\s*[A-Z]{2}\s*\}))\s*(?=\{)|\\(?:angle|triangle)\b", "", text
    )
    text = re.sub(r"\\[hv]?(?:space|phantom)\s*\{[^{}]*\}|\\(?:[lL]arge|LARGE|[hH]uge|small|checkmark)\b", "", text)
    text = re.sub(r"\\lbrace\b", r"\\{", re.sub(r"\\rbrace\b", r"\\}", text))
    text = re.sub(r"\\langle\b|\\lparen\b", "(", re.sub(r"\\rangle\b|\\rparen\b", ")", text))
    text = re.sub(r"\\begin\{array\}\s*\{[^}]*\}", r"\\begin{matrix}", text).replace(r"\end{array}", r"\end{matrix}")
    text = re.sub(
        r"[(\[]\s*\\begin\{matrix\}(.*)\\end\{matrix\}\s*[)\]]",
        r"\\begin{pmatrix}\1\\end{pmatrix}",
        text,
        flags=re.DOTALL,
    )
    text = re.sub(r"(?:\\\\\s*)+(?=\\end\{)", "", text)
    text = re.sub(
        r"\\begin\{cases\}(.*)\\end\{cases\}", lambda cases: cases[1].replace(r"\\", ","), text, flags=re.DOTALL
    )
    return re.sub(r"\s+", " ", text).strip()


RELATIONS = {
    r"\geqslant": r"\ge",
    r"\leqslant": r"\le",
    r"\gt": ">",
    r"\lt": "<",
    r"\colon": ":",
    r"\degree": r"^\circ",
    r"\equiv": "=",
    r"\lg": r"\log",
    r"\varnothing": r"\emptyset",
}


def _as_words_say(text: str) -> str:
    text = re.sub(
        r"\\(?:geqslant|leqslant|gt|lt|colon|degree|equiv|lg|varnothing)(?![a-zA-Z])",
        lambda match: RELATIONS[match[0]] + " ",
        text,
    )
    text = text.replace(">=", r"\ge ").replace("<=", r"\le ").replace("**", "^")
    text = re.sub(r"\\text\s*\{\s*([-+\d.,:]+)\s*\}", r"\1", text)
    text = re.sub(r"\\text\s*\{([^{}]*)\}", _text, text).strip()
    text = re.sub(
        r"^(?:(?:the )?(?:final )?answers?(?: is| are)?\s*:?|option|choice)\s*(?=\S)", "", text, flags=re.IGNORECASE
    )
    text = re.sub(r"^\s*(?:\\text\s*\{)?\s*all real(?:s| numbers)\s*\}?$", r"\\mathbb{R}", text, flags=re.IGNORECASE)
    text = BOTH.sub(_chain, text)
    text = re.sub(r",?\s*\b(?:and|or)\b\s*", ", ", text)
    text = re.sub(r"\s*(?:\bpercent(?:age)?|\bpct)\b|(?<!\\)%", r"\\%", text)
    text = re.sub(r"\s*\bdeg(?:ree)?s?\b", r"^\\circ ", text)
    text = re.sub(r"(?<=\d)\s*\bto\b\s*(?=\d)", ":", text)
    return re.sub(rf"(?<![a-zA-Z\\])({FUNCTIONS})(?![a-zA-Z])", _command, text)


LESS, MORE = r"<|\\leq?(?![a-z])", r">|\\geq?(?![a-z])"
BOTH = re.compile(
    rf"^\s*(?P<name>[A-Za-z])\s*(?:(?P<more>{MORE})|(?P<less>{LESS}))(?P<first>[^<>]+?)\s*\band\b\s*"
    rf"(?P=name)\s*(?(more)(?:{LESS})|(?:{MORE}))(?P<last>[^<>]+)$"
)
"""Two bounds, such as `x>2 and x<5`."""


def _chain(match: re.Match[str]) -> str:
    signs = re.findall(rf"{LESS}|{MORE}", match[0])
    (low, low_sign), (high, high_sign) = sorted(
        zip((match["first"], match["last"]), signs, strict=True), key=lambda bound: not re.fullmatch(MORE, bound[1])
    )
    lower, upper = (r"\le" if sign.startswith("\\") else "<" for sign in (low_sign, high_sign))
    return f"{low} {lower} {match['name']} {upper} {high}"


def _text(match: re.Match[str]) -> str:
    inside = match[1].strip()
    if re.fullmatch(r"(?:and|or|to|percent|degrees?|infinity|answer:|the answer is|[eid])", inside, re.IGNORECASE):
        return f" {inside} "
    return match[0]


def _command(match: re.Match[str]) -> str:
    name = {"infinity": "infty", "inf": "infty"}.get(match[1], match[1])
    return rf"\{name} "


def _as_tex_groups(text: str) -> str:
    r"""Arguments that TeX takes without braces, in braces: `\frac12`, `\sqrt3`, `\sqrt(2)`, `2^n`."""
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])|\\nicefrac(?![a-zA-Z])|\\sfrac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\[dt]binom(?![a-zA-Z])", r"\\binom", text)
    for name, count in (("binom", 2), ("frac", 2), ("sqrt", 1)):
        text = _braced(text, name, count)
    return text


def _braced(text: str, name: str, count: int) -> str:
    done, position = [], 0
    for match in re.finditer(rf"\\{name}(?![a-zA-Z])\s*(\[[^\]]*\])?", text):
        if match.start() < position:
            continue  # inside an argument, which is braced by the call below
        done.append(text[position : match.end()].rstrip())
        position = match.end()
        arguments = []
        for _ in range(count):
            argument, position = _argument(text, position)
            arguments.append(_braced(argument, name, count))
        if name == "binom":  # sympy would compute it on the spot, however large
            top, bottom = arguments
            done[-1] = done[-1].removesuffix(r"\binom") + rf"\frac{{({top})!}}{{({bottom})!(({top})-({bottom}))!}}"
        else:
            done += [f"{{{argument}}}" for argument in arguments]
    return "".join(done) + text[position:]


def _argument(text: str, position: int) -> tuple[str, int]:
    """What TeX takes as an argument at a position, without its braces; parentheses count as braces after a command."""
    while position < len(text) and text[position] == " ":
        position += 1
    if position < len(text) and text[position] in "{(":
        opening, closing = ("{", "}") if text[position] == "{" else ("(", ")")
        depth = 0
        for end in range(position, len(text)):
            depth += (text[end] == opening) - (text[end] == closing)
            if depth == 0:
                return text[position + 1 : end], end + 1
    token = re.compile(r"\\sqrt\s*(?:\{[^{}]*\}|\d)|\\[a-zA-Z]+|.|$", re.DOTALL).match(text, position)
    assert token is not None
    return token[0], token.end()


def _numbers(text: str) -> str:
    text = re.sub(r"(?<![\w.])(\d+)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", _repeating, text)
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times ", text)
    text = re.sub(r"(?<![A-Za-z_\\\d.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])", r"\1\\times 10^{\2}", text).replace(
        "^{+", "^{"
    )
    text = re.sub(r"(?<![\d.,_^])(\d{1,3}(?: \d{3})+)(?![\d,])", lambda match: match[1].replace(" ", ""), text)
    text = re.sub(r"(?<![\d.,_^{])(\d+) (\d+)\s*/\s*(\d+)(?!\d)", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<![_\d])(\d+) (?=\d)", r"\1, ", text)
    for word, zeros in WORDS_OF_NUMBERS.items():
        text = re.sub(rf"(?<=\d)\s*(?:\\text\{{\s*{word}\s*\}}|{word}\b)", rf"\\cdot 10^{{{zeros}}}", text)
    return text


def _repeating(match: re.Match[str]) -> str:
    whole, start, period = match.groups()
    numerator = int(whole + start + period) - int(whole + start)
    return rf"\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(start)}}}"


def _trimmed(text: str) -> str:
    previous, text = None, re.sub(r"\s+", " ", text)
    while text != previous:
        previous = text
        text = re.sub(r"(?:\\\\|\\|[.,;:?\s])+$", "", text)
        text = re.sub(r"^(?:=|\\approx(?![a-z])|[.,;:?](?!\d)|\s)+", "", text)
        if re.fullmatch(r"\{[^{}]*\}", text):
            text = text[1:-1]
    return re.sub(r"^\.(?=\d)", "0.", text)


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
