"""Compiling for absent GPUs: the door's table, and that a kernel which does not fit is found out.

In processes of their own, because in this one Triton may be interpreting.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from longcot.kernels.ahead_of_time import HIDDEN_SIZES, VOCABULARY_SIZES, Resources

BASES = Path(__file__).resolve().parents[2] / "trainer" / "bases.json"


def test_the_sizes_are_those_of_the_bases():
    bases = json.loads(BASES.read_text()).values()
    assert {base["vocab_size"] for base in bases} <= set(VOCABULARY_SIZES)
    assert {base["hidden_size"] for base in bases} <= set(HIDDEN_SIZES)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-m", "longcot.kernels", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def test_every_configuration_that_can_be_picked_fits_its_chip(table):
    rows = table["rows"]
    assert {row["capability"] for row in rows} == {80, 90, 100}
    assert not [row for row in rows if row["obstacles"]]
    for row in rows:
        assert 0 < row["registers"] <= 255 and row["spill_bytes"] <= 64


def test_the_table_covers_every_vocabulary_on_every_chip(table):
    for capability in (80, 90, 100):
        names = [
            name
            for row in table["rows"]
            if row["capability"] == capability
            for name in row["launches"]
        ]
        for vocab_size in VOCABULARY_SIZES:
            assert f"softmax two_reads V={vocab_size} bfloat16 gradient" in names
            assert f"filter hidden gradient V={vocab_size} bfloat16 D=4096" in names
        # Ampere has no clusters of thread blocks.
        one_read = [name for name in names if "one_read" in name]
        assert bool(one_read) == (capability >= 90)
        clusters = {row["num_ctas"] for row in table["rows"] if row["capability"] == capability}
        assert clusters == ({1} if capability == 80 else {1, 2, 8})


SPILLING = """
import torch, triton, triton.language as tl
from longcot.kernels.ahead_of_time import compile_for
from longcot.kernels.launching import Launch

@triton.jit
def sums(x_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    for _ in range(3):
        x = x * tl.sum(x, 0)
    tl.store(x_ptr + tl.arange(0, SIZE), x)

x = torch.empty(65536, device="meta")
for warps in (32, 4):
    resources = compile_for(90, Launch(sums, (1,), (x,), {"SIZE": 65536, "num_warps": warps}))
    print(resources.spill_bytes, resources.obstacles(90))
"""


def test_a_kernel_that_spills_is_found_out(tmp_path):
    file = tmp_path / "spilling.py"  # Triton reads the source of its kernels from a file
    file.write_text(SPILLING)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        spilled = int(line.split()[0])
        assert spilled > 64 and f"spills {spilled} bytes" in line


def test_what_does_not_fit_is_named():
    fits = Resources(
        binary="", registers=128, spill_bytes=64, shared_bytes=163 * 1024, num_warps=16, num_ctas=1
    )
    assert fits.obstacles(80) == []
    too_much = replace(fits, shared_bytes=164 * 1024)
    assert "sm_80 has 166912" in too_much.obstacles(80)[0]
    assert too_much.obstacles(90) == []
    assert "131072 registers" in replace(fits, num_warps=32).obstacles(90)[0]
