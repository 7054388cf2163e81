"""Scoring: a pure pass from samples to `result.json`; it can be run again at any time."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..data.files import write_json_atomic
from .generate import Job
from .stats import clustered_standard_error, mean, quantile
from .targets import read_json
from .tasks import Question, Score

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def problems_checksum(questions: Sequence[Question]) -> str:
    """A checksum of questions and answers, in order."""
    rows = json.dumps([asdict(question) for question in questions], sort_keys=True)
    return hashlib.sha256(rows.encode()).hexdigest()


def current_result(job: Job) -> dict[str, Any] | None:
    """The result on disk if it is for exactly these settings, weights and problems, else None."""
    try:
        result = read_json(job.folder / "result.json")
    except ValueError:
        return None
    wanted = {"settings": job.settings, "problems_sha256": problems_checksum(job.questions)}
    is_current = isinstance(result, dict) and all(
        result.get(name) == value for name, value in wanted.items()
    )
    return result if is_current else None


def score_job(job: Job, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Judge the samples and write `result.json` beside them; returns what it holds.

    Raises:
        OSError: the file cannot be written.
    """
    started = time.perf_counter()
    questions = {question.id: question for question in job.questions}
    scores = [job.task.score(row["response"], questions[row["id"]]) for row in rows]
    origin = read_json(job.folder / "origin.json") or {}
    result = {
        "task": job.task.name,
        "version": job.task.version,
        "step": job.target.step,
        "num_problems": len(questions),
        "num_samples": len(rows),
        **_statistics(rows, scores),
        "sampling": {**job.settings["sampling"], "num_samples": job.task.num_samples},
        "model": str(job.target.model),
        "settings": job.settings,
        "problems_sha256": problems_checksum(job.questions),
        "versions": origin.get("versions", {}),
        "device": origin.get("device"),
        "seconds": {**origin.get("seconds", {}), "scoring": 0.0},
    }
    result["seconds"]["scoring"] = round(time.perf_counter() - started, 3)
    write_json_atomic(job.folder / "result.json", result)
    return result


def _statistics(rows: Sequence[dict[str, Any]], scores: Sequence[Score]) -> dict[str, Any]:
    """What the scores and lengths come to; an undefined number is None."""
    by_question: dict[str, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        by_question.setdefault(row["id"], []).append(float(score.correct))
    lengths = [row["response_tokens"] for row in rows]
    statistics = {
        "accuracy": mean([float(score.correct) for score in scores]),
        "standard_error": clustered_standard_error(by_question),
        "mean_response_tokens": mean(lengths),
        "truncated": mean([float(row["finish_reason"] == "length") for row in rows]),
        "unparsed": mean([float(not score.parsed) for score in scores]),
    }
    return {
        **{k: None if math.isnan(value) else value for k, value in statistics.items()},
        "response_tokens_quantiles": {str(q): quantile(lengths, q) for q in QUANTILES},
        "reasons": dict(Counter(score.reason for score in scores).most_common()),
    }
