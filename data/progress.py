"""Progress of long work: a bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Counts items done out of a total, and a second quantity (tokens) per second.

    Works as a context manager. On a terminal it is tqdm's bar, with rate and time left; where
    stderr goes to a file or a pipe, the same figures come as lines that can be read in a log.
    """

    def __init__(self, label: str, total: int, *, rate_unit: str) -> None:
        self._label, self._total, self._rate_unit = label, total, rate_unit
        self._done, self._amount = 0, 0
        self._started = self._last_line = time.perf_counter()
        self._note = ""
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=label, dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the bar, or print the last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._done == self._total:
            self._print_line()

    def advance(self, num_items: int, amount: int, note: str = "") -> None:
        """Count `num_items` more done, which took `amount` of the rate's unit; cheap to call.

        Args:
            note: shown beside the rate, for example the loss.
        """
        self._note = f", {note}" if note else ""
        self._done += num_items
        self._amount += amount
        now = time.perf_counter()
        if self._bar is not None:
            if num_items:
                self._bar.set_postfix_str(f"{self._rate(now)}", refresh=False)
            self._bar.update(num_items)
        elif now - self._last_line >= LINE_SECONDS:
            self._print_line()

    def _rate(self, now: float) -> str:
        elapsed_seconds = max(now - self._started, 1e-9)
        return f"{self._amount / elapsed_seconds:,.0f} {self._rate_unit}/s{self._note}"

    def _print_line(self) -> None:
        now = self._last_line = time.perf_counter()
        elapsed_seconds = now - self._started
        line = f"{self._label}: {self._done}/{self._total}, {self._rate(now)}"
        if self._done == self._total:
            line += f", {elapsed_seconds:.1f} s"
        elif self._done:
            left_seconds = elapsed_seconds * (self._total - self._done) / self._done
            line += f", {left_seconds:.0f} s left"
        print(line, file=sys.stderr, flush=True)
