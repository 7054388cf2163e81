"""`python -m longcot.eval RUN_OR_MODEL`: sample checkpoints with vLLM, score, and report.

RUN is a run directory: all its complete checkpoints are evaluated, in step order, with one engine,
and report.html, summary.json and the pictures are written into it. MODEL is a Hugging Face
directory: give --problems and --out. What is done is kept: run again to go on, or to add to it.
"""

import argparse
import dataclasses
import fcntl
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..data.sampling import Engine, prepare_process
from .generate import Job, differences, generate, plan_job, read_samples
from .scoring import current_result, score_job
from .suite import TASKS, find_task
from .targets import Target, is_run, model_target, problems_of, read_json, run_targets
from .tasks import Question, Task


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longcot.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("path", nargs="?", type=Path, metavar="RUN_OR_MODEL")
    add("--tasks", default="countdown", metavar="A,B", help="tasks (default: %(default)s)")
    add("--steps", metavar="0,20,...", help="checkpoints of a run (default: all complete ones)")
    add("--limit", type=_positive, metavar="N", help="only the first N problems of each task")
    add("--problems", type=Path, metavar="PATH",
        help="JSONL of problems (default: the held-out ones of the run's data)")  # fmt: skip
    add("--max-tokens", type=_positive, metavar="N",
        help="longest response in tokens (default: as long as the context allows)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder for the results of a MODEL")
    add("--rescore", action="store_true", help="score again what was sampled; samples nothing")
    add("--json", action="store_true", help="print the results as JSON instead of a table")
    add("--list", action="store_true", help="list the tasks and their versions")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def evaluate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Do what the command line says; returns one result per checkpoint and task.

    Raises:
        ValueError: something the user named is missing, malformed or does not fit.
        RuntimeError: vLLM is not installed, does not start or fails.
        OSError: a file cannot be read or written.
    """
    path: Path = arguments.path
    tasks = [_adjusted(find_task(name), arguments) for name in arguments.tasks.split(",")]
    targets, out = _targets(arguments)
    manifest = read_json(path / "manifest.json") or {}
    questions = {task.name: _questions(task, arguments, manifest) for task in tasks}
    with _only_one(out):
        jobs = [
            plan_job(target, task, questions[task.name]) for target in targets for task in tasks
        ]
        results = _run_jobs(jobs, out / "vllm.log", arguments.rescore)
        if is_run(path):
            from .report import write_report  # matplotlib takes a second to import

            every_target, _ = run_targets(path, None)
            for task in tasks:
                everything = [plan_job(target, task, questions[task.name])
                              for target in every_target]  # fmt: skip
                page = write_report(path, everything, manifest)
                print(f"report: {page}", file=sys.stderr)
    return results


def _adjusted(task: Task, arguments: argparse.Namespace) -> Task:
    if arguments.max_tokens is None:
        return task
    sampling = dataclasses.replace(task.sampling, max_tokens=arguments.max_tokens)
    return dataclasses.replace(task, sampling=sampling)


def _targets(arguments: argparse.Namespace) -> tuple[list[Target], Path]:
    """The models to evaluate and the folder that their results go under."""
    path: Path = arguments.path
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give a run directory or a model directory")
    if is_run(path):
        if arguments.out is not None:
            raise ValueError(f"--out is for a model; the results of {path} go into {path}/eval")
        targets, incomplete = run_targets(path, _steps(arguments.steps))
        for name in incomplete:
            print(f"{path}/checkpoints/{name} is incomplete (no complete.json): left out",
                  file=sys.stderr)  # fmt: skip
        return targets, path / "eval"
    if not (path / "config.json").exists():
        raise ValueError(
            f"{path} is neither a run (it has no checkpoints/) nor a model (no config.json)"
        )
    if arguments.out is None or arguments.problems is None:
        raise ValueError(f"{path} is a model directory: give --problems PATH and --out DIR")
    if arguments.steps is not None:
        raise ValueError(f"--steps is for a run; {path} is a model directory")
    return [model_target(path, arguments.out)], arguments.out


def _steps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"--steps {text!r}: expected steps separated by commas, such as 0,20,80")
    return [int(part) for part in text.split(",")]


def _questions(
    task: Task, arguments: argparse.Namespace, manifest: dict[str, Any]
) -> list[Question]:
    problems = arguments.problems or problems_of(arguments.path, manifest)
    if not problems.is_file():
        raise ValueError(f"{problems}: no such file; give the problems with --problems PATH")
    return task.load(problems)[: arguments.limit]


def _run_jobs(jobs: Sequence[Job], log_path: Path, rescore: bool) -> list[dict[str, Any]]:
    """Results of all jobs, in order; one engine, started only if something must be sampled."""
    engine: Engine | None = None
    results = []
    with ExitStack() as stack:

        def engine_for(model: Path) -> Engine:
            nonlocal engine
            if engine is None:
                log_path.parent.mkdir(parents=True, exist_ok=True)
                engine = stack.enter_context(Engine(model, log_path=log_path))
            else:
                engine.load(model)
            return engine

        for job in jobs:
            result = None if rescore else current_result(job)
            if result is not None:
                print(f"{job.label}: is done, kept", file=sys.stderr)
            elif rescore:
                result = score_job(job, _sampled(job))
            else:
                result = score_job(job, generate(job, engine_for))
            results.append(result)
    return results


def _sampled(job: Job) -> list[dict[str, Any]]:
    """The job's samples as they stand on disk."""
    path = job.folder / "samples.jsonl"
    if path.exists() and (reason := differences(job)):
        raise ValueError(f"{path}: these samples were drawn with {reason}: run without --rescore")
    asked = {question.id for question in job.questions}
    rows = [row for row in read_samples(path) if row["id"] in asked]
    if len(rows) != len(asked) * job.task.num_samples:
        raise ValueError(
            f"{path} holds {len(rows)} of the {len(asked) * job.task.num_samples} samples to be "
            "scored: run without --rescore first"
        )
    return rows


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Hold `out` for this process; two evaluations would write into the same samples."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another evaluation is writing to {out}: wait for it") from None
        yield


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as lines of text, one per checkpoint and task."""
    lines = [f"{'step':>8}  {'task':<12}{'problems':>9}{'accuracy':>18}{'tokens':>9}"
             f"{'cut off':>9}{'no answer':>11}"]  # fmt: skip
    for row in results:
        error = row["standard_error"]
        accuracy = f"{row['accuracy']:.1%}" + ("" if error is None else f" +- {1.96 * error:.1%}")
        step = "-" if row["step"] is None else row["step"]
        lines.append(
            f"{step:>8}  {row['task']:<12}{row['num_problems']:>9}{accuracy:>18}"
            f"{row['mean_response_tokens']:>9.1f}{row['truncated']:>9.1%}{row['unparsed']:>11.1%}"
        )
    return "\n".join([*lines, "(accuracy with a 95 % interval)"])


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.list:
        for task in TASKS.values():
            print(f"{task.name}  version {task.version}")
        return
    if arguments.path is None:
        parser.error("give a run directory or a model directory (or --list)")
    prepare_process()
    try:
        results = evaluate(arguments)
    except KeyboardInterrupt:
        print("\nlongcot.eval: interrupted; finished samples are kept, run again to go on",
              file=sys.stderr)  # fmt: skip
        sys.exit(130)
    except OSError as error:
        where = error.filename or arguments.out or arguments.path  # a full disk names no file
        sys.exit(f"longcot.eval: {where}: {error.strerror or error}; what was finished is kept, "
                 "run again when that is mended")  # fmt: skip
    except (ValueError, RuntimeError) as error:
        sys.exit(f"longcot.eval: {error}")
    print(json.dumps(results, indent=2) if arguments.json else table(results))


if __name__ == "__main__":
    main()
