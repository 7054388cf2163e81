"""Builds by real processes: killed and gone on with, two at once, one short of a process, in little
memory.
"""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longcot.data.chat import load_tokenizer
from longcot.data.rules import Rules
from longcot.data.shards import Job, shard_path, tokenize_chunks
from longcot.data.sources import open_source, scan

WORKER = str(Path(__file__).with_name("build_worker.py"))
CHUNK_BYTES = 1000
NUM_ROWS = 150


@pytest.fixture
def source(tmp_path, write_rows):
    rows = [
        {"id": f"r{i}", "prompt": f"What is {i}?", "response": f"word{i} " * (1 + i % 9)}
        for i in range(NUM_ROWS)
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def start(tokenizer_path):
    """Start build_worker.py; whatever still runs at the end is ended."""
    started = []

    def start(source, out, *, processes=2, chunk_bytes=CHUNK_BYTES, pause_after=0):
        arguments = [source, out, tokenizer_path, processes, chunk_bytes, pause_after]
        process = subprocess.Popen(
            [sys.executable, WORKER, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def lines_until(process, name):
    """What it says up to the first line with `name`, and that line's value."""
    before = []
    for line in process.stdout:
        if f'"{name}"' in line:
            return before, json.loads(line)[name]
        before.append(line)
    raise AssertionError(f"it ended without {name}: {before} {process.stderr.read()}")


def assert_ends(pid, seconds=30):
    """Wait for a process that is not our child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], seconds)[0], f"process {pid} is still there"
    finally:
        os.close(handle)


def assert_same(made, wanted):
    for name in ("tokens", "is_target", "offsets", "num_targets", "weights"):
        assert np.array_equal(getattr(made, name), getattr(wanted, name)), name


def test_a_killed_build_leaves_no_process_and_goes_on_where_it_was(
    source, start, build, tmp_path, capsys
):
    out = tmp_path / "out"
    process = start(source, out, pause_after=3)
    _, children = lines_until(process, "processes")
    assert len(children) == 2
    process.kill()
    for child in children:
        assert_ends(child)
    assert not out.exists()
    (shards,) = tmp_path.glob(".out.shards-*")
    finished = len(list(shards.glob("0*.npz")))
    num_shards = len(scan(open_source(str(source)), CHUNK_BYTES).chunks)
    assert 3 <= finished <= 5 < num_shards  # each process had one more in hand
    made = build(source, out, chunk_bytes=CHUNK_BYTES, max_tokens=100_000)
    assert f"going on, {finished} of {num_shards} shards are there" in capsys.readouterr().out
    assert_same(made, build(source, tmp_path / "wanted", max_tokens=100_000))
    assert not shards.exists()


def test_shards_of_another_source_are_not_gone_on_with(source, start, build, tmp_path, capsys):
    out = tmp_path / "out"
    process = start(source, out, pause_after=3)
    _, children = lines_until(process, "processes")
    process.kill()
    for child in children:
        assert_ends(child)
    source.write_text(source.read_text().replace("word5", "word6"))
    made = build(source, out, chunk_bytes=CHUNK_BYTES, max_tokens=100_000)
    assert "going on" not in capsys.readouterr().out
    assert_same(made, build(source, tmp_path / "wanted", max_tokens=100_000))
    assert not list(tmp_path.glob(".out.shards-*"))


def test_of_two_builds_at_once_one_waits_and_takes_what_the_other_made(source, start, tmp_path):
    out = tmp_path / "out"
    first = start(source, out, pause_after=2)
    lines_until(first, "processes")
    second = start(source, out)
    assert second.stdout.readline() == f"another process builds {out}: waiting for it\n"
    print(file=first.stdin, flush=True)
    _, inode = lines_until(first, "inode")
    shards, seen = lines_until(second, "inode")
    assert seen == inode and shards == []
    assert first.wait() == second.wait() == 0


@pytest.mark.parametrize("victims", [1, 2])
def test_a_killed_process_is_an_error_at_once_and_its_shards_stay(
    victims, source, tokenizer_path, tmp_path
):
    chunks = scan(open_source(str(source)), CHUNK_BYTES).chunks
    tokenizer = load_tokenizer(str(tokenizer_path))
    job = Job(folder=tmp_path, tokenizer=tokenizer, fast=None, rules=Rules(), max_tokens=1000)
    made = tokenize_chunks(job, chunks, 2)
    next(made)
    children = [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]
    for child in children[-victims:]:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"was killed by signal 9.*start again to go on"):
        list(made)
    for child in children:
        assert_ends(child)
    assert shard_path(tmp_path, 0).exists() or shard_path(tmp_path, 1).exists()
    assert len(list(tokenize_chunks(job, chunks, 1))) < len(chunks)


def test_a_full_disk_is_named(source, tokenizer_path, tmp_path):
    arguments = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, "-m",
                 "longcot.data", "inspect", str(source), "--tokenized", str(tmp_path / "out"),
                 "--tokenizer", str(tokenizer_path)]  # fmt: skip
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be written: " in done.stderr and "File too large" in done.stderr


def test_memory_does_not_grow_with_the_source(start, tmp_path):
    def peak(name, num_rows):
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as file:
            for i in range(num_rows):
                response = f"word{i % 120} " * 500
                file.write(json.dumps({"prompt": f"{i}?", "response": response}) + "\n")
        process = start(path, tmp_path / name, processes=1, chunk_bytes=2**20)
        return lines_until(process, "peak_bytes")[1], path.stat().st_size

    small, small_bytes = peak("small", 700)
    large, large_bytes = peak("large", 10_000)
    # All rows in memory would be 33 MB of text, or 10 million token ids at 5 bytes at the least.
    # Measured: 3 to 13 MB, and 6 for three times as many rows.
    assert large_bytes - small_bytes > 33e6 and large - small < 20e6
