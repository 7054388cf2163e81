"""A Triton launch as a value: run it here, or compile it for a GPU that is not there."""

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """One call of a kernel."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """The kernel's constants, by name, and num_warps, num_stages, num_ctas."""


ALL_OPTIONS = {"enable_fp_fusion": True}
"""Options of every kernel. Triton 3.10 stops fusing products and sums unless told to."""


def run(launch: Launch) -> None:
    """Launch it on the current stream."""
    launch.kernel[launch.grid](*launch.arguments, **launch.options, **ALL_OPTIONS)
