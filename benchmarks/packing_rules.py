"""Published rules of packing, restated from their sources: what ours is measured against.

Each takes a step's lengths and returns `packs[rank][micro_step]`, indices into the lengths.
"""

import bisect
import heapq
import itertools

import numpy as np

from ..data.packing import CostModel

Packs = list[list[list[int]]]


def longest_first(
    lengths: np.ndarray, cost: CostModel, tokens_per_pack: int, world_size: int
) -> Packs:
    """Longest first into the cheapest pack with room, then packs of like cost side by side."""
    costs = cost.of(lengths)
    order = np.argsort(-lengths, kind="stable").tolist()
    num_packs = -(-int(lengths.sum()) // tokens_per_pack // world_size) * world_size
    while True:
        packs: list[list[int]] = [[] for _ in range(num_packs)]
        loads, rooms = np.zeros(num_packs), np.full(num_packs, tokens_per_pack)
        for i in order:
            open_packs = np.flatnonzero(rooms >= lengths[i])
            if not len(open_packs):
                break
            pack = int(open_packs[loads[open_packs].argmin()])
            packs[pack].append(i)
            loads[pack] += costs[i]
            rooms[pack] -= lengths[i]
        else:
            by_cost = [packs[pack] for pack in np.argsort(-loads, kind="stable").tolist()]
            return [by_cost[rank::world_size] for rank in range(world_size)]
        num_packs += world_size


def karmarkar_karp(
    lengths: np.ndarray, cost: CostModel, tokens_per_pack: int, world_size: int
) -> Packs:
    """verl 0.9's supervised trainer with `balance_batch` and dynamic batches.

    Sources: verl/utils/seqlen_balancing.py and verl/trainer/sft_trainer_ray.py of verl-project/verl
    (Apache-2.0). A document's work is 24576 s + s^2 whatever the model. The largest differencing
    method gives each rank as many documents; each rank then divides its own into as many
    micro-batches as the fullest rank's tokens need, by the same method without equal counts, and
    runs the largest in the middle. A micro-batch may exceed the limit on tokens.
    """
    del cost  # its constants are fixed
    work = (24_576 * lengths + lengths**2).tolist()
    ranks = _differencing(list(range(len(lengths))), work, world_size, equal_counts=True)
    most = max(int(lengths[rank].sum()) for rank in ranks)
    num_micro_steps = min(len(ranks[0]), -(-most // tokens_per_pack))
    packs = []
    for rank in ranks:
        micro = _differencing(rank, work, num_micro_steps, equal_counts=False)
        micro.sort(key=lambda pack: (sum(work[i] for i in pack), pack[0]), reverse=True)
        packs.append(micro[::2][::-1] + micro[1::2])
    return packs


def best_fit(lengths: np.ndarray, cost: CostModel, tokens_per_pack: int, world_size: int) -> Packs:
    """TRL 1.16's `packing_strategy="bfd"`, one packed row per device and micro-step.

    Source: trl/data_utils.py of huggingface/trl (Apache-2.0). Longest first into the fullest row
    that has room. TRL deals rows out in random order; here they are dealt by cost, like beside
    like, which flatters it: what is left is what packing by tokens alone costs.
    """
    rooms: list[tuple[int, int]] = []
    rows: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        place = bisect.bisect_left(rooms, (int(lengths[i]), -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = tokens_per_pack, len(rows)
            rows.append([])
        rows[row].append(i)
        bisect.insort(rooms, (room - int(lengths[i]), row))
    costs = cost.of(lengths)
    rows.sort(key=lambda row: -float(costs[row].sum()))
    return [rows[rank::world_size] for rank in range(world_size)]


def _differencing(
    documents: list[int], work: list[int], num_parts: int, *, equal_counts: bool
) -> list[list[int]]:
    """The largest differencing method of Karmarkar and Karp (1982) for any number of parts.

    A partial solution is `num_parts` sums; the two with the widest gap between their largest and
    smallest sums are merged, the largest of one with the smallest of the other.
    """
    by_work = sorted(documents, key=lambda i: (work[i], i))
    step = num_parts if equal_counts else 1
    tie = itertools.count()
    heap = []
    for start in range(0, len(by_work), step):
        parts = [(work[i], [i]) for i in by_work[start : start + step]]
        parts += [(0, []) for _ in range(num_parts - len(parts))]
        parts.sort(key=lambda part: -part[0])
        heap.append((parts[-1][0] - parts[0][0], next(tie), parts))
    heapq.heapify(heap)
    while len(heap) > 1:
        one, other = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        parts = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(one, reversed(other), strict=True)]
        parts.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (parts[-1][0] - parts[0][0], next(tie), parts))
    return [part[1] for part in heap[0][2]]
