"""Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors, in this process.

Triton decides it where a kernel is defined, its own library's included, hence before any import of
triton. The variable is taken back at once: processes that tests start must not inherit it.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

HAS_GPU = torch.cuda.is_available()
TRITON_MODULES = (
    "triton.experimental.gluon",  # imported by the interpreter's first launch, which is too late
    "longcot.kernels.softmax_gradient",
    "longcot.kernels.scaling",
    "longcot.kernels.filtered_matmul",
    "liger_kernel.ops.rope",
    "liger_kernel.ops.swiglu",
)

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    for module in TRITON_MODULES:
        importlib.import_module(module)
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request):
    """Where Triton kernels run: on CPU tensors in the interpreter, fp32 only, or on a GPU."""
    if request.param == "cuda":
        return torch.device("cuda")
    if HAS_GPU:
        pytest.skip("one process has either the interpreter or the compiler, and there is a GPU")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """The only process of a group of one, as in training without torchrun."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    with contextlib.suppress(AssertionError):
        dist.destroy_process_group()
