"""SwiGLU: the formula, its gradients, and Liger's kernel, interpreted on a CPU, real on a GPU."""

import pytest
import torch

from longcot.kernels.swiglu import _swiglu_liger, swiglu, swiglu_reference


def formula(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def draw(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).mul(3).to(device, dtype)


def output_and_gradient(function, gate_up):
    """What `function` gives, and the gradient of its input."""
    leaf = gate_up.detach().clone().requires_grad_()
    output = function(leaf)
    upstream = draw(*output.shape).to(output)
    (gradient,) = torch.autograd.grad(output, leaf, upstream)
    return output.detach(), gradient


# One row, whose halves are contiguous; an odd size, no power of two; three dimensions.
SHAPES = [(1, 32), (7, 66), (3, 5, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_is_the_formula(shape, assert_within_budget):
    gate_up = draw(*shape)
    ours = output_and_gradient(swiglu, gate_up)
    torchs = output_and_gradient(formula, gate_up)
    exact = output_and_gradient(formula, gate_up.double())
    for triple in zip(ours, torchs, exact, strict=True):
        assert_within_budget(*triple)


@pytest.mark.parametrize("shape", SHAPES)
def test_liger_interpreted_is_within_the_error_budget(shape, interpreted, assert_within_budget):
    gate_up = draw(*shape)
    ours = output_and_gradient(_swiglu_liger, gate_up)
    torchs = output_and_gradient(swiglu_reference, gate_up)
    exact = output_and_gradient(formula, gate_up.double())
    for triple in zip(ours, torchs, exact, strict=True):
        assert_within_budget(*triple)


def check_that_nothing_is_overwritten(device):
    gate_up = draw(7, 66, device=device).requires_grad_()
    upstream = draw(7, 33, device=device)
    before = [x.detach().clone() for x in (gate_up, upstream)]
    output = _swiglu_liger(gate_up)
    (once,) = torch.autograd.grad(output, gate_up, upstream, retain_graph=True)
    (again,) = torch.autograd.grad(output, gate_up, upstream)
    assert torch.equal(once, again)
    for tensor, kept in zip((gate_up, upstream), before, strict=True):
        assert torch.equal(tensor, kept)


def test_liger_interpreted_overwrites_nothing(interpreted):
    check_that_nothing_is_overwritten("cpu")


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_overwritten():
    check_that_nothing_is_overwritten("cuda")


# One row; a size that is no power of two; the feed-forward sizes of Qwen3 4B and 14B.
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 2 * 512), (333, 2 * 1000), (65, 2 * 9728), (9, 2 * 17408)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_swiglu_is_within_the_error_budget(shape, dtype, assert_within_budget):
    gate_up = draw(*shape, dtype=dtype, device="cuda")
    ours = output_and_gradient(swiglu, gate_up)
    torchs = output_and_gradient(swiglu_reference, gate_up)
    exact = output_and_gradient(formula, gate_up.double())
    for triple in zip(ours, torchs, exact, strict=True):
        assert_within_budget(*triple)


@pytest.mark.gpu
def test_on_a_gpu_the_results_repeat_and_the_host_does_not_wait():
    gate_up = draw(4097, 2048, dtype=torch.bfloat16, device="cuda").requires_grad_()
    upstream = torch.ones(4097, 1024, dtype=torch.bfloat16, device="cuda")

    def run():
        output = swiglu(gate_up)
        return [output, *torch.autograd.grad(output, gate_up, upstream)]

    first = run()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)
