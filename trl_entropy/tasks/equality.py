r"""Whether LaTeX answers have equal values, by math-verify. Run as a file, it answers lines of JSON: see `main`.

Beside math-verify's settings it bounds what is computed (`bounded`), because a number of a billion digits cannot be
interrupted, and evaluates exact numbers, because math-verify takes differences below 1e-15 for nothing. A decimal
agrees with what it rounds to: six places, or six digits if the gold is below 0.1. `(a,b)` is a point or an open
interval, whatever the other side is.

Imports nothing of this package, so that it starts fast.
"""

import itertools
import json
import logging
import math
import os
import re
import sys
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException
from math_verify.utils import timeout

logger = logging.getLogger(__name__)

PARSING_SECONDS, COMPARING_SECONDS = 10, 10
"""math-verify's time-outs. They use signals, so they work in a process's main thread alone."""
MAX_DIGITS = 10_000
"""Powers and factorials with more digits than this are compared by their form."""
EXTRACTION = LatexExtractionConfig(
    normalization_config=NormalizationConfig(), boxed_match_priority=0, try_extract_without_anchor=False
)


def equal(golds: list[str], answers: list[str]) -> bool | None:
    r"""Whether one of the answers has the value of one of the golds.

    Args:
        golds: LaTeX in `\boxed{}`.
        answers: The same.

    Returns:
        `None` if none of the golds is understood.

    Raises:
        TimeoutError: If math-verify takes too long.
    """
    try:
        parsed = list(filter(None, map(_parse, golds)))
        return any(_equal(gold, _parse(answer)) for gold in parsed for answer in answers) if parsed else None
    except TimeoutException as error:
        raise TimeoutError("math-verify ran out of time") from error


@lru_cache(maxsize=256)
def _parse(text: str) -> tuple[Any, ...]:
    """math-verify's expressions in a text; none if it is not understood.

    Raises:
        TimeoutException: If it takes more than `PARSING_SECONDS`.
    """
    try:
        found = parse(text, [EXTRACTION], "no_fallback", "first_match", PARSING_SECONDS, raise_on_error=True)
        return tuple(_adjusted(expression, text) for expression in found)
    except Exception:
        logger.debug("Parsing failed", exc_info=True)
        return ()


