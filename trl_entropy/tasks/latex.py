"""An answer in plain LaTeX, as math-verify reads it: symbols, words, markdown and TeX's shorthand in one notation."""

import re
import unicodedata

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
