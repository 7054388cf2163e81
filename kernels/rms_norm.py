"""RMSNorm: x / sqrt(mean(x^2) + epsilon) * weight, the mean in fp32 (Zhang and Sennrich, 2019).

    add_rms_norm   h = x + delta and the norm of h: the residual stream is read and written once

On CUDA liger-kernel computes both. `_NOT_IN_PLACE`: its backward pass can write the gradient of x
over the gradient of the output, which autograd may have handed to somebody else too (an addition
gives both of its inputs one and the same tensor). The price is one buffer, held for a moment.

D size of the last dimension, N product of the others.
"""

from torch import Tensor
from torch.nn import functional

from .liger import liger_op

# Rounds x / rms to the dtype of x before the weight, as the Llama and Qwen of transformers do.
_CASTING = "llama"
_NO_OFFSET = 0.0
_NOT_IN_PLACE = False
_ROWS_BY_SIZE = None  # one row per program, or several where the rows are many and short


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    epsilon: float,
) -> Tensor:  # (..., D)
    """Normalise the last dimension."""
    if not x.is_cuda:
        return rms_norm_reference(x, weight, epsilon)
    norm = liger_op("rms_norm", "LigerRMSNormFunction")
    return norm.apply(x, weight, epsilon, _NO_OFFSET, _CASTING, _NOT_IN_PLACE, _ROWS_BY_SIZE)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm` in plain torch."""
    return functional.rms_norm(x, weight.shape, weight, epsilon)


def add_rms_norm(
    x: Tensor,  # (..., D) the residual stream
    delta: Tensor,  # (..., D) what a block adds to it
    weight: Tensor,  # (D,)
    epsilon: float,
) -> tuple[Tensor, Tensor]:  # each (..., D)
    """x + delta, and its norm."""
    if not x.is_cuda:
        return add_rms_norm_reference(x, delta, weight, epsilon)
    norm = liger_op("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    normed, total = norm.apply(x, delta, weight, epsilon, _NO_OFFSET, _CASTING, _NOT_IN_PLACE)
    return total, normed


def add_rms_norm_reference(
    x: Tensor, delta: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    total = x + delta
    return total, rms_norm_reference(total, weight, epsilon)
