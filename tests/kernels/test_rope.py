"""RoPE: pairs turn by their position's angle; Liger's kernel interpreted on a CPU, real on a GPU.

The frequencies and their scalings are compared with transformers in tests/trainer/test_model.py.
"""

import pytest
import torch

from longcot.kernels.rope import (
    RopeScaling,
    _LigerRope,
    apply_rope,
    apply_rope_reference,
    inverse_frequencies,
    rope_tables,
)


def tables(num_tokens, head_dim, dtype=torch.float32, device="cpu"):
    """Those of a pack of two documents, the second at position 0 again."""
    frequencies = inverse_frequencies(1e4, head_dim, RopeScaling(), torch.device(device))
    first = (num_tokens + 1) // 2
    positions = torch.arange(num_tokens, device=device)
    positions[first:] -= first
    return rope_tables(positions, frequencies, dtype)


def formula(q, k, cos, sin):
    """A complex number a + ib for each pair, times e^(i angle)."""
    turn = torch.complex(cos, sin)

    def rotate(x):
        turned = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    return rotate(q), rotate(k)


def draw(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def outputs_and_gradient(function, qkv, num_heads, num_kv_heads, cos, sin):
    """What `function` gives for the slices of a fused projection, and the gradient of the whole."""
    leaf = qkv.detach().clone().requires_grad_()
    q, k, _ = leaf.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    outputs = function(q, k, cos, sin)
    upstream = [draw(*output.shape).to(output) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaf, upstream)]


def check_budget(assert_within_budget, function, sizes, dtype=torch.float32, device="cpu"):
    num_tokens, num_heads, num_kv_heads, head_dim = sizes
    qkv = draw(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=device)
    turn = tables(num_tokens, head_dim, dtype, device)
    heads = num_heads, num_kv_heads
    ours = outputs_and_gradient(function, qkv, *heads, *turn)
    torchs = outputs_and_gradient(apply_rope_reference, qkv, *heads, *turn)
    exact = outputs_and_gradient(formula, qkv.double(), *heads, *(t.double() for t in turn))
    for triple in zip(ours, torchs, exact, strict=True):
        assert_within_budget(*triple)


def liger(q, k, cos, sin):
    return _LigerRope.apply(q, k, cos, sin)


# T, H, G, K: one token, whose slices are contiguous; an odd number of heads and of tokens; a head
# size that is no power of two.
SIZES = [(1, 4, 2, 8), (7, 3, 1, 16), (6, 2, 2, 12)]


@pytest.mark.parametrize("sizes", SIZES)
def test_rope_is_the_formula(sizes, assert_within_budget):
    check_budget(assert_within_budget, apply_rope, sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_liger_interpreted_is_within_the_error_budget(sizes, interpreted, assert_within_budget):
    check_budget(assert_within_budget, liger, sizes)


def test_scores_depend_on_the_distance_only():
    q, k = draw(1, 1, 16).expand(9, 1, 16), draw(1, 1, 16).flip(-1).expand(9, 1, 16)
    frequencies = inverse_frequencies(1e4, 16, RopeScaling(), torch.device("cpu"))
    q, k = apply_rope(q, k, *rope_tables(torch.arange(9), frequencies, torch.float32))
    scores = torch.einsum("thk,shk->ts", q, k)
    for distance in range(9):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def check_that_nothing_is_overwritten(device):
    q, k = (draw(7, heads, 16, device=device).requires_grad_() for heads in (3, 1))
    upstream = [draw(7, heads, 16, device=device).flip(0) for heads in (3, 1)]
    kept = (q, k, *upstream, *tables(7, 16, device=device))
    before = [x.detach().clone() for x in kept]
    outputs = liger(q, k, *kept[4:])
    first = torch.autograd.grad(outputs, (q, k), upstream, retain_graph=True)
    second = torch.autograd.grad(outputs, (q, k), upstream)
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)
    for tensor, copy in zip(kept, before, strict=True):
        assert torch.equal(tensor, copy)


def test_liger_interpreted_overwrites_nothing(interpreted):
    check_that_nothing_is_overwritten("cpu")


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_overwritten():
    check_that_nothing_is_overwritten("cuda")


# As above, at the sizes of models: Qwen3 4B's heads, and as many key as query heads.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes", [(1, 4, 2, 64), (333, 3, 1, 80), (1025, 32, 8, 128), (65, 5, 5, 32)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_rope_is_within_the_error_budget(sizes, dtype, assert_within_budget):
    check_budget(assert_within_budget, apply_rope, sizes, dtype, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_the_results_repeat_and_the_host_does_not_wait():
    qkv = draw(1025, 12, 128, dtype=torch.bfloat16, device="cuda")
    turn = tables(1025, 128, torch.bfloat16, "cuda")
    upstream = [torch.ones(1025, heads, 128, device="cuda").bfloat16() for heads in (8, 2)]
    leaf = qkv.requires_grad_()

    def run():
        q, k, _ = leaf.split([8, 2, 2], dim=1)
        outputs = apply_rope(q, k, *turn)
        return [*outputs, *torch.autograd.grad(outputs, leaf, upstream)]

    first = run()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)
