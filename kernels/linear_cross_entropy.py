"""Cross-entropy of a linear head, without ever holding the logits of more than a chunk of rows.

For hidden rows h, head W and target y:    loss = sum_t w_t * (logsumexp(W h_t) - W[y_t] h_t) Its
gradients need only the softmax p:     dlogits = w * (p - onehot(y)),  dh = dlogits W,  dW =
dlogits^T h

So both gradients are made in the forward pass, while a chunk's logits are at hand: three matmuls in
all and no recomputation. Rows without a target are dropped before the first of them. The head
gradient is summed over chunks in fp32 whatever the dtypes, because in bf16 its rounding error grows
with the number of chunks.

T packed tokens, N of them with a target, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target of a row that has none, as in `torch.nn.functional.cross_entropy`."""

DEFAULT_CHUNK_BYTES = 512 * 2**20
"""fp32 logits held at once; a chunk is never less than one row."""


def linear_cross_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D), plain: gathered, not a DTensor
    targets: Tensor,  # (T,) int64, IGNORE_INDEX where there is none
    weights: Tensor | None = None,  # (T,) fp32, multiplies each row's loss
    *,
    num_targets: int | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, int]:
    """Weighted sum of the target rows' losses, () fp32, and the number of those rows.

    Args:
        num_targets: how many targets there are, where the caller knows: spares the GPU a wait for
            the count.

    Raises:
        ValueError: shapes that do not belong together, or a target outside the vocabulary (checked
            on CPU).
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (T, D) and "
            "(V, D)"
        )
    for name, rows in (("targets", targets), ("weights", weights)):
        if rows is not None and rows.shape != hidden.shape[:1]:
            raise ValueError(
                f"{name} {tuple(rows.shape)} must have one entry for each row of hidden "
                f"{tuple(hidden.shape)}"
            )
    has_target = targets != IGNORE_INDEX
    if num_targets is None:
        num_targets = int(has_target.sum())
    rows_N = torch.nonzero_static(has_target, size=num_targets).squeeze(1)
    targets_N = targets[rows_N]
    if targets.device.type == "cpu" and num_targets:
        low, high = int(targets_N.min()), int(targets_N.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"targets run from {low} to {high}, outside the vocabulary of {weight.shape[0]}"
            )
    weights_N = None if weights is None else weights[rows_N].float()
    chunk_rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    loss_sum = _LinearCrossEntropy.apply(hidden[rows_N], weight, targets_N, weights_N, chunk_rows)
    return loss_sum, num_targets


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """The same sum by autograd from full logits, in the dtype of `hidden`; the truth in tests."""
    losses = torch.nn.functional.cross_entropy(
        hidden @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    return (losses if weights is None else losses * weights).sum(), int(
        (targets != IGNORE_INDEX).sum()
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Rows that all have a target; saves the two gradients, ready but for the upstream factor."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        targets: Tensor,  # (N,)
        weights: Tensor | None,  # (N,) fp32
        chunk_rows: int,
    ) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad[:2])
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            target = targets[rows, None]
            logits = (hidden[rows] @ weight.T).float()
            normalizer = logits.logsumexp(1, keepdim=True)
            loss = (normalizer - logits.gather(1, target)).squeeze(1)
            loss_sum += loss.sum() if weights is None else (loss * weights[rows]).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            grad_logits = logits.sub_(normalizer).exp_()
            grad_logits.scatter_add_(1, target, torch.full_like(grad_logits[:, :1], -1.0))
            if weights is not None:
                grad_logits *= weights[rows, None]
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if hidden.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
            else:
                grad_weight += grad_logits.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss_sum

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * upstream, grad_weight * upstream, None, None, None
