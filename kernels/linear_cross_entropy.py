"""Cross-entropy of a linear head, without ever holding the logits of more than a chunk of rows.

For hidden rows h, head W, target y and row weight w:

    loss = sum_t w_t * (logsumexp(W h_t) - W[y_t] h_t)
    dlogits_t = w_t * (softmax(W h_t) - onehot(y_t))      dh = dlogits W      dW = dlogits^T h

The gradients need nothing but the logits, so both are made in the forward pass, while a chunk's
logits are at hand: three matmuls in all and no recomputation. Rows without a target are dropped
before the first of them, in stable order. dlogits takes the place of the logits, in their dtype,
rounded once. The head gradient is summed over chunks in fp32 whatever the dtypes, because in bf16
its rounding error grows with the number of chunks. There are no atomics: the same inputs and chunk
size give the same bits.

T packed tokens, N of them with a target, C rows of a chunk, D hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from .filtered_matmul import filter_tiles_, filtered_hidden_gradient_, filtered_weight_gradient_
from .scaling import scale_
from .softmax_gradient import cached_form, softmax_gradient_

IGNORE_INDEX = -100
"""Target of a row that has none, as in `torch.nn.functional.cross_entropy`."""

DEFAULT_CHUNK_BYTES = 2_500_000_000
"""Logits held at once: 8,192 rows of 151,936 in bf16. Few, large chunks keep the matmuls at full
rate, and the passes over the fp32 head gradient few."""

ROW_MULTIPLE = 128
"""Chunks are multiples of this many rows where the budget allows: a tile of a GPU's matmul."""

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class TokenStatistics(NamedTuple):
    """What the same pass over the logits knows of each token; zero where there is no target."""

    log_probabilities: Tensor  # (T,) fp32, of the target
    entropies: Tensor  # (T,) fp32, nats, of the predicted distribution
    correct: Tensor  # (T,) bool: no word is likelier than the target


def linear_cross_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D), plain: gathered, not a DTensor
    targets: Tensor,  # (T,) int64, IGNORE_INDEX where there is none
    weights: Tensor | None = None,  # (T,) fp32, multiplies each row's loss
    *,
    num_targets: int | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    softmax: str = "auto",
    filter_gradients: bool = False,
    grad_weight: Tensor | None = None,  # (V, D) fp32
) -> tuple[Tensor, int]:
    """Weighted sum of the target rows' losses, () fp32, and the number of those rows.

    The graph of the result can be used once: its gradients exist when this returns, and the
    backward pass hands them over. Put a mean's divisor into `weights`: then the upstream gradient
    is 1, and neither gradient is gone over again. The head gradient is fp32; autograd rounds it to
    the dtype of `weight`, unless `weight` is a leaf whose `grad_dtype` is fp32.

    Args:
        num_targets: how many targets there are, where the caller knows; otherwise the host waits
            for the device to count them.
        chunk_bytes: budget for the logits of a chunk, which has one row at least.
        softmax: `auto`, or a form of `softmax_gradient.choose_form`.
        filter_gradients: APPROXIMATE. Leave tiles of dlogits out of both gradients where no entry
            is above `filtered_matmul.EPSILON` times its row's weight; the loss stays exact.
        grad_weight: the head gradient is added to this in the forward pass, and autograd gives
            `weight` none: later micro-steps need no second buffer. The upstream gradient must be 1.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, a DTensor, no rows, a
            target outside the vocabulary, a wrong `num_targets`. The last two stop the process on
            CUDA, by a device-side assertion, so that nobody has to wait for them.
        RuntimeError: the graph is used again; with `grad_weight`, an upstream gradient other than 1
            (on CUDA an assertion), or a recomputation inside a backward pass.
    """
    loss_sum, num_targets, _ = _run(
        hidden, weight, targets, weights, num_targets, chunk_bytes, softmax, filter_gradients,
        grad_weight, False,
    )  # fmt: skip
    return loss_sum, num_targets


