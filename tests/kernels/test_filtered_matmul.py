"""Gradient filtering: the small tiles are left out, no other, and the error is within bounds."""

import pytest
import torch

from longcot.kernels.filtered_matmul import (
    EPSILON,
    TILE,
    active_tiles,
    filter_tiles_,
    filtered_hidden_gradient_,
    filtered_weight_gradient_,
)
from longcot.kernels.linear_cross_entropy import linear_cross_entropy


def draw(num_rows, vocab_size, device):
    """Entries near the bound, on either side of it by whole tiles; some empty, some large."""
    generator = torch.Generator().manual_seed(num_rows)
    weights = torch.rand(num_rows, generator=generator) + 0.5
    shape = [-(-size // TILE) for size in (num_rows, vocab_size)]
    levels = torch.tensor([0.0, 0.9, 1.2, 9.0])[torch.randint(0, 4, shape, generator=generator)]
    levels = levels.repeat_interleave(TILE, 0)[:num_rows].repeat_interleave(TILE, 1)[:, :vocab_size]
    signs = torch.where(torch.rand(num_rows, vocab_size, generator=generator) < 0.5, -1.0, 1.0)
    dlogits = EPSILON * weights[:, None] * levels * signs
    return dlogits.to(device), weights.to(device)


# Less than a tile; tiles and a rest both ways; whole tiles.
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(5, 40), (500, 801), (512, 384)])
@pytest.mark.parametrize("hidden_size", [7, 64])
def test_the_matmuls_leave_out_the_small_tiles_and_nothing_else(
    num_rows, vocab_size, hidden_size, triton_device
):
    dlogits, weights = draw(num_rows, vocab_size, triton_device)
    kept = dlogits.clone()
    assert filter_tiles_(kept, weights, "torch") is None
    active = active_tiles(dlogits, weights)
    assert active.numel() == 1 or 2 < active.sum() < active.numel() - 2
    for r in range(active.shape[0]):
        for s in range(active.shape[1]):
            tile = (slice(r * TILE, (r + 1) * TILE), slice(s * TILE, (s + 1) * TILE))
            is_large = bool((dlogits[tile].abs() > EPSILON * weights[tile[0], None]).any())
            assert bool(active[r, s]) == is_large
            assert torch.equal(kept[tile], dlogits[tile] if is_large else 0 * dlogits[tile])

    generator = torch.Generator().manual_seed(1)
    weight, hidden = (
        torch.randn(rows, hidden_size, generator=generator).to(triton_device)
        for rows in (vocab_size, num_rows)
    )
    grad_hidden = torch.full((num_rows, hidden_size), 9.0, device=triton_device)
    filtered_hidden_gradient_(grad_hidden, dlogits, weight, active)
    exact = kept.double() @ weight.double()
    torch.testing.assert_close(grad_hidden.double(), exact, rtol=1e-5, atol=1e-7)

    grad_weight = torch.full((vocab_size, hidden_size), 9.0, device=triton_device)
    filtered_weight_gradient_(grad_weight, dlogits, hidden, active, is_first=True)
    exact = kept.T.double() @ hidden.double()
    torch.testing.assert_close(grad_weight.double(), exact, rtol=1e-5, atol=1e-7)
    filtered_weight_gradient_(grad_weight, dlogits, hidden, active, is_first=False)
    torch.testing.assert_close(grad_weight.double(), 2 * exact, rtol=1e-5, atol=1e-7)


def test_what_is_not_a_number_is_kept(triton_device):
    dlogits = torch.zeros(3, 300, device=triton_device)
    dlogits[1, 200] = float("nan")
    active = active_tiles(dlogits, torch.ones(3, device=triton_device))
    assert active.tolist() == [[False, True, False]]


@pytest.mark.parametrize("form", ["one_read", "two_reads", "torch"])
def test_the_error_of_both_gradients_is_within_the_stated_bound(form, triton_device):
    # Peaked predictions: the words of a row are likely in one tile of the vocabulary only.
    num_rows, vocab_size, hidden_size = 200, 700, 32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator)
    hidden[:, 0] = 6.0
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * 0.3
    weight[:, 0] = -2.0
    weight[256:384, 0] = 0.0
    targets = torch.randint(256, 384, (num_rows,), generator=generator)
    targets[:3] = 600  # three surprises: their tile must stay
    weights = torch.rand(num_rows, generator=generator) + 0.5
    inputs = [x.to(triton_device) for x in (hidden, weight, targets, weights)]
    gradients = []
    for filter_gradients in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs[:2]]
        loss, _ = linear_cross_entropy(
            *leaves, *inputs[2:], softmax=form, filter_gradients=filter_gradients,
            chunk_bytes=4 * vocab_size * 128,
        )  # fmt: skip
        loss.backward()
        gradients.append((loss.detach(), *(leaf.grad.double() for leaf in leaves)))  # type: ignore
    (loss, exact_hidden, exact_weight), (filtered_loss, ours_hidden, ours_weight) = gradients
    assert loss == filtered_loss
    hidden, weight, _, weights = (x.double() for x in inputs)
    bound_hidden = EPSILON * weights[:, None] * weight.abs().sum(0)
    bound_weight = EPSILON * (weights[:, None] * hidden).abs().sum(0)
    hidden_error, weight_error = (
        (ours_hidden - exact_hidden).abs(),
        (ours_weight - exact_weight).abs(),
    )
    slack = 1e-5
    assert (hidden_error <= bound_hidden + slack).all()
    assert (weight_error <= bound_weight + slack).all()
    assert hidden_error.max() > 10 * slack and weight_error.max() > 10 * slack  # it did filter
    # Words that no tile was left out for are exact.
    torch.testing.assert_close(ours_weight[256:384], exact_weight[256:384], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_in_bf16_the_triton_matmuls_agree_with_plain_ones():
    dlogits, weights = draw(1000, 5000, torch.device("cuda"))
    dlogits = dlogits.bfloat16()
    active = active_tiles(dlogits, weights)
    kept = dlogits.clone()
    filter_tiles_(kept, weights, "torch")
    for hidden_size in (1024, 2560):
        weight = torch.randn(5000, hidden_size, device="cuda", dtype=torch.bfloat16)
        hidden = torch.randn(1000, hidden_size, device="cuda", dtype=torch.bfloat16)
        grad_hidden = torch.empty_like(hidden)
        filtered_hidden_gradient_(grad_hidden, dlogits, weight, active)
        exact = kept.double() @ weight.double()
        assert (grad_hidden - exact).norm() <= 2 * ((kept @ weight) - exact).norm()
        grad_weight = torch.empty(5000, hidden_size, device="cuda")
        for is_first, times in ((True, 1), (False, 2)):
            filtered_weight_gradient_(grad_weight, dlogits, hidden, active, is_first)
            exact = times * (kept.T.double() @ hidden.double())
            assert (grad_weight - exact).norm() <= 1e-5 * exact.norm()
