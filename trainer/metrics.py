"""Each step's numbers: a JSON line in `metrics.jsonl`, and progress on the console."""

import json
import sys
import time
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from .loop import StepResult

PLAIN_LINE_SECONDS = 10.0
"""How often a line is printed when the output is not a terminal."""


class StepLog:
    """Writes each step's numbers; used on rank 0 alone."""

    def __init__(self, path: Path, num_steps: int, console: TextIO = sys.stderr) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._num_steps = num_steps
        self._console = console
        self._is_terminal = console.isatty()
        self._bar = tqdm(total=num_steps, unit="step", file=console, disable=not self._is_terminal)
        self._started = self._last_step_ended = time.perf_counter()
        self._last_line = 0.0

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
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._show(result, row["tokens_per_second"], now)

    def restart_clock(self) -> None:
        """Leave what came after the last step, such as a checkpoint, out of the next one's time."""
        self._last_step_ended = time.perf_counter()

    def close(self) -> None:
        self._bar.close()
        self._file.close()

    def _show(self, result: StepResult, tokens_per_second: float, now: float) -> None:
        if self._is_terminal:
            self._bar.set_postfix_str(f"loss {result.loss:.3f}, {tokens_per_second:,.0f} tokens/s")
            self._bar.update()
        elif now - self._last_line >= PLAIN_LINE_SECONDS or result.step == self._num_steps:
            self._last_line = now
            left = (now - self._started) / result.step * (self._num_steps - result.step)
            print(
                f"step {result.step}/{self._num_steps}  loss {result.loss:.3f}  "
                f"{tokens_per_second:,.0f} tokens/s  {left:,.0f} s left",
                file=self._console,
                flush=True,
            )
