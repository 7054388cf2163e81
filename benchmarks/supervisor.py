"""Runs a measuring module in a process of its own, and again without the variant that ended it.

A kernel of somebody else's can crash the process, leave the GPU unusable for it, or hang. The
measuring process notes what it starts; when it dies or stalls, the variant at fault is left out,
with the reason in its row, and a new process goes on with the cases that are not saved yet.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

JOB, PROGRESS = "job.json", "progress.json"


def supervise(module: str, job: dict[str, Any], scratch: Path, *, patience_seconds: float) -> None:
    """Run `python -m module scratch` until it ends well; `job["excluded"]` grows on the way.

    Raises:
        RuntimeError: it ended or stalled while no variant was at work, or a second time by the
            same one.
    """
    while True:
        write_json(scratch / JOB, job)
        note_progress(scratch, "starting", "")
        reason = _run(module, scratch, patience_seconds)
        if reason is None:
            return
        progress = json.loads((scratch / PROGRESS).read_text())
        variant = progress["variant"]
        reason = f"{progress.get('reason') or reason} ({progress['phase']})"
        if not variant or variant in job["excluded"]:
            raise RuntimeError(f"the measuring process stopped: {reason}; its output is above")
        print(f"without {variant} from here on: {reason}", file=sys.stderr, flush=True)
        job["excluded"][variant] = reason


def note_progress(scratch: Path, phase: str, variant: str, reason: str = "") -> None:
    """What the measuring process is at; `variant` is empty where only the harness is at work."""
    now = {"phase": phase, "variant": variant, "reason": reason, "started": time.time()}
    write_json(scratch / PROGRESS, now)


def note_reason(scratch: Path, reason: str) -> None:
    """Why the measuring process is about to end."""
    progress = json.loads((scratch / PROGRESS).read_text())
    note_progress(scratch, progress["phase"], progress["variant"], reason)


def read_job(scratch: Path) -> dict[str, Any]:
    return json.loads((scratch / JOB).read_text())


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a lease may end at any moment."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, allow_nan=False))
    beside.replace(path)


def _run(module: str, scratch: Path, patience_seconds: float) -> str | None:
    """None when the process ended well, otherwise what became of it."""
    process = subprocess.Popen([sys.executable, "-m", module, str(scratch)])
    try:
        while True:
            try:
                code = process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                started = json.loads((scratch / PROGRESS).read_text())["started"]
                if time.time() - started > patience_seconds:
                    return f"no end after {patience_seconds:.0f} s"
                continue
            if code < 0:
                return f"killed by signal {-code}"
            return f"exit code {code}" if code else None
    finally:
        process.kill()
        process.wait()
