"""The command from end to end on the real vLLM engine: one start for all of this file.

The run that it meets was killed before: step 0 has three of its four samples, one of them cut off
in the middle of its line.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from longcot.data.chat import encode_prompt, load_tokenizer
from longcot.data.sampling import Engine, sample_seed
from longcot.eval.countdown import COUNTDOWN
from longcot.eval.generate import generate, plan_job, read_samples
from longcot.eval.targets import run_targets

HOSTILE = '<think>\n<b>try</b> & "x"\u202e\x00\n</think>\n</pre></details><script>alert(1)</script>'


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longcot.eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def samples_of(run: Path, step: int) -> Path:
    return run / "eval" / f"step-{step:06d}" / "countdown" / "samples.jsonl"


def interrupt(run: Path) -> bytes:
    """Leave step 0 as a kill would have: two whole lines and part of a third."""
    target = run_targets(run, [0])[0][0]
    questions = COUNTDOWN.load(run.parent / "countdown" / "heldout.jsonl")
    job = plan_job(target, COUNTDOWN, questions)
    tokenizer = load_tokenizer(str(target.model))
    lines = []
    for question, response in zip(questions, (HOSTILE, "\\boxed{(2 * 4) + 9}", ""), strict=False):
        tokens = encode_prompt(tokenizer, question.messages)
        row = {
            "id": question.id,
            "sample": 0,
            "prompt": tokenizer.decode(tokens),
            "prompt_tokens": len(tokens),
            "response": response,
            "response_tokens": 9,
            "finish_reason": "stop",
            "seed": sample_seed("countdown", question.id, 0),
        }
        lines.append(json.dumps(row))
    path = samples_of(run, 0)
    path.parent.mkdir(parents=True)
    whole = "".join(f"{line}\n" for line in lines[:2]).encode()
    path.write_bytes(whole + lines[2].encode()[:-20])
    origin = {"settings": job.settings, "device": "cpu", "versions": {}, "seconds": {"engine": 3}}
    path.with_name("origin.json").write_text(json.dumps(origin))
    return whole


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable[[Path], Path]
) -> dict[str, Any]:
    run = make_run(tmp_path_factory.mktemp("evaluated") / "demo")
    kept = interrupt(run)
    done = evaluate(run, "--json")
    assert done.returncode == 0, done.stderr
    return {"run": run, "kept": kept, "done": done}


@pytest.fixture
def finished(evaluated: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the evaluated run that a test may change."""
    shutil.copytree(evaluated["run"].parent, tmp_path / "copy")
    run = tmp_path / "copy" / "demo"
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["data"]["path"] = str(run.parent / "countdown")
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_resumed_samples_are_kept_and_none_is_doubled(evaluated: dict[str, Any]) -> None:
    path = samples_of(evaluated["run"], 0)
    assert path.read_bytes().startswith(evaluated["kept"]), "finished samples must stay as they are"
    for step in (0, 10):
        rows = read_samples(samples_of(evaluated["run"], step))
        assert sorted(row["id"] for row in rows) == ["p0", "p1", "p2", "p3"]
    assert "2 samples are there already" in evaluated["done"].stderr
    origin = json.loads(path.with_name("origin.json").read_text())
    assert origin["seconds"]["engine"] > 3, "time of the interrupted invocation counts too"


def test_stdout_is_json_and_the_terminal_is_not_flooded(evaluated: dict[str, Any]) -> None:
    results = json.loads(evaluated["done"].stdout)
    assert [result["step"] for result in results] == [0, 10]
    first = results[0]
    assert first["num_problems"] == first["num_samples"] == 4
    assert first["accuracy"] == 0.25  # the one right answer that the interrupted part holds
    assert first["standard_error"] == pytest.approx(0.25)
    assert sum(first["reasons"].values()) == 4
    assert "step-000020 is incomplete" in evaluated["done"].stderr
    assert len(evaluated["done"].stderr.splitlines()) < 15, evaluated["done"].stderr


