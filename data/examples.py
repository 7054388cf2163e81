"""One row of training or evaluation data, and the JSONL files that hold such rows."""

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
    """Chat turns before the response, each `{"role": ..., "content": ...}`."""
    response: str
    """What the model is to learn to write, without the end-of-sequence token."""
    answer: Any
    """The key for the checker, any JSON value; Countdown: `{"numbers": [3, 5, 7], "target": 26}`.
    """
    source: str
    """Who wrote the response, for example `countdown/restate`."""


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "messages": list,
    "response": str,
    "source": str,
}


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Write one JSON object per line; returns the number of lines."""
    num_rows = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")
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
                yield _parse(line, f"{path}, line {number}")


def _parse(line: bytes, where: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(
            f"{where}: not a line of JSON ({error}); repair or remove the line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    missing = [name for name in Example.__slots__ if name not in row]
    if missing:
        raise ValueError(
            f"{where}: no field {', '.join(missing)}; it has {', '.join(sorted(row)) or 'none'}"
        )
    for name, kind in _FIELD_TYPES.items():
        if not isinstance(row[name], kind):
            raise ValueError(
                f"{where}: field {name!r} is {type(row[name]).__name__}, expected {kind}"
            )
    for turn in row["messages"]:
        if not (
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
        ):
            raise ValueError(
                f"{where}: every turn of 'messages' needs a string 'role' and 'content', found "
                f"{turn!r}"
            )
    return Example(**{name: row[name] for name in Example.__slots__})
