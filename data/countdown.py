"""Countdown: make a target from three or four numbers, and a search teacher that writes its
reasoning out.

Each number is used exactly once, with + - * /; every intermediate value is a whole number from 0 to
`max_value`. A problem is unique by (sorted numbers, target). The teacher tries pairs and operations
depth first, in the order the problem states its numbers, says what it tries, backs out of dead
ends, and checks the expression it boxes:

    <think>
    try 3 + 3 = 6 with 18: 18 + 6 = 24 vs 27, 18 - 6 = 12 vs 27, 18 / 6 = 3 vs 27
    try 3 * 3 = 9 with 18: 18 + 9 = 27 vs 27 yes
    check 18 + ( 3 * 3 ) = 27
    </think>
    \\boxed{ 18 + ( 3 * 3 ) }

Every number stands behind a space, so that it is one token, and the same one, wherever it stands.

Two teachers, the same search: `restate` writes the target beside every value it compares with it,
so the comparison is between neighbours; `terse` leaves the target where the prompt put it. How well
a small model learns from one and from the other is the point of the demo.
"""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .examples import Example
from .verify import verify_countdown

Teacher = Literal["restate", "terse"]
OPERATIONS = "+-*/"


@dataclass(frozen=True, slots=True)
class Term:
    """A value and the expression that made it, in parentheses unless it is one of the given
    numbers.
    """

    value: int
    text: str


def apply(a: int, operation: str, b: int, max_value: int) -> int | None:
    """`a operation b` where that is a whole number from 0 to `max_value`, else None."""
    if operation == "+":
        value = a + b
    elif operation == "-":
        value = a - b
    elif operation == "*":
        value = a * b
    elif b == 0 or a % b:
        return None
    else:
        value = a // b
    return value if 0 <= value <= max_value else None


def reachable_targets(numbers: Sequence[int], max_value: int) -> frozenset[int]:
    """Every value that can be made from all of `numbers`; their order does not matter."""
    return _reachable(tuple(sorted(numbers)), max_value)


@functools.cache
def _reachable(numbers: tuple[int, ...], max_value: int) -> frozenset[int]:
    # Cached: four numbers leave three of the same few thousand kinds again and again.
    if len(numbers) == 1:
        return frozenset(numbers)
    moves = _moves([Term(n, "") for n in numbers], max_value)
    return frozenset().union(
        *(
            reachable_targets([value, *(t.value for t in rest)], max_value)
            for *_, value, rest in moves
        )
    )


def teach(numbers: Sequence[int], target: int, teacher: Teacher, max_value: int) -> str | None:
    """The teacher's whole response, or None where the search finds nothing."""
    lines: list[str] = []
    expression = _search([Term(n, str(n)) for n in numbers], target, teacher, max_value, lines)
    if expression is None:
        return None
    boxed = expression[2:-2]  # the outermost pair of parentheses says nothing
    lines.append(f"check {boxed} = {target}")
    return "<think>\n" + "\n".join(lines) + f"\n</think>\n\\boxed{{ {boxed} }}"


def num_steps(response: str) -> int:
    """How many values the teacher computed before its check: the length of its search."""
    return response.count(" = ") - 1


def _search(
    terms: list[Term], target: int, teacher: Teacher, max_value: int, lines: list[str]
) -> str | None:
    """Depth-first over pairs and operations; appends what it says to `lines`, returns the
    expression found.
    """
    last_level = len(terms) == 2
    tries: list[str] = []
    found = None
    for high, operation, low, value, rest in _moves(terms, max_value):
        made = Term(value, f"( {high.text} {operation} {low.text} )")
        said = f"{high.value} {operation} {low.value} = {value}"
        if last_level:
            found = made.text if value == target else None
            compared = f" vs {target}" if teacher == "restate" else ""
            tries.append(said + compared + (" yes" if found else ""))
        else:
            lines.append(f"try {said} with {' '.join(str(term.value) for term in rest)}")
            found = _search([made, *rest], target, teacher, max_value, lines)
        if found is not None:
            break
    if tries:
        lines[-1] += ": " + ", ".join(tries)
    return found


