"""Countdown rows: what the teacher writes is right, problems are distinct, and the seed decides
every byte.
"""

import json
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcot.data.countdown import (
    build_examples,
    num_steps,
    problems,
    prompt,
    reachable_targets,
    teach,
)
from longcot.data.verify import verify_countdown

SMALL = {
    "shares": {3: 0.8, 4: 0.2},
    "teacher": "restate",
    "max_number": 12,
    "max_value": 99,
    "max_steps": 60,
    "seed": 3,
}


@settings(deadline=None, max_examples=60)
@given(
    numbers=st.lists(st.integers(1, 20), min_size=3, max_size=4),
    teacher=st.sampled_from(["restate", "terse"]),
    pick=st.integers(0, 10_000),
)
def test_the_teacher_solves_every_reachable_target_and_the_checker_agrees(numbers, teacher, pick):
    targets = sorted(reachable_targets(numbers, 99))
    if not targets:
        return
    target = targets[pick % len(targets)]
    response = teach(numbers, target, teacher, 99)
    assert response is not None
    assert verify_countdown(response, numbers, target).correct, response


def test_the_teacher_says_so_when_there_is_no_way():
    assert teach([1, 1, 1], 99, "restate", 99) is None


def test_every_computed_line_of_a_trace_is_true_arithmetic():
    for numbers, target in [next(problems(n, 20, 99, random.Random(n))) for n in (3, 4)]:
        response = teach(numbers, target, "restate", 99)
        assert response is not None
        steps = [s for line in response.splitlines() for s in line.replace("try ", "").split(": ")]
        said = [s for part in steps for s in part.split(", ") if " = " in s and "check" not in s]
        assert len(said) == num_steps(response)
        for step in said:
            left, right = step.split(" = ")
            assert eval(left) == int(right.split()[0])


def test_the_two_teachers_search_alike_and_only_one_restates_the_target():
    restated, terse = (teach((3, 3, 18), 27, teacher, 99) for teacher in ("restate", "terse"))
    assert restated is not None
    assert " vs 27" in restated
    assert restated.replace(" vs 27", "") == terse


def test_rows_are_distinct_verified_and_disjoint_between_the_sets():
    train, heldout, left_out = build_examples(num_train=500, num_heldout=60, **SMALL)
    keys = [(tuple(sorted(row.answer["numbers"])), row.answer["target"]) for row in train + heldout]
    assert len(train) == 500 and len(heldout) == 60
    assert len(set(keys)) == len(keys) == len({row.id for row in train + heldout})
    assert sum(len(row.answer["numbers"]) == 4 for row in train + heldout) == round(560 * 0.2)
    assert left_out["search too long"] > 0
    for row in train + heldout:
        assert verify_countdown(row.response, **row.answer).correct
        assert row.messages == [{"role": "user", "content": prompt(**row.answer)}]
        assert num_steps(row.response) <= 60


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_train": 0}, "num_train 0"),
        ({"shares": {3: 0.5}}, "shares"),
        ({"shares": {5: 1.0}}, "shares"),
        ({"max_number": 2}, "--max-number"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        build_examples(**({"num_train": 500, "num_heldout": 60} | SMALL | change))


def run_countdown(folder, *flags):
    return subprocess.run(
        [sys.executable, "-m", "longcot.data", "countdown", "--out", str(folder),
         "--num-train", "300",
         "--num-heldout", "20", *flags],
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_command_gives_the_same_bytes_twice_keeps_them_and_refuses_other_settings(tmp_path):
    for name in ("a", "b"):
        done = run_countdown(tmp_path / name)
        assert done.returncode == 0, done.stderr
    first, second = (
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("a", "b")
    )
    assert first["sha256"] == second["sha256"]
    assert len(first["sha256"]) >= 4  # two sets and the tokenizer's files

    kept = run_countdown(tmp_path / "a")
    assert kept.returncode == 0 and "kept" in kept.stdout
    refused = run_countdown(tmp_path / "a", "--seed", "1")
    assert refused.returncode == 1
    assert "seed" in refused.stderr and "Traceback" not in refused.stderr


def test_what_an_interrupted_build_left_is_removed_and_never_trusted(tmp_path):
    leftover = tmp_path / ".c.999999999.partial"
    leftover.mkdir()
    (leftover / "train.jsonl").write_text("{")
    done = run_countdown(tmp_path / "c")
    assert done.returncode == 0 and leftover.name in done.stdout
    assert not leftover.exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_countdown(tmp_path / "file" / "c")
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stderr and "Traceback" not in done.stderr
