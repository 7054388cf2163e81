"""Whatever is wrong with what the user names: one sentence, an exit code, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longcot.eval.generate import read_samples


def fail(*arguments: object, code: int = 1) -> str:
    """The last line that the command prints on failing as it should."""
    command = [sys.executable, "-m", "longcot.eval", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "starting vLLM" not in done.stderr, "should be seen before an engine starts"
    return done.stderr.strip().splitlines()[-1]


def test_paths(run: Path, tmp_path: Path) -> None:
    assert "no such directory" in fail(tmp_path / "nowhere")
    assert "neither a run" in fail(run.parent)
    model = run / "checkpoints" / "step-000000" / "model"
    assert "give --problems PATH and --out DIR" in fail(model)
    assert "--problems" in fail(run, "--problems", tmp_path / "none.jsonl")
    assert "--out is for a model" in fail(run, "--out", tmp_path)
    assert "give a run directory" in fail(code=2)


def test_names(run: Path) -> None:
    assert "no task is called 'gpqa'; there are: countdown" in fail(run, "--tasks", "gpqa")
    assert "no checkpoint of step 7; complete are: 0, 10" in fail(run, "--steps", "0,7")
    assert "step-000020 is incomplete" in fail(run, "--steps", 20)
    assert "expected steps separated by commas" in fail(run, "--steps", "0;20")
    assert "not a whole number above 0" in fail(run, "--limit", 0, code=2)


def test_no_complete_checkpoint(run: Path) -> None:
    for marker in run.glob("checkpoints/*/complete.json"):
        marker.unlink()
    assert "no complete checkpoint yet (incomplete: step-000000" in fail(run)


def test_limits_that_do_not_fit(run: Path) -> None:
    assert "exceed the model's context of 96 by" in fail(run, "--max-tokens", 96)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x"', "line 2: not a line of JSON"),
        ('{"id": "x"}', "line 2: no field messages"),
        ("", "id 'p0' comes twice"),
    ],
)
def test_malformed_problems(run: Path, line: str, message: str) -> None:
    path = run.parent / "countdown" / "heldout.jsonl"
    first = path.read_text().splitlines()[0]
    path.write_text(f"{first}\n{line}\n{first}\n")
    assert message in fail(run)


def test_answer_of_another_benchmark(run: Path) -> None:
    path = run.parent / "countdown" / "heldout.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({**row, "answer": "26"}) + "\n")
    assert "id 'p0': the answer must be like" in fail(run)


def test_data_that_is_gone(run: Path) -> None:
    (run.parent / "countdown" / "manifest.json").unlink()
    assert "missing or incomplete" in fail(run)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_corrupt_checkpoint(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-000010" / "model" / name
    path.write_bytes(path.read_bytes()[:-50])
    assert "step-000010" in fail(run, "--steps", 10)


def test_missing_chat_template(run: Path) -> None:
    (run / "checkpoints/step-000010/model/chat_template.jinja").unlink()
    assert "no chat template" in fail(run, "--steps", 10)


def test_result_that_is_a_file(run: Path) -> None:
    (run / "eval").write_text("in the way")
    assert f"{run}/eval: File exists" in fail(run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_read_only_run(run: Path) -> None:
    run.chmod(0o555)
    try:
        assert "Permission denied" in fail(run)
    finally:
        run.chmod(0o755)


def test_torn_last_line_is_no_sample_and_a_bad_one_before_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert read_samples(path) == []
    row = {"id": "a", "sample": 0, "prompt": "", "prompt_tokens": 1, "response": "",
           "response_tokens": 1, "finish_reason": "stop", "seed": 0}  # fmt: skip
    path.write_text(json.dumps(row) + "\n" + json.dumps(row)[:30])
    assert read_samples(path) == [row]
    path.write_text("{}\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="line 1: not a sample"):
        read_samples(path)


def test_help_and_list_import_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['longcot.eval', '--list']\n"
        "from longcot.eval.__main__ import main\nmain()\n"
        "print([m for m in ('torch', 'vllm', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "countdown  version 1\n[]\n", done.stderr
