"""What is measured of the head, and how a measured case reads: shapes, token counts, the table.

T rows (tokens), D hidden size, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_TOKENS = {"cuda": 16384, "cpu": 256}
DEFAULT_ROUNDS = {"cuda": 12, "cpu": 5}
REDUCED = "reduced"
"""Name of the shape for machines without a GPU: D = 64, V = 4,096."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One shape at one number of tokens."""

    names: list[str]  # the bases with this head
    hidden_size: int
    vocab_size: int
    num_tokens: int

    @property
    def title(self) -> str:
        return (
            f"{', '.join(self.names)}: T={self.num_tokens} D={self.hidden_size} V={self.vocab_size}"
        )


def cases(
    shapes: Sequence[str] | None, tokens: Sequence[int] | None, device_type: str
) -> list[Case]:
    """Shapes by the names of bases, `DxV` or `reduced`; equal ones once, in the order given.

    Raises:
        ValueError: an unknown shape, or a size below one.
    """
    bases = json.loads((Path(__file__).parents[1] / "trainer" / "bases.json").read_text())
    known = {name: (raw["hidden_size"], raw["vocab_size"]) for name, raw in bases.items()}
    default = list(known) if device_type == "cuda" else [REDUCED]
    known[REDUCED] = (64, 4096)
    sizes: dict[tuple[int, int], list[str]] = {}
    for shape in shapes or default:
        named = [name for name in known if name.lower() == shape.lower()]
        numbers = shape.lower().split("x")
        if named:
            size = known[named[0]]
        elif len(numbers) == 2 and all(part.isdecimal() and int(part) for part in numbers):
            size = (int(numbers[0]), int(numbers[1]))
        else:
            raise ValueError(
                f"--shapes {shape}: a shape is DxV, as in 4096x128256, or one of {', '.join(known)}"
            )
        names = sizes.setdefault(size, [])
        names += [name for name in (named or [shape.lower()]) if name not in names]
    counts = tokens or [DEFAULT_TOKENS[device_type]]
    for count in counts:
        if count < 1:
            raise ValueError(f"--tokens {count}: a batch has at least one token; give 1 or more")
    return [
        Case(names=names, hidden_size=hidden_size, vocab_size=vocab_size, num_tokens=count)
        for count in counts
        for (hidden_size, vocab_size), names in sizes.items()
    ]


def table(case: Case, result: dict[str, Any]) -> str:
    """One case for people."""
    if "not_measured" in result:
        return f"\n{case.title}\nnot measured: {result['not_measured']}"
    has_bf16 = result["dtype"] == "float32"
    header = ["variant", "ms (p20-p80)", "TFLOP/s", "of 3 matmuls", "peak MB", "loss err",
              "head-grad err", *(["in bf16"] if has_bf16 else []), "note"]  # fmt: skip
    lines = [header]
    for row in result["rows"]:
        time_ms = row["milliseconds"]
        whole = row["checks"].get("whole", row["checks"].get("slice", {})).get("errors", {})
        bf16 = row["checks"].get("slice_bfloat16", {}).get("errors", {})
        status = "" if row["status"] == "timed" else f"{row['status']}: {row['reason']}"
        lines.append([
            row["variant"],
            f"{time_ms['median']:.2f} ({time_ms['p20']:.2f}-{time_ms['p80']:.2f})"
            if time_ms else "-",
            _number(row["useful_tflops"], ".4g"),
            _number(row["fraction_of_three_matmuls"], ".3f"),
            _number(row["peak_bytes"], ".1f", 1e-6),
            _number(whole.get("loss"), ".1e"),
            _number(whole.get("grad_weight"), ".1e"),
            *([_number(bf16.get("grad_weight"), ".1e")] if has_bf16 else []),
            status or row["note"],
        ])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    texts = [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:], strict=True)]
            + [line[-1]]
        ).rstrip()
        for line in lines
    ]
    rounds = f"{result['dtype']}, {result['num_rounds']} rounds, {result['seconds']} s"
    return "\n".join([f"\n{case.title}, {rounds}", *texts])


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale, form)