def linear_cross_entropy_with_statistics(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (T,) int64
    weights: Tensor | None = None,  # (T,) fp32
    *,
    num_targets: int | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    softmax: str = "auto",
    filter_gradients: bool = False,
    grad_weight: Tensor | None = None,  # (V, D) fp32
) -> tuple[Tensor, int, TokenStatistics]:
    """`linear_cross_entropy`, and each token's statistics from the same read of the logits.

    No gradient flows through the statistics. Arguments and errors are those of the other.
    """
    return _run(
        hidden, weight, targets, weights, num_targets, chunk_bytes, softmax, filter_gradients,
        grad_weight, True,
    )  # fmt: skip


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """The same sum by autograd from full logits, as models compute it; the truth in float64."""
    logits = hidden @ weight.T
    losses = torch.nn.functional.cross_entropy(
        logits.to(_sum_dtype(logits)), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    loss_sum = (losses if weights is None else losses * weights).sum()
    return loss_sum, int((targets != IGNORE_INDEX).sum())


def chunk_rows(num_rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows of a chunk: as few chunks as the budget allows, all of almost the same size."""
    most = max(1, chunk_bytes // row_bytes)
    if num_rows <= most:
        return num_rows
    multiple = ROW_MULTIPLE if most >= ROW_MULTIPLE else 1
    num_chunks = -(-num_rows // (most - most % multiple))
    even = -(-num_rows // num_chunks)
    return -(-even // multiple) * multiple


def _run(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None,
    num_targets: int | None, chunk_bytes: int, softmax: str, filter_gradients: bool,
    grad_weight: Tensor | None, with_statistics: bool,
) -> tuple[Tensor, int, TokenStatistics]:  # fmt: skip
    _check(hidden, weight, targets, weights, grad_weight, chunk_bytes)
    if num_targets is None:
        num_targets = int((targets != IGNORE_INDEX).sum())  # the host waits for the device
    if weights is None:
        weights = torch.ones(targets.shape, device=hidden.device)
    loss_sum, *statistics = _LinearCrossEntropy.apply(
        hidden, weight, targets.long(), weights.to(_sum_dtype(hidden)), num_targets, chunk_bytes,
        softmax, filter_gradients, grad_weight, with_statistics,
    )  # fmt: skip
    return loss_sum, num_targets, TokenStatistics(*statistics)


class _LinearCrossEntropy(torch.autograd.Function):
    """Holds the two gradients from the forward to the backward pass, and gives them away once."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        results = _linear_cross_entropy(*inputs, needs_hidden, needs_weight)
        loss_sum, grad_hidden, grad_weight, log_probabilities, entropies, correct = results
        # Attributes, not saved tensors: backward can let go of them, and a gradient that nobody
        # else holds becomes `.grad` without a copy.
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.adds_in_forward = inputs[8] is not None
        ctx.mark_non_differentiable(log_probabilities, entropies, correct)
        return loss_sum, log_probabilities, entropies, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *statistics: Tensor):  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError(
                "the graph of linear_cross_entropy was used already: its gradients are made once, "
                "in the forward pass, so call it again for another backward pass"
            )
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        if ctx.adds_in_forward:
            torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                upstream == 1, "with grad_weight, the upstream gradient must be 1: put factors "
                "into `weights`",
            )  # fmt: skip
            needs_weight = False
        else:
            scale_(grad_weight, upstream)
        scale_(grad_hidden, upstream)
        gradients = grad_hidden if needs_hidden else None, grad_weight if needs_weight else None
        return *gradients, *[None] * 8


