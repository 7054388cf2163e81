"""Where the ops of liger-kernel come from: found by name on first use, not on import.

Only a CUDA device needs the package, so nothing here is imported before a CUDA tensor asks for it.
"""

import functools
import importlib
import importlib.util
from typing import Any


@functools.cache
def liger_op(module: str, name: str) -> Any:
    """`name` of liger_kernel.ops.`module`.

    Of that module and not of `liger_kernel.ops`, which swaps in other implementations where the
    environment variable LIGER_KERNEL_IMPL asks for them.

    Raises:
        ValueError: liger-kernel is not installed.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError(
            "CUDA tensors need liger-kernel, which is not installed: run `make install` on the "
            "machine with the GPU, or `pip install 'liger-kernel>=0.8.5'`"
        )
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
