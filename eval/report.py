"""The report of a run: `report.html`, `summary.json`, and pictures for a README.

Everything is read from the run directory, and each file is written whole or not at all.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from .charts import CHARTS, Curves, chart_png, overview_png
from .generate import Job
from .page import render_page
from .scoring import current_result
from .targets import problems_of, read_json

SUMMARY_FIELDS = ("step", "accuracy", "standard_error", "mean_response_tokens", "truncated")


def write_report(run: Path, jobs: Sequence[Job], manifest: dict[str, Any]) -> Path:
    """Write report.html, summary.json and four PNGs into the run directory.

    Args:
        run: the run directory.
        jobs: one task on every checkpoint, in step order; those without a current result are
            left out.
        manifest: the run's manifest.json.

    Returns:
        The page's path.

    Raises:
        ValueError: no checkpoint has a result, or a file of the run is malformed.
        OSError: a file cannot be written.
    """
    done = [(job, result) for job in jobs if (result := current_result(job)) is not None]
    if not done:
        raise ValueError(f"{run}: nothing is evaluated yet, so there is nothing to report")
    results = [result for _, result in done]
    curves = Curves(metrics=read_metrics(run / "metrics.jsonl"), results=results)
    summary = summarize(run, results, manifest)
    page = render_page(run, [job for job, _ in done], curves, summary, manifest)
    for name in CHARTS:
        write_bytes_atomic(run / f"{name}.png", chart_png(name, curves))
    write_bytes_atomic(run / "overview.png", overview_png(curves))
    write_json_atomic(run / "summary.json", summary)
    write_text_atomic(run / "report.html", page)
    return run / "report.html"


def summarize(
    run: Path, results: Sequence[dict[str, Any]], manifest: dict[str, Any]
) -> dict[str, Any]:
    """The content of summary.json; a stage whose time is not known has None for seconds.

    The evaluation's seconds are those of engine starts, sampling and scoring behind these
    results, over all the invocations that they took.
    """
    try:
        data = read_json(problems_of(run, manifest).with_name("manifest.json"))
    except ValueError:  # the data set may be gone by the time of the report
        data = None
    finished = read_json(run / "finished.json")
    spent = sum(sum(result["seconds"].values()) for result in results)
    return {
        "checkpoints": [{name: row[name] for name in SUMMARY_FIELDS} for row in results],
        "seconds": {
            "data": (data or {}).get("seconds"),
            "train": (finished or {}).get("seconds"),
            "eval": round(spent, 3),
        },
        "device": manifest.get("device") or results[-1]["device"],
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, none if there is no file; a last line cut short is left out.

    Raises:
        ValueError: a line has no step or no loss; it is named.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"]), "loss": float(row["loss"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a row of metrics ({error!r})") from error
    return rows
