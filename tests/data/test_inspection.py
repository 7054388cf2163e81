"""`longcot.data inspect` on real files: every figure is checked against one counted here."""

import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest

from longcot.data.inspection import Steps as PlannedSteps
from longcot.data.inspection import length_lines, step_lines
from longcot.data.packing import CostModel


@pytest.fixture
def source(tmp_path, write_rows):
    rows = [
        {"id": f"r{i}", "prompt": f"What is {i}?", "response": "word1 " * (1 + i)}
        for i in range(40)
    ]
    return write_rows(tmp_path / "rows.jsonl", [*rows, {"id": "empty", "prompt": "a"}])


def steps(**changes):
    values = {"sequences_per_step": 10, "tokens_per_pack": 100, "world_size": 2, "seed": 0}
    return PlannedSteps(**(values | changes), cost=CostModel(linear=1.0, quadratic=0.0))


def command(source, tokenizer_path, *more):
    return [sys.executable, "-m", "longcot.data", "inspect", str(source), "--tokenizer",
            str(tokenizer_path), "--sequences-per-step", "10", "--tokens-per-pack", "60",
            *map(str, more)]  # fmt: skip


def test_the_figures_are_those_of_the_rows(source, build, tmp_path):
    dataset = build(source, tmp_path / "out", on_bad_row="drop")
    lines = length_lines(dataset)
    lengths = dataset.lengths
    wanted = [lengths.mean(), *np.percentile(lengths, [0, 10, 50, 90, 99, 100])]
    assert [int(word) for word in lines[1].split()[1:]] == [round(v) for v in wanted]
    bars = [line.split() for line in lines[5:]]
    assert sum(int(words[3]) for words in bars) == len(dataset) == 40
    assert max(len(words[4]) for words in bars if len(words) > 4) == 50
    # 4 steps of 10 rows; one rank has nobody to wait for.
    text = "\n".join(step_lines(dataset, steps(world_size=1, tokens_per_pack=10_000)))
    assert f"4.00 steps of 10 rows, {lengths.sum():,} tokens" in text
    assert f"packs of 10,000 tokens are {lengths.sum() / 40_000:.1%} full" in text
    assert "1.0 micro-steps of 1 packs (1 to 1)" in text and "work 100.0% of" in text
    with pytest.raises(ValueError, match="40 usable rows, sequences_per_step is 41"):
        step_lines(dataset, steps(sequences_per_step=41))


def test_the_door_prints_drops_lengths_steps_and_a_row(source, tokenizer_path, tmp_path):
    kept = tmp_path / "kept"
    done = subprocess.run(
        command(source, tokenizer_path, "--tokenized", kept, "--world-size", 2),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in (kept / "ledger.jsonl").read_text().splitlines()]
    long = [entry for entry in entries if entry["reason"] == "longer than 60 tokens"]
    assert long and f"{len(long)} dropped: longer than 60 tokens: {long[0]['id']}" in done.stdout
    assert "1 refused: missing column: rows.jsonl:41" not in done.stdout  # it has an id
    assert "1 refused: missing column: empty" in done.stdout
    assert "What is 0?<|im_end|>\n<|im_start|>assistant\n»word1 <|endoftext|>«" in done.stdout
    assert "\x1b[" not in done.stdout and "% full" in done.stdout


def test_a_terminal_gets_colour(source, tokenizer_path):
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(source, tokenizer_path), stdout=theirs, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # how a pseudo-terminal says that the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0 and b"\x1b[32mword1 <|endoftext|>\x1b[0m" in shown


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tokenizer", "/nowhere"], "there is no tokenizer folder /nowhere"),
        (["--template", "plain", "--targets", "every_turn"], "template is 'plain' with"),
        (["--world-size", "0"], "world_size is 0, it must be at least 1"),
        (["--on-bad-row", "error"], "line 41, id 'empty': missing column: response; found id"),
        (["--revision", "main"], "leave out revision"),
    ],
)
def test_bad_usage_is_one_sentence(flags, named, source, tokenizer_path):
    done = subprocess.run(command(source, tokenizer_path, *flags), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert named in done.stderr
