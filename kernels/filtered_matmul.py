"""APPROXIMATE head gradients: matmuls that leave out tiles of dlogits whose entries are all small.

Of a trained model's predicted probabilities nearly all are far below what bf16 resolves next to 1.
A tile of dlogits, TILE rows by TILE words, is left out where for each of its entries

    |dlogits_ij| <= EPSILON |w_i|,    that is |p_ij - [j = y_i]| <= EPSILON

so the two gradients differ from the exact ones by at most

    |dh_id - exact| <= EPSILON |w_i| sum_j |W_jd|      |dW_jd - exact| <= EPSILON sum_i |w_i h_id|

over the words j or the rows i of the tiles left out. The idea is that of Cut Cross-Entropy (Wijmans
et al., 2025), which decides it while recomputing the logits. A word that is rarely likely gets less
than its due, always in the same direction: hence off by default.

C rows of a chunk, V vocabulary, D hidden size, R = ceil(C / TILE), S = ceil(V / TILE).
"""

# Triton's own types are known to its compiler only.
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch, run
from .softmax_gradient import Form

EPSILON = 2.0**-12
"""A sixteenth of bf16's spacing just below 1 (2^-8)."""
TILE = 128


def filter_tiles_(
    dlogits: Tensor,  # (C, V)
    weights: Tensor,  # (C,) fp32
    form: Form,
) -> Tensor | None:  # (R, S) bool
    """The tiles to keep, for the two filtered matmuls; or None where plain ones are to follow.

    In the plain torch form the other tiles are set to zero, in place, and nothing is gained.
    """
    if form != "torch":
        return active_tiles(dlogits, weights)
    bounds = EPSILON * weights.abs()
    for start in range(0, dlogits.shape[0], TILE):
        rows = dlogits[start : start + TILE]
        for tile in rows.split(TILE, dim=1):
            if (tile.abs() <= bounds[start : start + TILE, None]).all():
                tile.zero_()
    return None


def active_tiles(dlogits: Tensor, weights: Tensor) -> Tensor:  # (R, S) bool
    """Which tiles have an entry above the bound."""
    shape = [triton.cdiv(size, TILE) for size in dlogits.shape]
    active = torch.empty(shape, dtype=torch.bool, device=dlogits.device)
    run(active_tiles_launch(dlogits, weights, active))
    return active


def filtered_hidden_gradient_(
    grad_hidden: Tensor,  # (C, D), overwritten
    dlogits: Tensor,  # (C, V)
    weight: Tensor,  # (V, D)
    active: Tensor,  # (R, S) bool
) -> None:
    """grad_hidden = dlogits weight over the active tiles, summed in fp32."""
    counts, places = _lists(active)
    run(matmul_launch(grad_hidden, dlogits, weight, counts, places, False, True))


def filtered_weight_gradient_(
    grad_weight: Tensor,  # (V, D) fp32
    dlogits: Tensor,  # (C, V)
    hidden: Tensor,  # (C, D)
    active: Tensor,  # (R, S) bool
    is_first: bool,
) -> None:
    """grad_weight += dlogits^T hidden over the active tiles, or = where it `is_first`."""
    counts, places = _lists(active.T.contiguous())
    run(matmul_launch(grad_weight, dlogits, hidden, counts, places, True, is_first))


def _lists(active: Tensor) -> tuple[Tensor, Tensor]:  # (R,) and (R, S), int32
    """Of each row of tiles, how many are active and which, in order; without a host sync."""
    places = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return active.sum(1, dtype=torch.int32), places.to(torch.int32)


def active_tiles_launch(dlogits: Tensor, weights: Tensor, active: Tensor) -> Launch:
    """What `active_tiles` launches."""
    rows, columns = active.shape
    arguments = (dlogits, weights, active, *dlogits.shape, dlogits.stride(0), columns)
    options = {"EPSILON": EPSILON, "TILE": TILE, "num_warps": 8}
    return Launch(_active_tiles_kernel, (rows, columns), arguments, options)


