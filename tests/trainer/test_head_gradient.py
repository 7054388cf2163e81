"""In bf16 the head's gradient reaches the optimizer unrounded: two ranks, two micro-steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("head_gradient_worker.py")


@pytest.mark.parametrize("tie", ["tied", "untied"])
def test_fsdp_carries_the_head_gradient_unrounded(tie, tmp_path):
    out = tmp_path / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(WORKER), str(out), tie]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    saved = torch.load(out)
    assert saved["fsdp"].dtype == torch.float32
    size = saved["exact"].norm()
    assert (saved["fsdp"] - saved["exact"]).norm() <= 1e-6 * size
    # What rounding each micro-step's would have cost, so that the comparison can fail.
    assert (saved["by_autograd"] - saved["exact"]).norm() > 5e-4 * size
