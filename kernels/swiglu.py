"""SwiGLU: silu(gate) * up, between a block's two feed-forward matmuls (Shazeer, 2020)."""

from torch import Tensor
from torch.nn import functional


def swiglu(
    gate: Tensor,  # (..., F)
    up: Tensor,  # (..., F)
) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(gate) * up
