"""Traces of a few steps: `--run.profile 5:7` writes what each rank's host and GPU did in them.

profile/steps-5-7-rank-0.json.gz     a trace for Perfetto or chrome://tracing
profile/steps-5-7-rank-0.pickle      CUDA only: every allocation, for pytorch.org/memory_viz
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MAX_ALLOCATIONS = 1_000_000


def profile_steps(
    folder: Path, first: int, last: int, rank: int, device: torch.device
) -> Callable[[int], None]:
    """Call the result with 0 before training and with each step's number after it.

    Profiling slows the steps down that it watches, so their rates are not the run's.
    """
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
    profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
    stem = folder / "profile" / f"steps-{first}-{last}-rank-{rank}"

    def after(step: int) -> None:
        if step == first - 1:
            if is_cuda:
                torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
            profiler.start()
        elif step == last:
            profiler.stop()
            stem.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(f"{stem}.json.gz")
            if is_cuda:
                torch.cuda.memory._dump_snapshot(f"{stem}.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)

    return after
