"""The only judge of an answer: data building keeps a response by it, evaluation scores a sample by
it.

Countdown's rule (TinyZero's): the expression uses each given number exactly once, no other number,
only + - * / and parentheses, and equals the target. Arithmetic is exact (fractions), and nothing is
ever passed to `eval`.
"""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPRESSION_CHARACTERS = 400
"""Longer than any answer can be; bounds the parser's work on a runaway sample."""

_LATEX = {
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "\\left": "",
    "\\right": "",
    "\\,": "",
    "$": "",
    "\u00d7": "*",
    "\u00f7": "/",
    "\u2212": "-",
}
_OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`answer` is None where nothing could be parsed; `reason` says in a few words why the verdict
    is what it is.
    """

    correct: bool
    answer: str | None
    reason: str


def last_boxed(text: str) -> str | None:
    """What the last whole `\\boxed{...}` holds, braces balanced; None where there is none."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def verify_countdown(response: str, numbers: Sequence[int], target: int) -> Verdict:
    """Judge a whole response to a Countdown problem.

    Only what follows the last `</think>` counts: a box inside the thinking is not an answer, and a
    response whose thinking never ends has none.
    """
    _, closed, answer = response.rpartition("</think>")
    if not closed and "<think>" in answer:
        return Verdict(correct=False, answer=None, reason="thinking never ends")
    expression = last_boxed(answer)
    if expression is None:
        return Verdict(correct=False, answer=None, reason="no boxed answer")
    try:
        value, used = _evaluate(expression)
    except ValueError as error:
        return Verdict(correct=False, answer=None, reason=str(error))
    except ZeroDivisionError:
        return Verdict(correct=False, answer=expression, reason="divides by zero")
    if Counter(used) != Counter(numbers):
        return Verdict(
            correct=False, answer=expression, reason="does not use each number exactly once"
        )
    if value != target:
        return Verdict(correct=False, answer=expression, reason="does not equal the target")
    return Verdict(correct=True, answer=expression, reason="correct")


def _evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The exact value of `expression` and the numbers in it, in order."""
    for latex, plain in _LATEX.items():
        expression = expression.replace(latex, plain)
    if len(expression) > MAX_EXPRESSION_CHARACTERS:
        raise ValueError("expression too long")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError("not an expression") from error
    used: list[int] = []

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError("not an expression of + - * /")

    return walk(tree), used