@timeout(COMPARING_SECONDS)
def _adjusted(expression: Any, text: str) -> Any:
    """`i` is the imaginary unit, inequalities of one variable are sets, and nothing has millions of digits."""
    expression = bounded(expression)
    if re.search(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", text):
        units = {s: sympy.I for s in getattr(expression, "free_symbols", ()) if s.name == "i"}
        expression = expression.xreplace(units) if units else expression
    try:
        return _evaluated(expression)
    except Exception:
        logger.debug("Evaluating failed", exc_info=True)
        return expression


def _evaluated(expression: Any) -> Any:
    """Sets and exact numbers by their value; math-verify would compare the latter in floating point."""
    parts = expression.args if isinstance(expression, sympy.FiniteSet) and expression.args else (expression,)
    if all(map(_is_inequality, parts)):
        return sympy.Union(*(part.as_set() for part in parts))
    if isinstance(expression, sympy.Complement):
        return expression.doit()
    if isinstance(expression, sympy.Expr) and expression.is_number and not expression.has(sympy.Float):
        value = expression.doit()
        return value if value.is_Rational else expression
    return expression


def _is_inequality(expression: Any) -> bool:
    relations = expression.args if isinstance(expression, sympy.And) else (expression,)
    return (
        all(isinstance(r, sympy.core.relational.Relational) and not isinstance(r, sympy.Eq) for r in relations)
        and len(expression.free_symbols) == 1
    )


def _equal(gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    """math-verify's verdict.

    Raises:
        TimeoutException: If it takes more than `COMPARING_SECONDS`.
    """
    for right, given in itertools.product(gold, answer):
        scale = _scale(right)
        if scale != 1 and isinstance(given, sympy.Expr):
            right, given = right * scale, given * scale
        try:
            if not _differ(right, given) and verify(
                right, given, allow_set_relation_comp=True, timeout_seconds=COMPARING_SECONDS, raise_on_error=True
            ):
                return True
        except Exception:
            logger.debug("Comparing failed", exc_info=True)
    return False


def _differ(gold: Any, answer: Any) -> bool:
    """Whether two expressions have different values at a point, so that no simplification can make them equal.

    It is asked first because simplifying `(x+1)^{1000000}` would not end.
    """
    if not all(isinstance(side, sympy.Expr) and not side.is_Symbol for side in (gold, answer)):
        return False  # names are compared by their letters: `\text{AB}` and `AB`
    try:
        values = _values(gold, answer)
        return bool(abs(values[0] - values[1]) > 1e-3 * max(map(abs, values)))
    except (Exception, TimeoutException):
        return False


@timeout(COMPARING_SECONDS)
def _values(*expressions: Any) -> list[Any]:
    symbols = sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)
    point = {symbol: sympy.Float((10 + 7 * i) / 13) for i, symbol in enumerate(symbols)}
    values = [sympy.N(expression.xreplace(point), 15) for expression in expressions]
    if not all(value.is_number and value.is_finite for value in values):
        raise ArithmeticError("There is no value at this point.")
    return values


@timeout(COMPARING_SECONDS)
def _scale(gold: Any) -> Any:
    """A power of ten that makes a small number at least 1: math-verify compares six decimal places."""
    if not (isinstance(gold, sympy.Expr) and gold.is_number and gold.is_real):
        return sympy.Integer(1)
    size = abs(gold.evalf(3))
    return sympy.Integer(10) ** -math.floor(sympy.log(size, 10).evalf()) if 0 < size < 0.1 else sympy.Integer(1)


def bounded(expression: Any) -> Any:
    """The expression with a symbol for each power and factorial of more than `MAX_DIGITS` digits.

    Equal powers of integers get equal symbols: `4^{2^{99}}` and `2^{2^{100}}`.
    """
    if isinstance(expression, sympy.MatrixBase):
        return expression.applyfunc(bounded)
    if not getattr(expression, "args", ()):
        return expression
    args = [bounded(argument) for argument in expression.args]
    if isinstance(expression, sympy.Pow):
        return _power(*args)
    if isinstance(expression, sympy.factorial) and args[0].is_number and abs(args[0].doit()) > MAX_DIGITS // 4:
        return _symbol(f"{args[0].doit()}!")
    if isinstance(expression, sympy.Sum | sympy.Product) and _is_long(*expression.limits[0][1:]):
        return _symbol(str(expression))
    same = all(new is old for new, old in zip(args, expression.args, strict=True))
    return expression if same else expression.func(*args)


def _power(base: Any, exponent: Any) -> Any:
    power = sympy.Pow(base, exponent, evaluate=False)
    if not (base.is_number and exponent.is_number):
        return power
    base, exponent = base.doit(), exponent.doit()
    if not (isinstance(base, sympy.Rational) and isinstance(exponent, sympy.Integer)):
        return power
    if abs(exponent) * math.log10(max(abs(base.p), base.q)) <= MAX_DIGITS:
        return power
    if base.q != 1 or base < 0:
        return _symbol(f"({base})^{exponent}")
    root, multiple = sympy.perfect_power(base) or (base, 1)
    symbol = _symbol(f"{root}^{abs(exponent) * multiple}")
    return symbol if exponent > 0 else 1 / symbol


def _is_long(first: Any, last: Any) -> bool:
    length = last - first
    return bool(length.is_finite) and not (length.is_number and abs(length) <= MAX_DIGITS)


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, positive=True, integer=True)


def main() -> None:
    """Answer each line `{"golds": ..., "answers": ...}` with `{"equal": ...}` or, out of time, `{"timeout": true}`."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed must not be taken for a reply
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"equal": equal(**json.loads(line))}
        except TimeoutError:
            reply = {"timeout": True}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
