"""Compile the Triton kernels for GPUs that are not there, and read what they need of them.

The launches are those of the ops, on tensors without memory, so what is compiled is what a GPU
would run: Triton specialises on dtypes and on divisibility by 16. A stand-in for the driver tells
it which GPU to compile for. Registers and spills are what Triton's own ptxas says of its PTX.
"""

# Triton's driver is untyped, and its `get_ptxas` differs between versions.
# pyright: reportIncompatibleMethodOverride=false, reportCallIssue=false

import functools
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import compiler as nvidia
from triton.runtime.driver import driver

from .filtered_matmul import TILE, active_tiles_launch, matmul_launch
from .launching import ALL_OPTIONS, Launch
from .scaling import scale_launch
from .softmax_gradient import RowResults, one_read_obstacle, softmax_launch

VOCABULARY_SIZES = (151_936, 152_064, 128_256, 92_544, 32_768)
HIDDEN_SIZES = (1536, 2048, 2560, 3584, 4096, 5120, 6144)
"""Both are of the bases that the trainer knows."""
CHUNK_ROWS = 8192

CAPABILITIES = (80, 90, 100)
SHARED_BYTES_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory of one thread block (CUDA C++ programming guide, compute capabilities)."""
REGISTER_LIMIT = 65536
"""Registers of one streaming multiprocessor, which a thread block cannot exceed."""
SPILL_BYTES_LIMIT = 64
"""A register or two kept in local memory hide behind the traffic; more cost time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one compiled kernel takes."""

    binary: str
    """Hash of what it was compiled from: launches that share it are one binary."""
    registers: int  # of a thread
    spill_bytes: int  # of a thread, the larger of what it stores and loads
    shared_bytes: int  # of a thread block
    num_warps: int  # of a thread block
    num_ctas: int  # thread blocks of a cluster

    def obstacles(self, capability: int) -> list[str]:
        """Why such a kernel must not be picked for this chip; empty where it may."""
        found = []
        if self.spill_bytes > SPILL_BYTES_LIMIT:
            found.append(f"spills {self.spill_bytes} bytes, more than {SPILL_BYTES_LIMIT}")
        if self.shared_bytes > SHARED_BYTES_LIMIT[capability]:
            limit = SHARED_BYTES_LIMIT[capability]
            found.append(f"needs {self.shared_bytes} bytes of shared memory, sm_{capability} has "
                         f"{limit}")  # fmt: skip
        block_registers = self.registers * self.num_warps * 32
        if block_registers > REGISTER_LIMIT:
            found.append(f"a block needs {block_registers} registers of {REGISTER_LIMIT}")
        return found


def compile_for(capability: int, launch: Launch) -> Resources:
    """Compile for sm_`capability`; a fraction of a second, less when Triton has it cached.

    Raises:
        RuntimeError: Triton or ptxas refuses the kernel.
    """
    driver.set_active(_AbsentGPU(capability))
    try:
        options = launch.options | ALL_OPTIONS
        compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **options)
    finally:
        if torch.cuda.is_available():  # without a GPU there is no driver to go back to
            driver.reset_active()
    registers, spill_bytes = _ptxas_figures(compiled.asm["ptx"], capability)
    return Resources(
        binary=compiled.hash,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        num_warps=launch.options["num_warps"],
        num_ctas=launch.options.get("num_ctas", 1),
    )


def launches(capability: int) -> Iterator[tuple[str, Launch]]:
    """Every launch that can be picked on sm_`capability` for the known bases, with a name."""
    for vocab_size in VOCABULARY_SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.empty(CHUNK_ROWS, vocab_size, dtype=dtype, device="meta")
            name = f"V={vocab_size} {str(dtype).removeprefix('torch.')}"
            yield from _softmax_launches(capability, name, logits)
            for hidden_size in HIDDEN_SIZES:
                yield from _head_launches(f"{name} D={hidden_size}", logits, hidden_size)


def _softmax_launches(
    capability: int, name: str, logits: torch.Tensor
) -> Iterator[tuple[str, Launch]]:
    rows = torch.empty(len(logits), device="meta")
    targets = rows.to(torch.int64)
    has_obstacle = one_read_obstacle(logits.shape[1], divmod(capability, 10))
    for form in ("two_reads",) if has_obstacle else ("one_read", "two_reads"):
        for with_gradient in (True, False):
            for with_statistics in (False, True):
                extra = (rows, rows.bool()) if with_statistics else (None, None)
                words = ["gradient"] * with_gradient + ["statistics"] * with_statistics
                results = RowResults(rows, *extra)
                yield (
                    f"softmax {form} {name} {'+'.join(words) or 'loss'}",
                    softmax_launch(logits, targets, rows, results, form, with_gradient),
                )


def _head_launches(
    name: str, logits: torch.Tensor, hidden_size: int
) -> Iterator[tuple[str, Launch]]:
    num_rows, vocab_size = logits.shape
    hidden = logits.new_empty(num_rows, hidden_size)
    weight = logits.new_empty(vocab_size, hidden_size)
    grad_weight = weight.float()
    rows = torch.empty(num_rows, device="meta")
    for tensor, of_what in ((hidden, "hidden"), (grad_weight, "weight")):
        yield f"scale {name} {of_what}", scale_launch(tensor, rows[0])
    tiles = [-(-size // TILE) for size in logits.shape]
    active = torch.empty(tiles, dtype=torch.bool, device="meta")
    yield f"filter tiles {name}", active_tiles_launch(logits, rows, active)
    places = active.to(torch.int32)
    yield (
        f"filter hidden gradient {name}",
        matmul_launch(hidden, logits, weight, places[:, 0], places, False, True),
    )
    for is_first in (True, False):
        yield (
            f"filter weight gradient {name} {'first' if is_first else 'later'}",
            matmul_launch(grad_weight, logits, hidden, places[0], places.T, True, is_first),
        )


@functools.cache
def _ptxas_figures(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, spilled bytes) of a thread, by the very ptxas that Triton takes for this chip."""
    find = nvidia.get_ptxas  # older Tritons have two ptxas and choose by chip
    path = find(capability).path if inspect.signature(find).parameters else find().path
    chip = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [path, "--verbose", f"--gpu-name={chip}", str(file), "--output-file", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas refused the kernel for {chip}: {done.stderr.strip()}")
    used = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    if used is None or not spills:
        raise RuntimeError(f"ptxas said nothing of registers and spills: {done.stderr.strip()}")
    return int(used[1]), max(map(int, spills))


class _AbsentGPU(DriverBase):
    """Answers what Triton asks before it compiles; nothing is ever launched."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps its compiled kernels by this number

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("there is no GPU to time anything on")