def _moves(terms: list[Term], max_value: int) -> Iterator[tuple[Term, str, Term, int, list[Term]]]:
    """(larger, operation, smaller, value, the other terms) for every pair and operation, in the
    stated order.
    """
    for i, j in itertools.combinations(range(len(terms)), 2):
        high, low = sorted((terms[i], terms[j]), key=lambda term: -term.value)
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for operation in OPERATIONS:
            value = apply(high.value, operation, low.value, max_value)
            if value is not None:
                yield high, operation, low, value, rest


def prompt(numbers: Sequence[int], target: int) -> str:
    """The user's turn."""
    return f"Numbers: {' '.join(map(str, numbers))}\nTarget: {target}"


def problems(
    num_numbers: int, max_number: int, max_value: int, rng: random.Random
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Endless draws of (numbers in stated order, reachable target); multisets and targets are drawn
    evenly.
    """
    while True:
        numbers = tuple(rng.randint(1, max_number) for _ in range(num_numbers))
        targets = sorted(
            t for t in reachable_targets(numbers, max_value) if t >= 1 and t not in numbers
        )
        if targets:
            yield numbers, rng.choice(targets)


def build_examples(
    *,
    num_train: int,
    num_heldout: int,
    shares: dict[int, float],
    teacher: Teacher,
    max_number: int,
    max_value: int,
    max_steps: int,
    seed: int,
) -> tuple[list[Example], list[Example], dict[str, int]]:
    """Distinct verified problems, drawn from `seed` alone: (train, held-out, rows left out by
    reason).

    Args:
        shares: how many numbers -> share of the problems, for example `{3: 0.9, 4: 0.1}`.
        max_steps: problems whose search is longer are left out of both sets, and counted.

    Raises:
        ValueError: fewer distinct problems exist than asked for, or a share or bound makes no
            sense.
    """
    if min(num_train, num_heldout) < 1:
        raise ValueError(f"num_train {num_train} and num_heldout {num_heldout} must be at least 1")
    if not shares or min(shares) < 3 or max(shares) > 4 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares {shares} must give 3 or 4 numbers a share each and sum to 1")
    rng = random.Random(seed)
    wanted = num_train + num_heldout
    quota = {n: round(wanted * share) for n, share in shares.items()}
    quota[min(shares)] += wanted - sum(quota.values())
    left_out = {"repeated": 0, "search too long": 0}
    rows: list[Example] = []
    seen: set[tuple[tuple[int, ...], int]] = set()
    for num_numbers, count in sorted(quota.items()):
        draws = problems(num_numbers, max_number, max_value, rng)
        fruitless = 0
        while count:
            numbers, target = next(draws)
            key = (tuple(sorted(numbers)), target)
            fruitless += 1
            if fruitless > 20_000:
                raise ValueError(
                    f"only {len(rows)} of {wanted} distinct problems found (stuck at "
                    f"{num_numbers} numbers up to "
                    f"{max_number}): ask for fewer, or raise --max-number, --max-value or "
                    "--max-steps"
                )
            if key in seen:
                left_out["repeated"] += 1
                continue
            seen.add(key)
            response = teach(numbers, target, teacher, max_value)
            assert response is not None, "a reachable target is always found"
            if num_steps(response) > max_steps:
                left_out["search too long"] += 1
                continue
            verdict = verify_countdown(response, numbers, target)
            assert verdict.correct, f"the teacher is wrong: {verdict.reason}: {response}"
            rows.append(
                Example(
                    id=f"countdown-{'-'.join(map(str, numbers))}-{target}",
                    messages=[{"role": "user", "content": prompt(numbers, target)}],
                    response=response,
                    answer={"numbers": list(numbers), "target": target},
                    source=f"countdown/{teacher}",
                )
            )
            count -= 1
            fruitless = 0
    rng.shuffle(rows)
    return rows[num_heldout:], rows[:num_heldout], left_out
