"""SwiGLU: silu(gate) * up, between a block's two feed-forward matmuls (Shazeer, 2020).

Gate and up are the halves of one matmul's output and are read where they are: taking them apart
would copy both, on a GPU 4 F values a token in each direction. On CUDA liger-kernel computes it.

F feed-forward size.
"""

from torch import Tensor
from torch.nn import functional

from .liger import liger_op


def swiglu(
    gate_up: Tensor,  # (..., 2 F): gate, then up
) -> Tensor:  # (..., F)
    """silu(gate) * up."""
    if not gate_up.is_cuda:
        return swiglu_reference(gate_up)
    return _swiglu_liger(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """`swiglu` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _swiglu_liger(gate_up: Tensor) -> Tensor:
    # Not LigerSiLUMulFunction: it writes the gradients over what it saved, which may be the
    # caller's, and is wrong without a word in a second backward pass. Nor this one in place.
    is_in_place = False
    function = liger_op("swiglu", "LigerFusedGateUpSiLUMulFunction")
    # In rows: its gradient of a tensor of three dimensions has two (liger-kernel 0.8.5).
    output = function.apply(gate_up.flatten(0, -2), is_in_place)
    return output.unflatten(0, gate_up.shape[:-1])
