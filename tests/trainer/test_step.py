"""One step is the same step however it is packed and on however many ranks: real processes, FSDP2
over gloo.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("step_worker.py")


@pytest.fixture(scope="module", params=["tied", "untied"])
def steps(request, tmp_path_factory):
    """(packing, ranks) -> what the worker saved."""
    folder = tmp_path_factory.mktemp(request.param)
    results = {}
    for packing in ("single", "packed"):
        for ranks in (1, 2):
            out = folder / f"{packing}-{ranks}.pt"
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                 str(ranks),
                 str(WORKER), str(out), packing, request.param],
                capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            results[packing, ranks] = torch.load(out)
    return results


def test_packing_and_ranks_change_neither_loss_nor_gradients(steps):
    truth = steps["single", 1]
    assert truth["micro_steps"] == 8  # one document at a time
    assert steps["packed", 2]["micro_steps"] < steps["single", 2]["micro_steps"] == 4
    assert truth["norm"] > 0.1
    for result in steps.values():
        assert result["loss"] == pytest.approx(truth["loss"], rel=1e-6)
        for name, gradient in truth["gradients"].items():
            difference = (result["gradients"][name] - gradient).abs().max()
            assert difference <= 1e-6 * gradient.abs().max(), name


def test_the_loss_is_the_mean_over_all_targets_not_a_mean_of_means(steps):
    # An untrained model is near log(vocabulary) on every token, whatever the grouping.
    assert steps["packed", 2]["loss"] == pytest.approx(torch.tensor(131.0).log().item(), rel=0.05)
