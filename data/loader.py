"""Packs made ahead of the step, in a thread of their own: the step waits only when making them is
slower.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator

from .batch import PackedBatch, pack_documents
from .packing import StepPlan
from .tokenized import TokenizedDataset

STEPS_AHEAD = 2


class StepLoader:
    """Iterates over (plan, this rank's packs) of steps 0 to `num_steps` - 1."""

    def __init__(
        self,
        dataset: TokenizedDataset,
        plan: Callable[[int], StepPlan],
        *,
        rank: int,
        num_steps: int,
        pin_memory: bool,
    ) -> None:
        self._waited_seconds = 0.0
        self._dataset = dataset
        self._plan = plan
        self._rank = rank
        self._steps = range(num_steps)
        self._pin_memory = pin_memory
        self._ready: queue.Queue[tuple[StepPlan, list[PackedBatch]] | BaseException] = queue.Queue(
            STEPS_AHEAD
        )
        self._stopped = threading.Event()
        # A daemon: a failing step must not be kept alive by the packs that nobody will fetch.
        self._thread = threading.Thread(target=self._work, name="longcot-loader", daemon=True)

    def __iter__(self) -> Iterator[tuple[StepPlan, list[PackedBatch]]]:
        """Yield the steps in order.

        Raises:
            Whatever made the worker fail, in the step that needed its result.
        """
        self._thread.start()
        try:
            for _ in self._steps:
                started = time.perf_counter()
                item = self._ready.get()
                self._waited_seconds += time.perf_counter() - started
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._stopped.set()

    def take_waited_seconds(self) -> float:
        """How long the steps have waited for their packs since this was last asked."""
        waited, self._waited_seconds = self._waited_seconds, 0.0
        return waited

    def _work(self) -> None:
        for step in self._steps:
            try:
                plan = self._plan(step)
                item = (plan, [self._make(pack) for pack in plan.packs[self._rank]])
            except BaseException as error:  # handed to the step that waits for it, which raises it
                item = error
            while not self._stopped.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stopped.is_set() or isinstance(item, BaseException):
                return

    def _make(self, pack: tuple[int, ...]) -> PackedBatch:
        batch = pack_documents(
            [self._dataset.row(i) for i in pack],
            [int(self._dataset.prompt_lengths[i]) for i in pack],
        )
        return batch.pinned() if self._pin_memory else batch
