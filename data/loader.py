"""Packs made ahead of the step, in threads of their own: the step waits only when making them is
slower.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from .batch import PackedBatch, pack_documents
from .packing import StepPlan
from .tokenized import TokenizedDataset

NUM_WORKERS = 2
STEPS_AHEAD = 3
"""Steps in the making or ready, besides the one in use: one for each worker, one ready."""


class StepLoader:
    """Iterates over (plan, this rank's packs) of steps `first_step` to `num_steps` - 1.

    What a step holds depends on its number alone, so a resumed run passes the number of steps done
    and nothing else.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        plan: Callable[[int], StepPlan],
        *,
        rank: int,
        num_steps: int,
        pin_memory: bool,
        first_step: int = 0,
    ) -> None:
        self._waited_seconds = 0.0
        self._dataset = dataset
        self._plan = plan
        self._rank = rank
        self._steps = range(first_step, num_steps)
        self._pin_memory = pin_memory

    def __iter__(self) -> Iterator[tuple[StepPlan, list[PackedBatch]]]:
        """Yield the steps in order; leaving early stops the workers.

        Raises:
            Whatever made a worker fail, in the step that needed its result.
        """
        pool = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="longcot-loader")
        try:
            ahead = deque(pool.submit(self._step, step) for step in self._steps[:STEPS_AHEAD])
            for step in self._steps:
                started = time.perf_counter()
                made = ahead.popleft().result()
                self._waited_seconds += time.perf_counter() - started
                if step + STEPS_AHEAD in self._steps:
                    ahead.append(pool.submit(self._step, step + STEPS_AHEAD))
                yield made
        finally:
            # Without waiting: nobody will fetch what a worker still makes, it ends after that.
            pool.shutdown(wait=False, cancel_futures=True)

    def take_waited_seconds(self) -> float:
        """How long the steps have waited for their packs since this was last asked."""
        waited, self._waited_seconds = self._waited_seconds, 0.0
        return waited

    def _step(self, step: int) -> tuple[StepPlan, list[PackedBatch]]:
        plan = self._plan(step)
        return plan, [self._make(pack) for pack in plan.packs[self._rank]]

    def _make(self, pack: tuple[int, ...]) -> PackedBatch:
        batch = pack_documents(
            [self._dataset.row(i) for i in pack],
            [self._dataset.target_mask(i) for i in pack],
            [float(self._dataset.weights[i]) for i in pack],
        )
        return batch.pinned() if self._pin_memory else batch