def test_summary_has_exactly_its_fields(evaluated: dict[str, Any]) -> None:
    summary = json.loads((evaluated["run"] / "summary.json").read_text())
    assert set(summary) == {"checkpoints", "seconds", "device"}
    fields = {"step", "accuracy", "standard_error", "mean_response_tokens", "truncated"}
    assert [set(row) for row in summary["checkpoints"]] == [fields, fields]
    assert summary["seconds"]["data"] == 1.5
    assert summary["seconds"]["train"] == 2.5
    assert summary["seconds"]["eval"] > 3


class Page(HTMLParser):
    """Collects what a browser would load, and the tags that it would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.addresses += [value or "" for name, value in attrs if name in names]


def test_report_is_self_contained_and_escapes(evaluated: dict[str, Any]) -> None:
    text = (evaluated["run"] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "img", "object", "demo", "b>try"})
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;demo&gt;" in text
    assert "\x00" not in text and "\u202e" not in text
    identifiers = re.findall(r'\bid="([^"]*)"', text)
    assert {f"step-{step}-{i}" for step in (0, 10) for i in (1, 2, 3, 4)} <= set(identifiers)
    for address in page.addresses:
        assert address[1:] in identifiers, f"{address} leads nowhere"


@pytest.mark.parametrize("name", ["loss", "accuracy", "length", "overview"])
def test_pictures_are_written(evaluated: dict[str, Any], name: str) -> None:
    from matplotlib.image import imread

    picture = imread(evaluated["run"] / f"{name}.png")
    assert picture.std() > 0.01, "blank"
    assert not list(evaluated["run"].glob(".*"))


def test_second_invocation_samples_nothing(finished: Path) -> None:
    before = samples_of(finished, 10).read_bytes()
    done = evaluate(finished)
    assert done.returncode == 0, done.stderr
    assert "starting vLLM" not in done.stderr
    assert samples_of(finished, 10).read_bytes() == before
    assert re.search(r"^\s+0  countdown\s+4\s+25\.0% \+- 49\.0%", done.stdout, re.MULTILINE)


def test_fewer_problems_use_the_same_samples(finished: Path) -> None:
    done = evaluate(finished, "--limit", 2, "--steps", 0, "--json")
    assert done.returncode == 0, done.stderr
    assert "starting vLLM" not in done.stderr
    assert json.loads(done.stdout)[0]["accuracy"] == 0.5
    assert len(read_samples(samples_of(finished, 0))) == 4
    steps = [
        row["step"] for row in json.loads((finished / "summary.json").read_text())["checkpoints"]
    ]
    assert steps == [0], "a result over other problems is not comparable"


def test_rescoring_follows_the_samples(finished: Path) -> None:
    path = samples_of(finished, 0)
    path.write_text(path.read_text().replace("(2 * 4) + 9", "(2 * 4) - 9"))
    done = evaluate(finished, "--rescore", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)[0]
    assert result["accuracy"] == 0.0
    assert result["reasons"]["does not equal the target"] == 1


def test_samples_of_other_weights_are_set_aside(finished: Path) -> None:
    weights = "model/model.safetensors"
    checkpoints = finished / "checkpoints"
    shutil.copy(checkpoints / "step-000010" / weights, checkpoints / "step-000000" / weights)
    path = samples_of(finished, 0)
    old = path.read_bytes()

    done = evaluate(finished, "--rescore")
    assert done.returncode == 1
    assert "were drawn with other weights" in done.stderr
    assert path.read_bytes() == old

    def no_engine(model: Path) -> Engine:
        raise LookupError(f"{model} must be sampled")

    target = run_targets(finished, [0])[0][0]
    job = plan_job(target, COUNTDOWN, COUNTDOWN.load(finished.parent / "countdown/heldout.jsonl"))
    with pytest.raises(LookupError, match="step-000000"):
        generate(job, no_engine)
    assert path.with_name("samples.stale.jsonl").read_bytes() == old
    assert not path.exists()
    assert not path.with_name("result.json").exists()