@torch.library.custom_op("longcot::linear_cross_entropy", mutates_args=("grad_weight",))
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    num_targets: int,
    chunk_bytes: int,
    softmax: str,
    filter_gradients: bool,
    grad_weight: Tensor | None,
    with_statistics: bool,
    needs_grad_hidden: bool,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, both gradients, statistics; what is not asked for is empty. Opaque to torch.compile."""
    if grad_weight is not None:
        _refuse_recomputation()
    vocab_size = weight.shape[0]
    form, _ = cached_form(softmax, vocab_size, hidden.device)
    rows = _rows_with_target(targets, num_targets, vocab_size)
    targets_N, weights_N = (x if rows is None else x[rows] for x in (targets, weights))
    # Kept rows are copied together, and a chunk's gradient takes their place once they are used.
    inputs = hidden if rows is None else hidden[rows]
    grad_inputs = hidden.new_empty(hidden.shape) if rows is None and needs_grad_hidden else inputs
    adds_from_start = grad_weight is not None
    if grad_weight is None:
        shape = weight.shape if needs_grad_weight else (0,)
        make = weight.new_empty if num_targets else weight.new_zeros
        grad_weight = make(shape, dtype=_sum_dtype(weight))
    losses, entropies = weights.new_zeros(2, num_targets)
    correct = torch.zeros_like(losses, dtype=torch.bool)

    step = chunk_rows(num_targets, vocab_size * hidden.element_size(), chunk_bytes)
    logits = slab = hidden.new_empty(step, vocab_size)
    for start in range(0, num_targets, max(1, step)):
        chunk = slice(start, min(start + step, num_targets))
        logits = torch.mm(inputs[chunk], weight.T, out=slab[: chunk.stop - start])
        results = softmax_gradient_(
            logits, targets_N[chunk], weights_N[chunk], form,
            with_gradient=needs_grad_hidden or needs_grad_weight, with_statistics=with_statistics,
        )  # fmt: skip
        losses[chunk] = results.losses
        if results.entropies is not None and results.correct is not None:
            entropies[chunk], correct[chunk] = results.entropies, results.correct
        tiles = filter_tiles_(logits, weights_N[chunk], form) if filter_gradients else None
        if needs_grad_weight:
            is_first = start == 0 and not adds_from_start
            _weight_gradient_(grad_weight, logits, inputs[chunk], is_first, tiles)
        if needs_grad_hidden:  # last: it may overwrite the inputs
            _hidden_gradient_(grad_inputs[chunk], logits, weight, tiles)
    del logits, slab  # before grad_hidden may be laid out anew

    loss_sum = (losses * weights_N).sum()
    grad_hidden = _spread(grad_inputs, rows, hidden) if needs_grad_hidden else hidden.new_empty(0)
    if adds_from_start:
        grad_weight = weight.new_empty(0)  # an output may not be an input
    log_probabilities, entropies, correct = (
        _spread(x, rows, targets) if with_statistics else x.new_empty(0)
        for x in (losses.neg_(), entropies, correct)
    )
    return loss_sum, grad_hidden, grad_weight, log_probabilities, entropies, correct


@_linear_cross_entropy.register_fake
def _(
    hidden, weight, targets, weights, num_targets, chunk_bytes, softmax, filter_gradients,
    grad_weight, with_statistics, needs_grad_hidden, needs_grad_weight,
):  # fmt: skip
    makes_weight = needs_grad_weight and grad_weight is None
    rows = targets.shape if with_statistics else (0,)
    return (
        weights.new_empty(()),
        hidden.new_empty(hidden.shape if needs_grad_hidden else (0,)),
        weight.new_empty(weight.shape if makes_weight else (0,), dtype=_sum_dtype(weight)),
        weights.new_empty(rows),
        weights.new_empty(rows),
        weights.new_empty(rows, dtype=torch.bool),
    )


def _refuse_recomputation() -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "linear_cross_entropy with grad_weight was called inside a backward pass, where a "
            "recomputation would add the head gradient twice: keep the head out of checkpointing"
        )


def _rows_with_target(
    targets: Tensor, num_targets: int, vocab_size: int
) -> Tensor | None:  # (N,) int64
    """The rows that have a target, in order; None where all have.

    Raises:
        ValueError: on a CPU, where checking costs no wait: see `linear_cross_entropy`.
    """
    has_target = targets != IGNORE_INDEX
    is_word = (targets >= 0) & (targets < vocab_size)
    if targets.device.type == "cpu":
        if int(has_target.sum()) != num_targets:
            raise ValueError(
                f"num_targets is {num_targets}, but {int(has_target.sum())} targets are not "
                f"{IGNORE_INDEX}: count those that are not, or leave num_targets out"
            )
        if not torch.equal(has_target, is_word):
            bad = targets[has_target & ~is_word]
            raise ValueError(
                f"targets run from {int(bad.min())} to {int(bad.max())} outside the vocabulary of "
                f"{vocab_size}: they must be in [0, {vocab_size}), or {IGNORE_INDEX} for none"
            )
    else:
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            (has_target == is_word).all() & (has_target.sum() == num_targets),
            "targets are outside the vocabulary, or num_targets is not their number",
        )
    if num_targets == len(targets):
        return None
    return torch.nonzero_static(has_target, size=num_targets).squeeze(1)


def _weight_gradient_(
    grad_weight: Tensor,  # (V, D) fp32
    dlogits: Tensor,  # (C, V)
    hidden: Tensor,  # (C, D)
    is_first: bool,
    tiles: Tensor | None,
) -> None:
    """grad_weight += dlogits^T hidden, or = where it `is_first`, in fp32 throughout."""
    if tiles is not None:
        filtered_weight_gradient_(grad_weight, dlogits, hidden, tiles, is_first)
        return
    options: dict[str, Any] = {"out": grad_weight}
    if dlogits.dtype != grad_weight.dtype:
        if dlogits.is_cuda:
            options["out_dtype"] = grad_weight.dtype
        else:  # a CPU's matmul has no such output
            dlogits, hidden = dlogits.to(grad_weight.dtype), hidden.to(grad_weight.dtype)
    if is_first:
        torch.mm(dlogits.T, hidden, **options)
    else:
        torch.addmm(grad_weight, dlogits.T, hidden, **options)


def _hidden_gradient_(
    grad_hidden: Tensor,  # (C, D), overwritten
    dlogits: Tensor,  # (C, V)
    weight: Tensor,  # (V, D)
    tiles: Tensor | None,
) -> None:
    """grad_hidden = dlogits weight."""
    if tiles is None:
        torch.mm(dlogits, weight, out=grad_hidden)
    else:
        filtered_hidden_gradient_(grad_hidden, dlogits, weight, tiles)


def _spread(values: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Rows of `values` (N, ...) at their places among zeros, as many as `like` has."""
    if rows is None:
        return values
    return values.new_zeros(len(like), *values.shape[1:]).index_copy_(0, rows, values)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or float64 where the inputs are."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    grad_weight: Tensor | None,
    chunk_bytes: int,
) -> None:
    others = {"weight": weight, "targets": targets, "weights": weights, "grad_weight": grad_weight}
    given = {"hidden": hidden} | {name: x for name, x in others.items() if x is not None}
    for name, tensor in given.items():
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} is a DTensor, sharded over ranks: gather it first, under FSDP2 by "
                "unshard() of its module or inside that module's forward"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}: move one")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (T, D) and "
            "(V, D)"
        )
    if not hidden.shape[0] or not weight.shape[0]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} or weight {tuple(weight.shape)} is empty: at least one "
            "row of each is needed"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: both must be bfloat16, float32 or "
            "float64 (in float16 the small gradients of a mean would vanish)"
        )
    for name, rows in (("targets", targets), ("weights", weights)):
        if rows is not None and rows.shape != hidden.shape[:1]:
            raise ValueError(
                f"{name} {tuple(rows.shape)} must have one entry for each row of hidden "
                f"{tuple(hidden.shape)}"
            )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets are {targets.dtype}: they must be int64 or int32")
    if grad_weight is not None and (
        grad_weight.shape != weight.shape
        or grad_weight.dtype != _sum_dtype(weight)
        or grad_weight.requires_grad
    ):
        raise ValueError(
            f"grad_weight {tuple(grad_weight.shape)} {grad_weight.dtype} must have the shape of "
            f"weight {tuple(weight.shape)}, be {_sum_dtype(weight)} and require no gradient"
        )
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}: it must be at least 1")
