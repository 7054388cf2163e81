"""One row of training or evaluation data, and the JSONL files that hold such rows.

`data/sources.py` finds rows in other files and `data/columns.py` reads other columns; what both
arrive at is an `Example`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A question as chat turns, a response to it, and what a checker needs to judge another one."""

    id: str
    messages: list[dict[str, str]]
    """Chat turns before the response, each `{"role": ..., "content": ...}`; of a row with several
    turns of the assistant all but the last."""
    response: str
    """What the model is to learn to write, without the end-of-sequence token."""
    answer: Any
    """The key for the checker, any JSON value; Countdown: `{"numbers": [3, 5, 7], "target": 26}`.
    """
    source: str
    """Who wrote the response, for example `countdown/restate`."""
    weight: float = 1.0
    """Multiplies the loss of the row's tokens; the paper's column `advantage`."""


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "messages": list,
    "response": str,
    "source": str,
}
_REQUIRED = tuple(name for name in Example.__slots__ if name != "weight")


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Write one JSON object per line; returns the number of lines."""
    num_rows = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for example in examples:
            row = asdict(example)
            if example.weight == 1.0:
                del row["weight"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def read_examples(path: str | Path) -> Iterator[Example]:
    """Yield the rows of a JSONL file in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not UTF-8, not JSON, lacks a field or has one of the wrong type; it
            names the line.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield _example(parse_line(line))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error


def parse_line(line: bytes) -> dict[str, Any]:
    """A line of JSONL as a dictionary.

    Raises:
        ValueError: not UTF-8, not JSON, or not an object.
    """
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"bytes that are not UTF-8: byte {error.start} of the line; repair or remove the line"
        ) from error
    except (ValueError, RecursionError) as error:
        hint = "a JSON array? write one object per line" if line.lstrip()[:1] == b"[" else ""
        raise ValueError(
            f"not a line of JSON: {error}; {hint or 'repair or remove the line'}"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: found {type(row).__name__}, expected one per line")
    return row


def check_turns(turns: Any, name: str) -> None:
    """Refuse turns that are not a list of objects with a string role and content.

    Raises:
        ValueError: naming the first turn that is wrong.
    """
    if not isinstance(turns, list):
        raise ValueError(f"wrong type: field {name!r} is {type(turns).__name__}, expected list")
    for turn in turns:
        if not (
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
        ):
            raise ValueError(
                f"wrong type: every turn of {name!r} needs a string 'role' and 'content', found "
                f"{repr(turn)[:200]}"
            )


def check_weight(weight: Any, name: str) -> float:
    """A finite weight of at least 0.

    Raises:
        ValueError: anything else.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"wrong type: field {name!r} is {type(weight).__name__}, expected number")
    if not 0 <= weight < float("inf"):
        raise ValueError(f"wrong weight: field {name!r} is {weight}, it must be finite and >= 0")
    return float(weight)


def _example(row: dict[str, Any]) -> Example:
    missing = [name for name in _REQUIRED if name not in row]
    if missing:
        raise ValueError(
            f"no field {', '.join(missing)}; it has {', '.join(sorted(row)) or 'none'}"
        )
    for name, kind in _FIELD_TYPES.items():
        if not isinstance(row[name], kind):
            raise ValueError(f"field {name!r} is {type(row[name]).__name__}, expected {kind}")
    check_turns(row["messages"], "messages")
    weight = check_weight(row.get("weight", 1.0), "weight")
    return Example(**{name: row[name] for name in _REQUIRED}, weight=weight)
