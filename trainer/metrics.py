"""Each step's numbers: a JSON line in `metrics.jsonl`, and progress on the console."""

import json
import time
from pathlib import Path

from ..data.progress import Progress
from .loop import StepResult


class StepLog:
    """Writes each step's numbers; used on rank 0 alone."""

    def __init__(self, path: Path, num_steps: int) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._progress = Progress("train", num_steps, rate_unit="tokens")
        self._last_step_ended = time.perf_counter()

    def write(self, result: StepResult, *, waited_seconds: float) -> None:
        """Append one step; `waited_seconds` is what the step waited for its data.

        Raises:
            OSError: the disk is full.
        """
        now = time.perf_counter()
        seconds = now - self._last_step_ended
        self._last_step_ended = now
        row = {
            "step": result.step,
            "loss": result.loss,
            "grad_norm": result.gradient_norm,
            "learning_rate": result.learning_rate,
            "tokens": result.num_tokens,
            "target_tokens": result.num_targets,
            "tokens_per_second": round(result.num_tokens / seconds, 1),
            "seconds": round(seconds, 4),
            "data_wait_seconds": round(waited_seconds, 4),
        }
        if result.is_skipped:  # JSON has no NaN
            row |= {"loss": None, "grad_norm": None, "skipped": True}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._progress.advance(1, result.num_tokens, f"loss {result.loss:.3f}")

    def restart_clock(self) -> None:
        """Leave what came after the last step, such as a checkpoint, out of the next one's time."""
        self._last_step_ended = time.perf_counter()

    def close(self) -> None:
        self._progress.close()
        self._file.close()
