"""How variants of one thing are timed against each other, and what is recorded beside the times.

Clocks and power of a GPU move results by several percent within a minute, so variants are timed in
turn: each round calls every variant once, each round starts at another variant, every other round
runs backwards, and what is compared is a ratio within a round. A variant that raises leaves the
race with its reason; the others go on.
"""

import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
Call = Callable[[], object]

GPU_FIELDS = (
    "name",
    "driver_version",
    "power.limit",
    "power.draw",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
)
"""What nvidia-smi is asked for; it answers in W, MHz and degrees Celsius."""


@dataclass(kw_only=True, slots=True)
class Race:
    """What `race` saw of its variants."""

    milliseconds: dict[str, list[float]]
    """One entry a round, for the variants that finished every round."""
    orders: list[list[str]] = field(default_factory=list)
    """Who ran after whom, round by round."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a variant left."""
    num_device_allocations: int = 0
    """Segments that torch's allocator took from the driver in timed rounds: slow, should be 0."""


def race(
    calls: Mapping[str, Call],
    *,
    device: torch.device,
    num_rounds: int,
    num_warmup_rounds: int,
    seconds: float,
    min_rounds: int = 3,
    on_start: Callable[[str], None] = lambda name: None,
) -> Race:
    """Time all calls in turn for `num_rounds`, or fewer where they take longer than `seconds`."""
    result = Race(milliseconds={name: [] for name in calls})
    running = list(calls)
    started, allocations_before = time.monotonic(), 0
    for round_index in range(-num_warmup_rounds, num_rounds):
        if round_index == 0:
            allocations_before = _num_device_allocations(device)
        if round_index >= min_rounds and time.monotonic() - started > seconds:
            break
        order = rotated(running, round_index)
        for name in order:
            on_start(name)
            elapsed, reason = attempt(lambda name=name: elapsed_ms(calls[name], device), device)
            if elapsed is None:
                result.reasons[name] = reason
                running.remove(name)
                del result.milliseconds[name]
            elif round_index >= 0:
                result.milliseconds[name].append(elapsed)
        if round_index >= 0:
            result.orders.append(order)
    result.num_device_allocations = _num_device_allocations(device) - allocations_before
    return result


def rotated(names: Sequence[str], round_index: int) -> list[str]:
    """Another first name each round; backwards in odd rounds, so that neighbours change too."""
    step = -1 if round_index % 2 else 1
    return [names[(round_index + step * i) % len(names)] for i in range(len(names))]


def elapsed_ms(call: Call, device: torch.device) -> float:
    """One call on an idle device, from before its first instruction to the end of its last."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)  # the host waits: nothing of the last variant may overlap
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)  # the host waits for the second event
        return start.elapsed_time(end)
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def attempt(call: Callable[[], Result], device: torch.device) -> tuple[Result | None, str]:
    """What `call` returns; or None, and what it raised in one line.

    Raises:
        SystemExit: after an error that left the GPU unusable for this process.
    """
    try:
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the host waits: an error must meet its own variant
        return result, ""
    except Exception as error:  # what others wrote raises anything, and the report says what
        reason = first_line(error)
    gc.collect()  # the traceback's frames held the tensors
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)  # the host waits: does the GPU still answer?
            torch.cuda.empty_cache()
        except RuntimeError:
            raise SystemExit(f"the GPU is lost to this process: {reason}") from None
    return None, reason


def first_line(error: BaseException) -> str:
    """Its type, the first line of its message, and where it was raised, fit for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = ": ".join([type(error).__name__, *lines[:1]])[:240]
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or isinstance(error, ImportError):
        return text
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentiles."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0]}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most memory held at once above what was held before, results included.

    On a GPU by torch's own statistics of its allocator. On a CPU by replaying the allocations and
    releases of torch's allocator as its profiler saw them, temporaries inside an op included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the host waits: the peak must be this call's
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)  # the host waits for the peak
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def free_bytes(device: torch.device) -> int:
    """Memory that a variant may count on: what is free on a GPU, half of a machine's own."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def environment(device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """Device, versions and commit; a package that is absent has the version None."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"CPU, {os.cpu_count()} cores",
        "gpu": gpu_state() if is_cuda else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "versions": versions,
        "commit": commit(),
    }


def gpu_state() -> dict[str, str] | None:
    """The first GPU's limits, clocks and temperature now; None where nvidia-smi does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode or not done.stdout.strip():
        return None
    values = done.stdout.splitlines()[0].split(",")
    return {name: value.strip() for name, value in zip(GPU_FIELDS, values, strict=False)}


def commit() -> str | None:
    """This tree's commit, with `-dirty` where it was changed; None outside a repository."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _num_device_allocations(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("num_device_alloc", 0))
