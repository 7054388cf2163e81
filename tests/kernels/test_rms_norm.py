"""RMSNorm, alone and after an addition: the formula, its gradients, and Liger's kernels on a GPU.

Triton's interpreter does not run Liger's: it hands them epsilon as a plain float, which they cast.
"""

import pytest
import torch

from longcot.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)


def formula(x, weight, epsilon):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def draw(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def outputs_and_gradients(function, *inputs):
    """What `function` gives, and the gradients of its inputs for upstream gradients drawn."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [draw(*output.shape).to(output) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


# One row; an odd size, no power of two; three dimensions, as the heads of queries and keys have.
SHAPES = [(1, 64), (7, 33), (5, 3, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilon", [1e-6, 0.1])  # as models have it; so that forgetting it shows
def test_rms_norm_is_the_formula(shape, epsilon, assert_within_budget):
    x, weight = draw(*shape), draw(shape[-1]) + 2
    ours = outputs_and_gradients(lambda x, w: rms_norm(x, w, epsilon), x, weight)
    torchs = outputs_and_gradients(lambda x, w: formula(x, w, epsilon), x, weight)
    exact = outputs_and_gradients(lambda x, w: formula(x, w, epsilon), x.double(), weight.double())
    for triple in zip(ours, torchs, exact, strict=True):
        assert_within_budget(*triple)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_is_the_sum_and_its_norm(shape, assert_within_budget):
    def formulas(x, delta, weight):
        return x + delta, formula(x + delta, weight, 1e-6)

    inputs = draw(*shape), draw(*shape).flip(0), draw(shape[-1]) + 2
    ours = outputs_and_gradients(lambda x, d, w: add_rms_norm(x, d, w, 1e-6), *inputs)
    torchs = outputs_and_gradients(formulas, *inputs)
    exact = outputs_and_gradients(formulas, *(x.double() for x in inputs))
    for triple in zip(ours, torchs, exact, strict=True):
        assert_within_budget(*triple)


def test_a_row_of_zeros_stays_zero():
    x = torch.zeros(2, 8, requires_grad=True)
    normed = rms_norm(x, torch.ones(8), 1e-6)
    normed.sum().backward()
    assert normed.count_nonzero() == 0
    assert x.grad is not None and x.grad.isfinite().all()


# One row; a size that is no power of two; the widest model; and, where Liger changes kernel, many
# short rows: heads of 128, one row more than 8 x 4096.
GPU_SHAPES = [(1, 4096), (333, 1000), (2050, 8192), (10923, 3, 128)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_rms_norm_is_within_the_error_budget(shape, dtype, assert_within_budget):
    inputs = draw(*shape, dtype=dtype, device="cuda"), draw(shape[-1]).to("cuda", dtype) + 2
    ours = outputs_and_gradients(lambda x, w: rms_norm(x, w, 1e-6), *inputs)
    torchs = outputs_and_gradients(lambda x, w: rms_norm_reference(x, w, 1e-6), *inputs)
    exact = outputs_and_gradients(lambda x, w: formula(x, w, 1e-6), *(x.double() for x in inputs))
    for triple in zip(ours, torchs, exact, strict=True):
        assert_within_budget(*triple)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_add_rms_norm_is_within_the_error_budget(shape, dtype, assert_within_budget):
    def formulas(x, delta, weight):
        return x + delta, formula(x + delta, weight, 1e-6)

    x = draw(*shape, dtype=dtype, device="cuda")
    inputs = x, x.flip(0), draw(shape[-1]).to("cuda", dtype) + 2
    ours = outputs_and_gradients(lambda x, d, w: add_rms_norm(x, d, w, 1e-6), *inputs)
    torchs = outputs_and_gradients(lambda x, d, w: add_rms_norm_reference(x, d, w, 1e-6), *inputs)
    exact = outputs_and_gradients(formulas, *(x.double() for x in inputs))
    for triple in zip(ours, torchs, exact, strict=True):
        assert_within_budget(*triple)


@pytest.mark.gpu
def test_on_a_gpu_a_slice_is_normed_as_its_copy_is():
    qkv = draw(70, 6, 128, dtype=torch.bfloat16, device="cuda")
    weight = draw(128).to("cuda", torch.bfloat16)
    sliced, copied = qkv[:, 1:4], qkv[:, 1:4].contiguous()
    assert torch.equal(rms_norm(sliced, weight, 1e-6), rms_norm(copied, weight, 1e-6))


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_written_that_the_caller_holds():
    x, delta = (draw(70, 512, device="cuda").requires_grad_() for _ in range(2))
    weight = torch.ones(512, device="cuda", requires_grad=True)
    upstream = draw(70, 512, device="cuda").flip(0)
    before = [t.detach().clone() for t in (x, delta, weight, upstream)]
    torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), upstream)
    outputs = add_rms_norm(x, delta, weight, 1e-6)
    torch.autograd.grad(outputs, (x, delta, weight), (upstream, upstream))
    for tensor, kept in zip((x, delta, weight, upstream), before, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.gpu
def test_on_a_gpu_the_results_repeat_and_the_host_does_not_wait():
    x, delta = (draw(4097, 1024, device="cuda").requires_grad_() for _ in range(2))
    weight = torch.ones(1024, device="cuda", requires_grad=True)
    upstream = torch.ones(4097, 1024, device="cuda")

    def run():
        normed = rms_norm(x, weight, 1e-6)
        outputs = add_rms_norm(x, delta, weight, 1e-6)
        gradients = torch.autograd.grad(
            (normed, *outputs), (x, delta, weight), (upstream, upstream, upstream)
        )
        return [normed, *outputs, *gradients]

    first = run()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)
