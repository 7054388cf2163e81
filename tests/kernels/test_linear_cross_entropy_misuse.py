"""The fused head and loss misused: an error that says what to do, never a wrong number."""

import subprocess
import sys

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from longcot.kernels.linear_cross_entropy import linear_cross_entropy


def draw():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 24, generator=generator) for rows in (9, 11))
    return hidden, weight, torch.arange(9)


def test_a_second_use_of_the_graph_is_an_error_not_a_wrong_number():
    hidden, weight, targets = draw()
    hidden.requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="was used already"):
        loss.backward()
    (gradient,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets)[0], hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_grad_weight_wants_an_upstream_gradient_of_one_and_no_recomputation():
    hidden, weight, targets = draw()
    hidden.requires_grad_()
    total = torch.zeros(11, 24)
    loss, _ = linear_cross_entropy(hidden, weight.requires_grad_(), targets, grad_weight=total)
    with pytest.raises(RuntimeError, match="the upstream gradient must be 1"):
        (loss * 2).backward()

    def head(hidden):
        loss, _ = linear_cross_entropy(torch.tanh(hidden), weight, targets, grad_weight=total)
        return loss * torch.ones(())  # saved for backward, so that all above is recomputed

    loss = checkpoint(head, hidden, use_reentrant=False)
    with pytest.raises(RuntimeError, match="keep the head out of checkpointing"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden": torch.zeros(4, 5)}, r"\(4, 5\)"),
        ({"hidden": torch.zeros(0, 6), "targets": torch.zeros(0, dtype=torch.long)}, "is empty"),
        ({"weight": torch.zeros(0, 6)}, r"\(0, 6\) is empty"),
        ({"weight": torch.zeros(11, 6).bfloat16()}, "hidden is torch.float32, weight torch.bfl"),
        ({"hidden": torch.zeros(4, 6).half(), "weight": torch.zeros(11, 6).half()}, "float16"),
        ({"weight": torch.zeros(11, 6, device="meta")}, "weight is on meta, hidden on cpu"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets \(3,\)"),
        ({"targets": torch.zeros(4)}, "targets are torch.float32"),
        ({"weights": torch.zeros(3)}, r"weights \(3,\)"),
        ({"targets": torch.full((4,), 11)}, "from 11 to 11 outside the vocabulary of 11"),
        ({"targets": torch.tensor([0, -1, 5, -100])}, "from -1 to -1 outside the vocabulary of 11"),
        ({"num_targets": 3}, "num_targets is 3, but 4 targets"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0"),
        ({"softmax": "fast"}, "'fast' is unknown"),
        ({"grad_weight": torch.zeros(11, 5)}, r"grad_weight \(11, 5\)"),
        ({"grad_weight": torch.zeros(11, 6).bfloat16()}, "be torch.float32"),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused(change, named):
    inputs = {
        "hidden": torch.zeros(4, 6),
        "weight": torch.zeros(11, 6),
        "targets": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=named):
        linear_cross_entropy(**(inputs | change))


def test_a_sharded_weight_is_refused(process_group):
    weight = distribute_tensor(torch.zeros(11, 6), init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match="weight is a DTensor, sharded over ranks: gather it"):
        linear_cross_entropy(torch.zeros(4, 6), weight, torch.zeros(4, dtype=torch.long))


@pytest.mark.gpu
@pytest.mark.parametrize("bad", ["targets[3] = 5000", "targets[3] = -1", "num_targets = 63"])
def test_on_a_gpu_bad_targets_stop_the_process(bad):
    code = f"""
import torch
from longcot.kernels.linear_cross_entropy import linear_cross_entropy
hidden = torch.randn(64, 32, device="cuda", requires_grad=True)
weight = torch.randn(5000, 32, device="cuda")
targets = torch.zeros(64, dtype=torch.long, device="cuda")
num_targets = 64
{bad}
loss, _ = linear_cross_entropy(hidden, weight, targets, num_targets=num_targets)
loss.backward()
print(hidden.grad.sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "assert" in done.stderr
