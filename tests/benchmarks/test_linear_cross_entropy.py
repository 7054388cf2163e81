"""The head's benchmark: it judges before it times, loses nobody to another's failure, and says who
was absent and why.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from longcot.benchmarks import __main__ as door
from longcot.benchmarks import head_providers
from longcot.benchmarks.head_accuracy import Truth, errors, torch_answer, truth
from longcot.benchmarks.head_cases import Case, cases
from longcot.benchmarks.head_providers import FLOOR, OURS, Variant, all_variants, chosen, draw
from longcot.benchmarks.linear_cross_entropy import failures, measure_case
from longcot.benchmarks.supervisor import supervise
from longcot.benchmarks.timing import peak_bytes, race, rotated
from longcot.kernels.linear_cross_entropy import linear_cross_entropy_reference

CPU = torch.device("cpu")
# More rows than the slice's 250, so that the two checks differ.
CASE = Case(names=["tiny"], hidden_size=16, vocab_size=300, num_tokens=260)


def measured(*variants: Variant, excluded=None, dtype=torch.float32):
    """The row of each variant, raced against the floor."""
    known = {variant.name: variant for variant in all_variants()}
    result = measure_case(
        CASE, [known[FLOOR], *variants, known["torch"]], device=CPU, dtype=dtype, masked=0.0,
        num_rounds=3, seconds=5.0, excluded=excluded or {},
    )  # fmt: skip
    rows = {row["variant"]: row for row in result["rows"]}
    for name in (FLOOR, "torch"):
        assert rows[name]["status"] == "timed", rows[name]["reason"]
    return rows


def altered(change, name="altered", **settings) -> Variant:
    """Plain torch with its answer passed through `change`."""

    def make(problem):
        return lambda: change(problem, *torch_answer(problem))

    return Variant(name=name, make=make, **settings)


def test_the_command_at_a_tiny_size(tmp_path):
    out = tmp_path / "head.json"
    command = [sys.executable, "-m", "longcot.benchmarks", "linear_cross_entropy", "--json"]
    command += ["--shapes", "16x300", "--tokens", "64", "130", "--masked", "0.3", "--rounds", "3"]
    command += ["--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert document["versions"]["torch"] == torch.__version__
    assert [case["num_tokens"] for case in document["cases"]] == [64, 130]
    for case in document["cases"]:
        assert case["num_rounds"] == 3
        assert case["useful_flops"] == 6 * case["num_tokens"] * 300 * 16
        rows = {row["variant"]: row for row in case["rows"]}
        assert list(rows) == [variant.name for variant in all_variants()]
        for name, row in rows.items():
            if row["status"] != "timed":
                assert row["reason"] and row["milliseconds"] is None, name
                assert row["reason"] in done.stdout
                continue
            assert set(row["checks"]) == {"slice", "slice_bfloat16", "whole"}
            for check in row["checks"].values():
                assert check["passed"] and check["errors"]["grad_weight"] > 0
            assert row["fraction_of_three_matmuls"] > 0 and row["useful_tflops"] > 0
            assert 0 < row["milliseconds"]["p20"] <= row["milliseconds"]["p80"]
        assert {FLOOR, OURS, "ours:torch", "torch"} <= {
            name for name, row in rows.items() if row["status"] == "timed"
        }
        assert rows[FLOOR]["fraction_of_three_matmuls"] == 1
        # The fp32 head gradient alone is 300 x 16 x 4 bytes.
        assert rows[OURS]["peak_bytes"] > 300 * 16 * 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p, loss, h, w: (loss, h, w * 1.1), "slice: grad_weight is off by 1.0e-01"),
        (lambda p, loss, h, w: (loss, h.zero_(), w), "slice: grad_hidden is off by 1.0e+00"),
        (lambda p, loss, h, w: (loss * 1.01, h, w), "slice: loss is off by 1.0e-02"),
        (lambda p, loss, h, w: (loss, h * float("nan"), w), "slice: grad_hidden is off by inf"),
        (lambda p, loss, h, w: (loss * float("nan"), h, w), "slice: loss is off by nan"),
        # Right on the slice, and wrong in the rows that only the whole problem has.
        (
            lambda p, loss, h, w: (loss, torch.cat([h[:250], 2 * h[250:]]), w),
            "whole: grad_hidden is off by",
        ),
    ],
)
@pytest.mark.parametrize("is_ours", [False, True])
def test_a_wrong_variant_is_not_timed_and_says_by_how_much(change, says, is_ours):
    row = measured(altered(change, is_ours=is_ours))["altered"]
    assert row["status"] == "wrong" and row["reason"].startswith(says)
    assert row["milliseconds"] is row["useful_tflops"] is row["fraction_of_three_matmuls"] is None
    json.dumps(row, allow_nan=False)
    case = {"rows": [row], "num_tokens": 260, "hidden_size": 16, "vocab_size": 300}
    assert len(failures({"cases": [case]})) == int(is_ours)


def test_ours_must_be_as_exact_as_torch_where_a_peer_need_not():
    def four_times_torchs_error(problem, loss, grad_hidden, grad_weight):
        exact = truth(problem).grad_weight
        return loss, grad_hidden, exact + 4 * (grad_weight.double() - exact)

    for is_ours, status in ((False, "timed"), (True, "wrong")):
        variant = altered(four_times_torchs_error, is_ours=is_ours)
        assert measured(variant, dtype=torch.bfloat16)["altered"]["status"] == status


def test_the_judge_agrees_with_autograd():
    problem = draw(
        num_tokens=37,
        hidden_size=16,
        vocab_size=300,
        dtype=torch.float32,
        device=CPU,
        masked=0.25,
    )
    hidden, weight = (x.double().requires_grad_() for x in (problem.hidden, problem.weight))
    loss, num_targets = linear_cross_entropy_reference(hidden, weight, problem.targets)
    loss.backward()
    exact = truth(problem)
    assert num_targets == problem.num_targets < 37
    found = errors((loss, hidden.grad, weight.grad), exact)
    assert list(found.values()) == pytest.approx([0] * 3, abs=1e-14)
    # And it measures what it says: 3 % more of everything is an error of 3 %.
    more = Truth(
        loss=exact.loss / 1.03,
        grad_hidden=exact.grad_hidden / 1.03,
        grad_weight=exact.grad_weight / 1.03,
    )
    found = errors((loss, hidden.grad, weight.grad), more)
    assert list(found.values()) == pytest.approx([0.03] * 3)


def test_the_absent_are_listed_and_exceptions_lose_nobody_else():
    def absent(problem):
        raise ImportError("no module named fastest_head\nand a second line")

    def too_large(problem):
        raise MemoryError("needs about 99 GB, 1 are free")

    def without_gradient(problem, loss, grad_hidden, grad_weight):
        return loss, None, grad_weight

    def tired(problem):  # both checks, its memory, a warm-up and a round; then no more
        calls = iter(range(3))
        return lambda: (next(calls), torch_answer(problem))[1]

    rows = measured(
        Variant(name="absent", make=absent),
        Variant(name="large", make=too_large),
        altered(without_gradient, name="idle"),
        Variant(name="tired", make=tired),
        Variant(name="crashed", make=absent),
        excluded={"crashed": "killed by signal 11 (timing)"},
    )
    found = {name: (row["status"], row["reason"]) for name, row in rows.items()}
    assert found["absent"] == ("absent", "ImportError: no module named fastest_head")
    assert found["large"][0] == "raised"
    assert found["large"][1].startswith("MemoryError: needs about 99 GB, 1 are free (test_")
    assert found["idle"][0] == "raised" and "no gradient" in found["idle"][1]
    assert found["tired"][0] == "raised" and found["tired"][1].startswith("StopIteration")
    assert rows["tired"]["milliseconds"] is None
    assert found["crashed"] == ("ended the process", "killed by signal 11 (timing)")


CHILD = """
import os, signal, sys
from pathlib import Path
from longcot.benchmarks.supervisor import note_progress, note_reason, read_job
scratch = Path(sys.argv[1])
job = read_job(scratch)
for variant in ("killed", "stuck", "exits", "harmless"):
    note_progress(scratch, "timing", variant)
    if variant not in job["excluded"]:
        if variant == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if variant == "stuck":
            signal.pause()
        if variant == "exits":
            note_reason(scratch, "the GPU is lost")
            sys.exit(1)
