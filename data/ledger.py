"""Every row that was dropped, cut or changed: its id, place, reason and length.

The whole ledger lies as `ledger.jsonl` beside the tokens; the manifest keeps the totals and the
first few ids of each reason, which training and `inspect` print.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Action = Literal["refused", "dropped", "cut", "noted"]
ACTIONS: tuple[Action, ...] = ("refused", "dropped", "cut", "noted")
FIRST_IDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What happened to one row."""

    id: str
    place: str
    action: Action
    """`refused`: it cannot be used. `dropped`: the rules leave it out. `noted`: it is there as it
    was, and somebody should know."""
    reason: str
    """The same words for the same fault."""
    detail: str = ""
    tokens: int | None = None
    """Its length before anything was done to it, where it has one."""


def entry_of(error: str, *, id: str, place: str, action: Action = "refused") -> Entry:
    """The entry of a fault written as `reason: detail`."""
    reason, _, detail = error.partition(": ")
    return Entry(id=id, place=place, action=action, reason=reason, detail=detail)


class Ledger:
    """Writes entries to a file and counts them; holds three ids of each reason, not the entries."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._reasons: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
            summary = self._reasons.setdefault(
                (entry.action, entry.reason),
                {"action": entry.action, "reason": entry.reason, "rows": 0, "first": []},
            )
            summary["rows"] += 1
            if len(summary["first"]) < FIRST_IDS:
                length = {} if entry.tokens is None else {"tokens": entry.tokens}
                summary["first"].append({"id": entry.id, **length})

    def close(self) -> dict[str, Any]:
        """The totals, for the manifest; the file is whole then."""
        self._file.close()
        reasons = sorted(self._reasons.values(), key=lambda s: (s["action"], -s["rows"]))
        rows = {
            action: sum(s["rows"] for s in reasons if s["action"] == action) for action in ACTIONS
        }
        return {**rows, "reasons": reasons}


def summary_lines(totals: dict[str, Any]) -> list[str]:
    """The totals for people: a line of counts, then one for each reason with its first ids."""
    words = {"dropped": "rows dropped", "refused": "refused", "cut": "cut", "noted": "noted"}
    lines = [", ".join(f"{totals[action]:,} {word}" for action, word in words.items())]
    for summary in totals["reasons"]:
        first = [
            entry["id"] + (f" ({entry['tokens']:,} tokens)" if "tokens" in entry else "")
            for entry in summary["first"]
        ]
        more = ", ..." if summary["rows"] > len(first) else ""
        lines.append(
            f"{summary['rows']:,} {summary['action']}: {summary['reason']}: "
            f"{', '.join(first)}{more}"
        )
    return lines
