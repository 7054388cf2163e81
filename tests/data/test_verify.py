"""The Countdown checker on written responses, the ones that fool others included."""

import pytest

from longcot.data.verify import last_boxed, verify_countdown

THINK = "<think>\ntry 3 + 3 = 6 with 18\n</think>\n"

RESPONSES = [
    # response, correct, answer, reason
    (THINK + r"\boxed{ 18 + ( 3 * 3 ) }", True, "18 + ( 3 * 3 )", "correct"),
    (THINK + r"\boxed{3*3+18}", True, "3*3+18", "correct"),
    (THINK + r"\boxed {(3*3)+18}", True, "(3*3)+18", "correct"),
    (THINK + r"\boxed{3 \times 3 + 18}", True, r"3 \times 3 + 18", "correct"),
    (
        THINK + r"\boxed{\left(3 \cdot 3\right) + 18}",
        True,
        r"\left(3 \cdot 3\right) + 18",
        "correct",
    ),
    (THINK + r"\boxed{$3*3+18$}", True, "$3*3+18$", "correct"),
    (r"\boxed{3*3+18}", True, "3*3+18", "correct"),
    (THINK + r"first \boxed{1+1}, no: \boxed{3*3+18}", True, "3*3+18", "correct"),
    (THINK + r"\boxed{3*3+18} and then \boxed{", True, "3*3+18", "correct"),
    (THINK + r"\boxed{3*3+18+0}", False, "3*3+18+0", "does not use each number exactly once"),
    (THINK + r"\boxed{3+18}", False, "3+18", "does not use each number exactly once"),
    (THINK + r"\boxed{27}", False, "27", "does not use each number exactly once"),
    (THINK + r"\boxed{3+3+18}", False, "3+3+18", "does not equal the target"),
    (THINK + r"\boxed{18/(3-3)}", False, "18/(3-3)", "divides by zero"),
    (THINK + r"\boxed{3*3+18 = 27}", False, None, "not an expression"),
    (THINK + r"\boxed{3**3+18}", False, None, "not an expression of + - * /"),
    (THINK + r"\boxed{-3*-3+18}", False, None, "not an expression of + - * /"),
    (THINK + r"\boxed{3.0*3+18}", False, None, "not an expression of + - * /"),
    (THINK + r"\boxed{True*3+18}", False, None, "not an expression of + - * /"),
    (THINK + r"\boxed{__import__('os').getcwd()}", False, None, "not an expression of + - * /"),
    (THINK + r"\boxed{}", False, None, "not an expression"),
    (THINK + r"\boxed{" + "(" * 300 + "}", False, None, "not an expression"),
    (THINK + r"\boxed{" + "1+" * 300 + "1}", False, None, "expression too long"),
    (THINK + "18 + 3 * 3", False, None, "no boxed answer"),
    (r"<think>\boxed{3*3+18}", False, None, "thinking never ends"),
    (r"<think>\boxed{3*3+18}</think> done", False, None, "no boxed answer"),
    ("", False, None, "no boxed answer"),
]


@pytest.mark.parametrize(("response", "correct", "answer", "reason"), RESPONSES)
def test_written_responses(response, correct, answer, reason):
    verdict = verify_countdown(response, [3, 3, 18], 27)
    assert (verdict.correct, verdict.answer, verdict.reason) == (correct, answer, reason)


def test_arithmetic_is_exact():
    # In floating point 49 * (1 / 49) is 0.9999999999999999.
    assert verify_countdown(r"\boxed{49 * (1 / 49)}", [49, 1, 49], 1).correct


def test_the_last_whole_box_counts_with_its_braces():
    assert last_boxed(r"\boxed{a} \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_boxed("no box") is None