note_progress(scratch, "saving", "")
sys.exit(job["last"])
"""


def test_what_ends_or_stalls_the_process_is_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "headchild.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    job = {"excluded": {}, "last": 0}
    supervise("headchild", job, tmp_path, patience_seconds=2)
    assert job["excluded"] == {
        "killed": "killed by signal 9 (timing)",
        "stuck": "no end after 2 s (timing)",
        "exits": "the GPU is lost (timing)",
    }
    assert "without killed from here on" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match=r"exit code 3 \(saving\)"):
        supervise("headchild", job | {"last": 3}, tmp_path, patience_seconds=2)


def test_rounds_turn_and_a_variant_that_leaves_does_not_stop_them():
    orders = [rotated("abcd", index) for index in range(4)]
    assert [order[0] for order in orders] == list("abcd")
    assert all(sorted(order) == list("abcd") for order in orders)
    followers = {(order[i], order[i + 1]) for order in orders for i in range(3)}
    assert {("a", "b"), ("b", "a")} <= followers
    calls = {"good": lambda: None, "bad": lambda: 1 / 0}
    result = race(calls, device=CPU, num_rounds=4, num_warmup_rounds=1, seconds=60)
    assert len(result.milliseconds["good"]) == 4 and list(result.milliseconds) == ["good"]
    assert list(result.reasons) == ["bad"]
    assert result.reasons["bad"].startswith("ZeroDivisionError: division by zero (test_")
    # Out of time: the least number of rounds and no more.
    result = race(calls, device=CPU, num_rounds=9, num_warmup_rounds=0, seconds=0)
    assert len(result.milliseconds["good"]) == 3


def test_peak_memory_counts_what_is_live_at_once():
    def call():
        first = torch.ones(1000, 1000)  # 4 MB
        second = first * 2  # 8 MB with the first
        del first
        third = second.exp()  # still 8 MB
        return third.sum()

    assert peak_bytes(call, CPU) == pytest.approx(8e6, rel=1e-3)


def test_shapes_come_from_the_bases_and_equal_ones_are_measured_once():
    every = cases(None, [4096, 16384], "cuda")
    sizes = [(case.hidden_size, case.vocab_size, case.num_tokens) for case in every]
    assert len(sizes) == len(set(sizes)) == 2 * 8
    assert (4096, 151936, 16384) in sizes and (6144, 92544, 4096) in sizes
    assert every[0].names == ["Qwen3-1.7B-Base", "Qwen2.5-3B"]  # one head, two bases
    (custom,) = cases(["4096x128256"], None, "cuda")
    assert (custom.hidden_size, custom.vocab_size, custom.num_tokens) == (4096, 128256, 16384)


def test_a_choice_of_variants_keeps_the_floor():
    names = [variant.name for variant in chosen(all_variants(), ["ours:*", "quack"])]
    assert names[0] == FLOOR and "quack" in names and "ours:torch" in names
    assert OURS not in names and "torch" not in names


def test_a_floor_in_chunks_claims_no_gradient(monkeypatch):
    # Room for 65 of 260 rows: two buffers of 300 fp32 values each, in a third of what is free.
    monkeypatch.setattr(head_providers, "free_bytes", lambda device: 3 * 2 * 65 * 300 * 4)
    result = measure_case(
        CASE, chosen(all_variants(), [OURS]), device=CPU, dtype=torch.float32, masked=0.0,
        num_rounds=3, seconds=5.0, excluded={},
    )  # fmt: skip
    floor, ours = result["rows"]
    assert floor["status"] == ours["status"] == "timed"
    assert set(floor["checks"]["whole"]["errors"].values()) == {None}
    assert ours["fraction_of_three_matmuls"] > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--shapes", "qwen4"], r"--shapes qwen4: a shape is DxV.* Qwen3-8B-Base"),
        (["--shapes", "0x100"], r"--shapes 0x100"),
        (["--tokens", "0"], r"--tokens 0: .* 1 or more"),
        (["--variants", "fastest"], r"--variants fastest: .*three_matmuls"),
        (["--masked", "1"], r"--masked 1\.0: a fraction"),
        (["--rounds", "0"], r"--rounds 0: "),
        (["--seconds", "-1"], r"--seconds -1\.0: "),
        (["--out", "nowhere/head.json"], r"--out nowhere/head\.json: nowhere is no folder"),
    ],
)
def test_a_bad_flag_is_one_sentence(flags, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "linear_cross_entropy", "--device", "cpu", *flags])
    with pytest.raises(SystemExit, match=rf"^longcot\.benchmarks: {says}[^\n]*$"):
        door.main()


def test_the_other_benchmark_keeps_its_flags():
    arguments = door._parser().parse_args(["weights", "--json", "--ranks", "3"])
    assert (arguments.name, arguments.ranks, arguments.gigabytes, arguments.json) == (
        "weights", 3, 2.0, True,
    )  # fmt: skip