def matmul_launch(
    output: Tensor,  # (M, D)
    dlogits: Tensor,  # (M, K), or (K, M) if transposed
    other: Tensor,  # (K, D)
    counts: Tensor,
    places: Tensor,
    is_transposed: bool,
    is_first: bool,
) -> Launch:
    """output = dlogits other, or += where it is not `is_first`, over the active tiles."""
    num_rows, hidden_size = output.shape
    # fp32 is for checking: its products are no tensor-core work, and take many more registers.
    widest, block_k = (256, 64) if dlogits.element_size() == 2 else (32, 32)
    if not is_first:
        widest //= 2  # the addresses of what it adds to take registers throughout
    block_d = min(widest, max(16, triton.next_power_of_2(hidden_size)))
    arguments = (
        output, dlogits, other, counts, places, num_rows, len(other), hidden_size,
        output.stride(0), dlogits.stride(0), other.stride(0), places.shape[1],
    )  # fmt: skip
    options = {
        "IS_TRANSPOSED": is_transposed, "IS_FIRST": is_first,
        "TILE": TILE, "BLOCK_D": block_d, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3,
    }  # fmt: skip
    grid = (len(counts), triton.cdiv(hidden_size, block_d))
    return Launch(_filtered_matmul_kernel, grid, arguments, options)


@triton.jit
def _active_tiles_kernel(
    dlogits_ptr, weights_ptr, active_ptr, C, V, row_stride, S,
    EPSILON: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = (rows < C)[:, None] & (columns < V)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    values = tl.load(dlogits_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    bounds = EPSILON * tl.abs(tl.load(weights_ptr + rows, mask=rows < C, other=0.0))
    is_small = tl.abs(values) <= bounds[:, None]  # not true of NaN, which is thus kept
    is_active = tl.max(tl.max(tl.where(is_small, 0, 1), 1), 0)
    tl.store(active_ptr + tl.program_id(0) * S + tl.program_id(1), is_active > 0)


@triton.jit
def _filtered_matmul_kernel(
    output_ptr, dlogits_ptr, other_ptr, counts_ptr, places_ptr,
    M, K, D,
    output_stride, dlogits_stride, other_stride, places_stride,
    IS_TRANSPOSED: tl.constexpr, IS_FIRST: tl.constexpr,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the output, (TILE, BLOCK_D), over the active tiles of its rows."""
    tile_row = tl.program_id(0)
    count = tl.load(counts_ptr + tile_row)
    if IS_FIRST or count > 0:
        rows = (tile_row * TILE + tl.arange(0, TILE)).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        output_offsets = rows[:, None] * output_stride + columns[None, :]
        output_mask = (rows < M)[:, None] & (columns < D)[None, :]
        if IS_FIRST:
            total = tl.zeros((TILE, BLOCK_D), tl.float32)
        else:  # now rather than when the sum is done: there are no registers for both
            total = tl.load(output_ptr + output_offsets, mask=output_mask, other=0.0)
        for step in range(0, count * (TILE // BLOCK_K)):
            place = tl.load(places_ptr + tile_row * places_stride + step // (TILE // BLOCK_K))
            k = place * TILE + step % (TILE // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
            k = k.to(tl.int64)
            mask = (rows < M)[:, None] & (k < K)[None, :]
            if IS_TRANSPOSED:  # A[m, k] is dlogits[k, m], contiguous along m
                a_offsets = k[None, :] * dlogits_stride + rows[:, None]
            else:
                a_offsets = rows[:, None] * dlogits_stride + k[None, :]
            a = tl.load(dlogits_ptr + a_offsets, mask=mask, other=0.0)
            b_mask = (k < K)[:, None] & (columns < D)[None, :]
            b = tl.load(
                other_ptr + k[:, None] * other_stride + columns[None, :], mask=b_mask, other=0.0
            )
            # fp32 inputs in fp32, not TF32; bf16 has only one way
            total = tl.dot(a, b, total, input_precision="ieee")
        tl.store(
            output_ptr + output_offsets, total.to(output_ptr.dtype.element_ty), mask=output_mask
        )
