"""Multiply a tensor by a number that is on the device, at no cost where it is 1.

The upstream gradient of a loss is 1 as a rule. Whether it is, the host could only learn by waiting;
the kernel reads it and returns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch, run

BLOCK = 4096
MAX_PROGRAMS = 2048
"""Enough to fill any GPU, few enough that starting and ending them all takes microseconds."""


@torch.library.custom_op("longcot::scale_", mutates_args=("tensor",))
def scale_(
    tensor: Tensor,  # any shape and dtype, contiguous
    factor: Tensor,  # () fp32, on the same device
) -> None:
    """tensor *= factor, in place, the product in fp32."""
    assert tensor.is_contiguous()
    if tensor.device.type != "cuda":
        if factor != 1:
            tensor.mul_(factor)
    elif tensor.numel():
        run(scale_launch(tensor, factor))


@scale_.register_fake
def _(tensor, factor):
    return None


def scale_launch(tensor: Tensor, factor: Tensor) -> Launch:
    """What `scale_` launches on CUDA."""
    grid = (min(triton.cdiv(tensor.numel(), BLOCK), MAX_PROGRAMS),)
    arguments = (tensor, factor, tensor.numel())
    return Launch(_scale_kernel, grid, arguments, {"BLOCK": BLOCK, "num_warps": 4})


@triton.jit
def _scale_kernel(tensor_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        for block in range(start, numel, tl.num_programs(0) * BLOCK):
            offsets = block + tl.arange(0, BLOCK)
            mask = offsets < numel
            values = tl.load(tensor_ptr + offsets, mask=mask).to(tl.float32) * factor
            tl.store(tensor_ptr + offsets, values.to(tensor_ptr.dtype.element_ty), mask=mask)
