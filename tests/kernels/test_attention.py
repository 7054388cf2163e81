"""Packed attention: documents do not see each other; the result is that of the plain formula."""

import itertools

import pytest
import torch

from longcot.kernels.attention import choose_backend, varlen_attention


def formula(q, k, v, bounds):
    """Softmax attention written out, document by document, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows = []
    for start, end in itertools.pairwise(bounds):
        for t in range(start, end):
            scores = torch.einsum("hk,shk->hs", q[t], k[start : t + 1]) / q.shape[2] ** 0.5
            rows.append(torch.einsum("hs,shk->hk", scores.softmax(1), v[start : t + 1]))
    return torch.stack(rows)


# One token; documents of one token; a prime length; grouped queries.
@pytest.mark.parametrize("bounds", [[0, 1], [0, 1, 2, 40], [0, 17, 19, 60]])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_forward_and_backward_match_the_formula(bounds, num_heads, num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (bounds[-1], heads, 8) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]
    q, k, v, upstream = (torch.randn(shape, generator=generator) for shape in shapes)
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)

    def attend_plainly(q, k, v):
        return formula(q, k, v, bounds)

    def attend(q, k, v):
        return varlen_attention(q, k, v, cu_seqlens, max(lengths), "sdpa")

    results = []
    for function in (attend_plainly, attend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = function(*leaves)
        output.backward(upstream.to(output.dtype))
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for exact, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=2e-6)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "named"),
    [
        ("flash", CPU, torch.bfloat16, "'flash' is unknown"),
        ("torch_varlen", CPU, torch.bfloat16, "needs a CUDA device, not cpu"),
        ("torch_varlen", GPU, torch.float32, "takes no float32"),
    ],
)
def test_a_backend_that_cannot_run_is_an_error_not_a_fallback(requested, device, dtype, named):
    with pytest.raises(ValueError, match=named):
        choose_backend(requested, device, dtype)


def test_auto_says_what_it_picked_and_why():
    backend, why = choose_backend("auto", CPU, torch.bfloat16)
    assert backend == "sdpa" and "no CUDA device" in why
    backend, why = choose_backend("auto", GPU, torch.float32)
    assert backend == "sdpa" and "float32" in why
    assert choose_backend("auto", GPU, torch.bfloat16)[0] == "torch_varlen"
