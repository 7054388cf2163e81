"""A head's loss and both gradients: ours, torch's and the packages' against three matmuls.

The floor is three matmuls of the same shapes, interleaved with everything else in the same process;
useful FLOPs are 6 T V D whatever an implementation executes, and T counts rows without a target
too, so that leaving them out shows as a gain. No variant is timed before its loss and both
gradients are right, on a slice with masked rows and then on the problem itself.

The measuring runs in a process of its own (see supervisor.py), this file started as a module.

T rows (tokens), D hidden size, V vocabulary.
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import head_accuracy, timing
from .head_cases import DEFAULT_ROUNDS, Case, cases, table
from .head_providers import (
    FLOOR,
    OURS,
    PACKAGES,
    Answer,
    Problem,
    Variant,
    all_variants,
    chosen,
    draw,
)
from .supervisor import note_progress, note_reason, read_job, supervise, write_json

SLICE_TOKENS = 250
"""Rows of the first check: few, and no multiple of a tile."""
SLICE_MASKED = 0.25
RESULTS = "results.json"


def measure_case(
    case: Case,
    variants: Sequence[Variant],
    *,
    device: torch.device,
    dtype: torch.dtype,
    masked: float,
    num_rounds: int,
    seconds: float,
    excluded: dict[str, str],
    on_start: Callable[[str, str], None] = lambda phase, name: None,
) -> dict[str, Any]:
    """Check all variants, then time those that are right; a row of figures for each."""
    started = time.monotonic()
    gpu_before = timing.gpu_state() if device.type == "cuda" else None
    rows = {variant.name: _blank_row(variant) for variant in variants}
    for name in excluded.keys() & rows.keys():
        rows[name] |= {"status": "ended the process", "reason": excluded[name]}
    calls = _checked(case, variants, rows, device, dtype, masked, on_start)
    for name, call in calls.items():
        on_start("memory", name)
        if not rows[name]["has_own_buffers"]:
            rows[name]["peak_bytes"], _ = timing.attempt(
                lambda call=call: timing.peak_bytes(call, device), device
            )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the float64 truth left would be in the timing's way
    race = timing.race(
        calls,
        device=device,
        num_rounds=num_rounds,
        num_warmup_rounds=1,  # checked and weighed already: each has run twice
        seconds=seconds - (time.monotonic() - started),
        on_start=lambda name: on_start("timing", name),
    )
    for name, reason in race.reasons.items():
        rows[name] |= {"status": "raised", "reason": reason}
    useful_flops = 6 * case.num_tokens * case.vocab_size * case.hidden_size
    for name, milliseconds in race.milliseconds.items():
        rows[name] |= {"status": "timed", **_figures(milliseconds, race, useful_flops)}
    return {
        **asdict(case),
        "dtype": str(dtype).removeprefix("torch."),
        "masked": masked,
        "useful_flops": useful_flops,
        "num_rounds": len(race.orders),
        "orders": race.orders,
        "num_device_allocations_while_timing": race.num_device_allocations,
        "gpu_before": gpu_before,
        "gpu_after": timing.gpu_state() if device.type == "cuda" else None,
        "seconds": round(time.monotonic() - started, 1),
        "rows": list(rows.values()),
    }


def _blank_row(variant: Variant) -> dict[str, Any]:
    return {
        "variant": variant.name,
        "note": variant.note,
        "is_ours": variant.is_ours,
        "is_exact": variant.is_exact,
        "has_own_buffers": variant.has_own_buffers,
        "status": "checking",
        "reason": "",
        "checks": {},
        "milliseconds": None,
        "useful_tflops": None,
        "fraction_of_three_matmuls": None,
        "peak_bytes": None,
    }


def _checked(
    case: Case,
    variants: Sequence[Variant],
    rows: dict[str, dict[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    masked: float,
    on_start: Callable[[str, str], None],
) -> dict[str, Callable[[], Answer]]:
    """Calls on the case's own problem of the variants that pass every check."""
    slice_tokens = min(SLICE_TOKENS, case.num_tokens)
    checks = [("slice", slice_tokens, dtype, SLICE_MASKED)]
    if dtype == torch.float32:
        # How the head gradient rounds in training's dtype, where that is too slow to time.
        checks.append(("slice_bfloat16", slice_tokens, torch.bfloat16, SLICE_MASKED))
    checks.append(("whole", case.num_tokens, dtype, masked))
    calls: dict[str, Callable[[], Answer]] = {}
    for check, num_tokens, check_dtype, check_masked in checks:
        on_start(f"truth of {check}", "")
        problem = draw(
            num_tokens=num_tokens,
            hidden_size=case.hidden_size,
            vocab_size=case.vocab_size,
            dtype=check_dtype,
            device=device,
            masked=check_masked,
        )
        exact = head_accuracy.truth(problem)
        torchs = head_accuracy.errors(head_accuracy.torch_answer(problem), exact)
        calls.clear()
        for variant in variants:
            row = rows[variant.name]
            if row["status"] != "checking":
                continue
            on_start(check, variant.name)
            outcome, reason = timing.attempt(
                lambda variant=variant, problem=problem, exact=exact: _answered(
                    variant, problem, exact
                ),
                device,
            )
            if outcome is None:
                is_absent = reason.startswith(("ImportError", "ModuleNotFoundError"))
                row |= {"status": "absent" if is_absent else "raised", "reason": reason}
                continue
            calls[variant.name], found = outcome
            is_strict = variant.is_ours and variant.is_exact
            allowed = head_accuracy.limits(torchs, check_dtype, is_ours=is_strict)
            wrong = head_accuracy.complaint(found, allowed)
            row["checks"][check] = {
                "errors": _finite(found), "allowed": allowed, "torch": torchs, "passed": not wrong,
            }  # fmt: skip
            if wrong:
                row |= {"status": "wrong", "reason": f"{check}: {wrong}"}
                del calls[variant.name]
    return calls


