"""What answers to some of reasoning-gym's tasks must pass before its graders see them; see `AUDITED` there."""

import ast
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln")
) | {"sqrt", "Abs"}
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)
MAX_EXPONENT = 64


def _is_reference(answer: str, entry: dict[str, Any]) -> bool:
    return answer == entry["answer"].strip()


def _is_reference_in_any_case(answer: str, entry: dict[str, Any]) -> bool:
    return answer.lower() == entry["answer"].strip().lower()


def _is_listed(answer: str, entry: dict[str, Any]) -> bool:
    return answer in entry["metadata"]["valid_answers"]


def _is_number_without_nan(answer: str, entry: dict[str, Any]) -> bool:
    return "nan" not in answer.lower()


def _has_the_sign(answer: str, entry: dict[str, Any]) -> bool:
    return ("-" in answer) == ("-" in entry["answer"])


def _is_close_to_reference(answer: str, entry: dict[str, Any]) -> bool:
    """Equal to three digits: the grader's tolerance is absolute, and takes 0 for small probabilities."""
    value, reference = Fraction(answer), Fraction(entry["answer"])
    return abs(value - reference) <= abs(reference) / 1000


def is_expression(answer: str, entry: dict[str, Any]) -> bool:
    """An arithmetic expression: numbers, one-letter names, operators, and functions of a list."""
    return _is_safe(ast.parse(answer, mode="eval").body)


def _uses_given_numbers(answer: str, entry: dict[str, Any]) -> bool:
    """The grader counts the numbers of an answer, but does not compare them with those given."""
    used = sorted(int(number) for number in re.findall(r"\d+", answer))
    return is_expression(answer, entry) and used == sorted(entry["metadata"]["numbers"])


def _is_safe(node: ast.expr, in_power: bool = False) -> bool:
    match node:
        case ast.Constant(value=value):
            return type(value) in (int, float)
        case ast.Name(id=name):
            return len(name) == 1 or name == "pi"
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _is_safe(operand, in_power)
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            return not in_power and _is_safe(base, True) and _is_safe_exponent(exponent)
        case ast.BinOp(left=left, op=operator, right=right):
            return isinstance(operator, OPERATORS) and _is_safe(left, in_power) and _is_safe(right, in_power)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            return name in FUNCTIONS and _is_safe(argument, in_power)
    return False


def _is_safe_exponent(node: ast.expr) -> bool:
    """At most `MAX_EXPONENT`, or an expression without powers of its own, as in `E**(2*x)`."""
    numbers = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    small = all(isinstance(number, int | float) and abs(number) <= MAX_EXPONENT for number in numbers)
    products = any(isinstance(part, ast.Mult) for part in ast.walk(node))
    return small and _is_safe(node, True) and not (products and len(numbers) > 1)


CHECKS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    # A full score for wrong answers: "0" for any probability; "nan" for any complex number; any text at all for
    # "True"; -5 for 5; the right text with something behind it; four other numbers that make 24.
    "coin_flip": _is_close_to_reference,
    "complex_arithmetic": _is_number_without_nan,
    "game_of_life_halting": _is_reference,
    "gsm_symbolic": _has_the_sign,
    "letter_jumble": _is_reference_in_any_case,
    "spell_backward": _is_reference_in_any_case,
    "puzzle24": _uses_given_numbers,
    # Answers run as Python code: by `eval`, to give part of the score to another notation, ...
    "binary_matrix": _is_reference,
    "n_queens": _is_listed,
    "spiral_matrix": _is_reference,
    "string_insertion": _is_reference,
    # ... or by SymPy's parser
    "countdown": is_expression,
    "intermediate_integration": is_expression,
    "polynomial_multiplication": is_expression,
    "simple_integration": is_expression,
}
"""What an answer must pass before the grader of its task, the key, sees it. A check may raise, which means no."""
