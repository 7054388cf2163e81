"""First placements of a step's documents into packs, and what no placement can beat.

N documents, longest first; P packs, `world_size` of them to a micro-step.
"""

import bisect
import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """A step's documents, longest first, and what bounds their packs."""

    lengths: np.ndarray  # (N,) float64, whole numbers, descending
    costs: np.ndarray  # (N,) float64, whole numbers, descending
    capacity: int
    """Most tokens of a pack."""
    world_size: int


def lower_bound(docs: Documents) -> float:
    """No plan of any number of micro-steps takes less than this, in units of cost.

    The greatest of three. The ranks share all work evenly. Of the first k * world_size + 1
    documents some rank has k + 1, whose cost is at least that of the cheapest k + 1. And where
    documents exceed 1/(k+1) of a pack, at most k share one: the j costliest micro-steps cost at
    least their longest documents, and do no more work than their packs can hold.
    """
    lengths, costs, size = docs.lengths, docs.costs, docs.world_size
    total, num_docs = float(costs.sum()), len(costs)
    bound = total / size
    for k in range(1, (num_docs - 1) // size + 1):
        bound = max(bound, float(costs[k * size - k : k * size + 1].sum()))
    left = [total - work for work in _most_work(docs)]
    for share in range(1, 9):
        num_large = int((lengths > docs.capacity / (share + 1)).sum())
        longest = 0.0
        for j, first in enumerate(range(0, num_docs, size * share)):
            if j and first >= num_large:
                break
            longest += float(costs[first])
            bound = max(bound, longest + left[j] / size)
    return bound


def _most_work(docs: Documents) -> list[float]:
    """What the packs of 1, 2, 3 ... micro-steps can cost at most, until they hold all.

    Cost per token grows with length: the longest documents, of those above half a pack one to a
    pack, then the longest of the others, the last in part.
    """
    num_docs, num_half = len(docs.lengths), int((docs.lengths > docs.capacity / 2).sum())
    tokens = np.append(0.0, docs.lengths.cumsum())
    costs = np.append(0.0, docs.costs.cumsum())
    result = []
    for num_packs in range(docs.world_size, num_docs + docs.world_size, docs.world_size):
        large = min(num_packs, num_half)
        room = num_packs * docs.capacity - tokens[large] + tokens[num_half]
        last = int(np.searchsorted(tokens, room, side="right")) - 1
        work = float(costs[large] + costs[last] - costs[num_half])
        if last < num_docs:
            work += float((room - tokens[last]) * docs.costs[last] / docs.lengths[last])
        result.append(work)
    return result


def fewest_packs(docs: Documents) -> int:
    """A lower bound on the number of packs that hold the documents.

    Martello and Toth's L2 (Knapsack Problems, 1990, section 8.3.2), and that at most k documents
    above 1/(k+1) of a pack share one.
    """
    lengths, capacity = docs.lengths, docs.capacity
    before = np.append(0.0, lengths.cumsum())
    num_half = int((lengths > capacity / 2).sum())
    fewest = -(-int(before[-1]) // capacity)
    for share in range(1, 9):
        fewest = max(fewest, -(-int((lengths > capacity / (share + 1)).sum()) // share))
    for threshold in np.unique(lengths[num_half:]):
        # Beside a document above capacity - threshold no document of the threshold or more fits.
        num_alone = int((lengths > capacity - threshold).sum())
        last = int((lengths >= threshold).sum())
        room = (num_half - num_alone) * capacity - (before[num_half] - before[num_alone])
        rest = max(0, int(before[last] - before[num_half] - room))
        fewest = max(fewest, num_half + -(-rest // capacity))
    return fewest


def cheapest_first(docs: Documents, num_packs: int) -> np.ndarray | None:
    """Longest first, each into the pack of least cost that has room."""
    return _place_longest_first(docs, np.zeros(num_packs))


def beside_giants(docs: Documents, num_packs: int) -> np.ndarray | None:
    """As above, with the cost of each micro-step estimated first: each into the pack that lacks
    most of it.

    A document that costs more than an even share sets the time of its micro-step, and the other
    packs there may cost as much, so that the rest of the step gets shorter.
    """
    size, num_micro_steps = docs.world_size, num_packs // docs.world_size
    left = float(docs.costs.sum())
    fillers = slice(num_packs, None) if num_packs < len(docs.costs) else slice(None)
    density = float(docs.costs[fillers].sum() / docs.lengths[fillers].sum())
    goals = np.empty(num_packs)
    for m in range(num_micro_steps):
        beside = slice(m * size, (m + 1) * size)
        goal = np.rint(max(left / (num_packs - m * size), float(docs.costs[m * size])))
        fill = np.rint((docs.capacity - docs.lengths[beside]) * density)
        left -= float(np.minimum(docs.costs[beside] + fill, goal).sum())
        goals[beside] = goal
    return None if goals[0] == goals[-1] else _place_longest_first(docs, -goals)


def _place_longest_first(
    docs: Documents,
    loads: np.ndarray,  # (P,) what each pack starts with
) -> np.ndarray | None:
    heap = [(load, pack) for pack, load in enumerate(loads.tolist())]
    heapq.heapify(heap)
    room = [docs.capacity] * len(heap)
    pack_of = []
    for length, cost in zip(docs.lengths.tolist(), docs.costs.tolist(), strict=True):
        full = []
        while heap and room[heap[0][1]] < length:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, pack = heap[0]
        heapq.heapreplace(heap, (load + cost, pack))
        room[pack] -= length
        pack_of.append(pack)
        for entry in full:
            heapq.heappush(heap, entry)
    return _none_empty(pack_of, len(room))


def row_by_row(docs: Documents, num_packs: int) -> np.ndarray | None:
    """Rows of `world_size` documents of like length, each into the micro-step it prolongs least.

    Where packs hold few documents of few lengths, equal packs do not exist, but micro-steps whose
    packs hold one document of each row are equal within.
    """
    size = docs.world_size
    loads = np.zeros((num_packs // size, size))
    room = np.full(num_packs // size, float(docs.capacity))
    pack_of = np.empty(len(docs.lengths), dtype=np.int64)
    for start in range(0, len(pack_of), size):
        row = docs.costs[start : start + size]
        cheapest = np.argsort(loads, axis=1, kind="stable")[:, : len(row)]
        filled = np.take_along_axis(loads, cheapest, axis=1) + row
        time = loads.max(axis=1)
        longer = np.maximum(filled.max(axis=1), time) - time
        # An empty micro-step first, as none may stay empty.
        longer[time == 0] = -1.0
        longer[room < docs.lengths[start]] = np.inf
        chosen = int(longer.argmin())
        if longer[chosen] == np.inf:
            return None
        room[chosen] -= docs.lengths[start]
        loads[chosen, cheapest[chosen]] = filled[chosen]
        pack_of[start : start + size] = chosen * size + cheapest[chosen]
    return pack_of


def best_fit(docs: Documents, num_packs: int) -> np.ndarray | None:
    """Longest first, each into the fullest pack that has room; no pack left empty.

    Fits where the other placement does not. Costs differ widely, which the search repairs.
    """
    rooms: list[tuple[float, int]] = []
    pack_of = []
    num_open = 0
    for length in docs.lengths.tolist():
        place = bisect.bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, pack = rooms.pop(place)
        elif num_open < num_packs:
            room, pack, num_open = docs.capacity, num_open, num_open + 1
        else:
            return None
        pack_of.append(pack)
        bisect.insort(rooms, (room - length, pack))
    return _none_empty(pack_of, num_packs)


def _none_empty(pack_of: list[int], num_packs: int) -> np.ndarray:
    """Empty packs get the shortest documents of packs that hold more than one."""
    counts = np.bincount(pack_of, minlength=num_packs)
    document = len(pack_of) - 1
    for empty in np.flatnonzero(counts == 0).tolist():
        while counts[pack_of[document]] == 1:
            document -= 1
        counts[pack_of[document]] -= 1
        pack_of[document] = empty
        counts[empty] = 1
        document -= 1
    return np.array(pack_of)