def _answered(
    variant: Variant, problem: Problem, exact: head_accuracy.Truth
) -> tuple[Callable[[], Answer], head_accuracy.Errors]:
    call = variant.make(problem)
    return call, head_accuracy.errors(call(), exact)


def _finite(found: head_accuracy.Errors) -> head_accuracy.Errors:
    """JSON has no infinity: None, and the row's reason says so."""
    return {
        name: error if error is None or math.isfinite(error) else None
        for name, error in found.items()
    }


def _figures(milliseconds: list[float], race: timing.Race, useful_flops: int) -> dict[str, Any]:
    floor = race.milliseconds.get(FLOOR)
    fractions = [f / m for f, m in zip(floor, milliseconds, strict=True)] if floor else []
    return {
        "milliseconds": timing.spread(milliseconds),
        "rounds_milliseconds": [round(value, 4) for value in milliseconds],
        "useful_tflops": useful_flops / statistics.median(milliseconds) / 1e9,
        "fraction_of_three_matmuls": statistics.median(fractions) if fractions else None,
    }


def failures(document: dict[str, Any]) -> list[str]:
    """What must not pass for a measurement: ours wrong, or what training calls not timed."""
    found = []
    for case in document["cases"]:
        size = f"T={case['num_tokens']} D={case['hidden_size']} V={case['vocab_size']}"
        if case.get("is_failure"):
            found.append(f"{size}: {case['not_measured']}")
        for row in case.get("rows", []):
            is_lost = row["variant"] == OURS and row["status"] != "timed"
            if is_lost or (row["is_ours"] and row["status"] == "wrong"):
                found.append(f"{row['variant']} at {size}: {row['status']}: {row['reason']}")
    return found


def measure(
    *,
    shapes: Sequence[str] | None,
    tokens: Sequence[int] | None,
    patterns: Sequence[str],
    device_type: str,
    dtype_name: str | None,
    masked: float,
    num_rounds: int | None,
    seconds: float,
    patience_seconds: float,
    out: Path | None,
    commit: str | None,
) -> dict[str, Any]:
    """Measure everything asked for and print a table of each case; the whole as it is saved.

    Raises:
        ValueError: a setting that names nothing or is out of range.
        RuntimeError: the measuring process cannot run.
        OSError: the results cannot be written.
    """
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave it out, or give cpu")
    num_rounds = DEFAULT_ROUNDS[device_type] if num_rounds is None else num_rounds
    for name, value in (("rounds", num_rounds), ("seconds", seconds)):
        if value <= 0:
            raise ValueError(f"--{name} {value}: nothing would be timed; give more than 0")
    if not 0 <= masked < 1:
        raise ValueError(f"--masked {masked}: a fraction of the rows; give 0 or more, less than 1")
    planned = cases(shapes, tokens, device_type)
    chosen(all_variants(), patterns)
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--out {out}: {out.parent} is no folder; make it first")
    with tempfile.TemporaryDirectory(prefix="longcot-head-") as folder:
        scratch = Path(folder)
        job = {
            "cases": [asdict(case) for case in planned],
            "variants": list(patterns),
            "device": {"cuda": "cuda:0", "cpu": "cpu"}[device_type],
            "dtype": dtype_name or {"cuda": "bfloat16", "cpu": "float32"}[device_type],
            "masked": masked,
            "num_rounds": num_rounds,
            "deadline": time.time() + seconds,
            "excluded": {},
            "commit": commit,
            "out": None if out is None else str(out.resolve()),
        }
        supervise(__name__, job, scratch, patience_seconds=patience_seconds)
        return json.loads((scratch / RESULTS).read_text())


def main(scratch: Path) -> None:
    """The measuring process: every case that is not in the results yet, saved one by one."""
    job = read_job(scratch)
    device = torch.device(job["device"])
    variants = chosen(all_variants(), job["variants"])
    todo = [Case(**case) for case in job["cases"]]
    document = _begun(scratch, job, device)
    for index in range(len(document["cases"]), len(todo)):
        case, seconds_left = todo[index], job["deadline"] - time.time()
        settings = {
            "device": device,
            "dtype": getattr(torch, job["dtype"]),
            "masked": job["masked"],
            "num_rounds": job["num_rounds"],
            "seconds": seconds_left / (len(todo) - index),
            "excluded": job["excluded"],
            "on_start": lambda phase, name: note_progress(scratch, phase, name),
        }
        result, reason = None, "the seconds were used up before it"
        if seconds_left > 0:
            result, reason = timing.attempt(
                lambda case=case, settings=settings: measure_case(case, variants, **settings),
                device,
            )
        note_progress(scratch, "saving", "")
        if result is None:
            result = {**asdict(case), "not_measured": reason, "is_failure": seconds_left > 0}
        document["cases"].append(result)
        for path in (scratch / RESULTS, *([Path(job["out"])] if job["out"] else [])):
            write_json(path, document)
        print(table(case, result), flush=True)


def _begun(scratch: Path, job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The results so far, where a process before this one saved some."""
    if (scratch / RESULTS).exists():
        return json.loads((scratch / RESULTS).read_text())
    about = timing.environment(device, PACKAGES)
    about["commit"] = job["commit"] or about["commit"]
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"benchmark": "linear_cross_entropy", **about, "started": started, "cases": []}


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except SystemExit as end:
        note_reason(Path(sys.argv[1]), str(end.code))
        sys.stdout.flush()
        os._exit(1)  # the ordinary way out waits for a GPU that does not answer any more
