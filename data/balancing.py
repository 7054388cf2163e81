"""Documents of one optimizer step into packs, so that the ranks wait for each other least.

Sharded ranks meet in every micro-step, so a step lasts

    sum over micro-steps of the costliest of its `world_size` packs,

and packs need like cost only within a micro-step. Given the packs, sorting them by cost and cutting
the row into micro-steps is best. The packs come from longest-first placement, then from local
search: two packs' documents are divided anew, over all subsets of up to 8 of them, costliest pack
against cheapest and then the worst ones against all others. `lower_bound` says what no plan can
beat, and where to stop.

Every rank computes the plan for itself, so each number here is exact on any machine: costs are
whole numbers held in float64, sums of which stay below 2^53 and do not depend on their order.

N documents, longest first; P packs; M micro-steps; H pairs of packs; W documents divided anew.
"""

from dataclasses import dataclass

import numpy as np

from .placement import (
    Documents,
    beside_giants,
    best_fit,
    cheapest_first,
    fewest_packs,
    lower_bound,
    row_by_row,
)

GOOD_ENOUGH = 1.0003
"""Search ends this near to the lower bound: less than what two runs of one kernel differ by."""
TRY_NO_OTHER = 1.015
"""This near to it neither another first placement nor another round of packs is tried."""
WORTH_A_ROUND = 0.99
"""Another micro-step gathers the weights once more: taken if it saves this much at least."""
NUM_SWEEPS, NUM_REPAIRS = 6, 40
"""Most rounds that divide all packs anew in pairs, and most that work on the worst packs."""
NUM_WORST = 4
"""Packs that a repair works on."""
NOT_IDLE, MAX_IDLE, MAX_VAIN = 0.9998, 2, 4
"""A round that leaves more than this share of the time is idle; so many idle rounds end the sweeps,
so many that change nothing end the repairs."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`pack_of[i]` is the pack of document i; no pack is empty or over capacity."""

    pack_of: np.ndarray  # (N,) int64
    num_packs: int
    time: float
    """Sum over micro-steps of the costliest pack, in units of cost."""


def balance(docs: Documents) -> list[list[int]] | None:
    """Packs in order: the first `world_size` are the first micro-step, and so on.

    None where there are too few documents to give every rank as many packs. Never more than one
    round above the fewest packs that can hold the documents, unless none could be placed in those.
    """
    size = docs.world_size
    bound, least = lower_bound(docs), -(-fewest_packs(docs) // size)
    best: Placement | None = None
    for num_micro_steps in range(least, len(docs.lengths) // size + 1):
        found = _best_of(docs, num_micro_steps * size, bound)
        if found and (best is None or found.time < best.time * WORTH_A_ROUND):
            best = found
        if best and (best.time <= bound * TRY_NO_OTHER or num_micro_steps > least):
            break
    if best is None:
        return None
    packs: list[list[int]] = [[] for _ in range(best.num_packs)]
    for document, pack in enumerate(best.pack_of.tolist()):
        packs[pack].append(document)
    loads = np.bincount(best.pack_of, docs.costs)
    return [packs[pack] for pack in np.argsort(-loads, kind="stable").tolist()]


def step_time(
    loads: np.ndarray,  # (P,) cost of each pack, in any order
    world_size: int,
) -> float:
    """Sum over micro-steps of the costliest pack, like packs beside like."""
    return float(np.sort(loads)[::-1][::world_size].sum())


def _best_of(docs: Documents, num_packs: int, bound: float) -> Placement | None:
    """Sweeps from each first placement, repairs of the best; None where none finds room."""
    best: Placement | None = None
    for places in _FIRST_PLACEMENTS:
        if best and (best.time <= bound * TRY_NO_OTHER or _even_tokens in places):
            break
        swept = [
            _sweep(docs, pack_of, num_packs, bound)
            for place in places
            if (pack_of := place(docs, num_packs)) is not None
        ]
        for placement in sorted(swept, key=lambda placement: placement.time)[:1]:
            found = _repair(docs, placement, bound)
            if best is None or found.time < best.time:
                best = found
    return best


def _even_tokens(docs: Documents, num_packs: int) -> np.ndarray | None:
    """As few tokens as possible in the fullest pack, for steps that leave hardly any room."""
    total = int(docs.lengths.sum())
    loose = Documents(
        lengths=docs.lengths, costs=docs.lengths, capacity=total, world_size=num_packs
    )
    pack_of = cheapest_first(loose, num_packs)
    assert pack_of is not None  # each pack has room for all
    enough = docs.capacity / GOOD_ENOUGH
    even = _repair(loose, _sweep(loose, pack_of, num_packs, enough), enough)
    return even.pack_of if even.time <= docs.capacity else None


_FIRST_PLACEMENTS = (
    (cheapest_first,),
    (beside_giants, row_by_row, best_fit),
    (_even_tokens,),
)
"""Tried in turn; of those in brackets the one that is best after sweeps."""


def _sweep(docs: Documents, pack_of: np.ndarray, num_packs: int, bound: float) -> Placement:
    """Divide all packs anew in pairs, the one most above its target with the one most below."""
    draw = np.random.default_rng(0)  # which pairs, which documents: the same on every rank
    best = Placement(pack_of, num_packs, np.inf)
    half, num_idle = num_packs // 2, 0
    for sweep in range(NUM_SWEEPS + 1):
        packs = _weigh(docs, pack_of, num_packs)
        time = step_time(packs.loads, docs.world_size)
        num_idle = 0 if time < best.time * NOT_IDLE else num_idle + 1
        if time < best.time:
            best = Placement(pack_of, num_packs, time)
        if best.time <= bound * GOOD_ENOUGH or num_idle > MAX_IDLE or not half:
            break
        worst_first = np.argsort(-packs.excess, kind="stable")
        # At random now and then: sorted pairs that cannot improve would stay the same for ever.
        row = draw.permutation(num_packs) if sweep % 3 == 2 else worst_first
        split = _divide(docs, packs, row[:half], row[::-1][:half], 8, draw)
        pack_of = split.applied(pack_of, np.arange(half))
    return best


def _repair(docs: Documents, best: Placement, bound: float) -> Placement:
    """Divide the packs most above their target anew, each with the pack that helps it most.

    Where that ends above the bound, one micro-step after the other is drained into the room that
    its fellows' costliest packs leave beside them.
    """
    draw = np.random.default_rng(0)
    pack_of, num_packs, num_vain = best.pack_of, best.num_packs, 0
    num_worst = max(1, min(NUM_WORST, num_packs // 4))
    num_micro_steps = num_packs // docs.world_size
    to_drain = list(range(num_micro_steps)) if num_micro_steps > 1 else []
    drained: int | None = None
    for _ in range(NUM_REPAIRS if num_packs > 1 else 0):
        if best.time <= bound * GOOD_ENOUGH:
            break
        if num_vain == MAX_VAIN:
            if not to_drain or best.time <= bound * TRY_NO_OTHER:
                break
            drained, num_vain, pack_of = to_drain.pop(), 0, best.pack_of
        packs = _weigh(docs, pack_of, num_packs, drained)
        worst_first = np.argsort(-packs.excess, kind="stable")
        first = np.repeat(worst_first[:num_worst], num_packs - num_worst)
        second = np.tile(worst_first[num_worst:], num_worst)
        split = _divide(docs, packs, first, second, 6, draw)
        chosen = _partners(split.excess, packs.excess[first], num_worst)
        num_vain = 0 if len(chosen) else num_vain + 1
        pack_of = split.applied(pack_of, chosen)
        time = step_time(np.bincount(pack_of, docs.costs), docs.world_size)
        if time < best.time:
            best = Placement(pack_of, num_packs, time)
    return best


@dataclass(frozen=True, slots=True)
class _Packs:
    """What the search knows of a placement."""

    members: np.ndarray  # (P, most documents of a pack) int64, N where there are fewer
    loads: np.ndarray  # (P,) cost
    tokens: np.ndarray  # (P,)
    excess: np.ndarray  # (P,) cost above the target


def _weigh(
    docs: Documents, pack_of: np.ndarray, num_packs: int, drained: int | None = None
) -> _Packs:
    """A pack's target is the mean of its micro-step, or the costliest document there if that is
    more: as nothing can be done about that one, the others there may as well take work from
    elsewhere. While one micro-step is drained, the target in the others is their costliest pack.
    """
    size, num_docs = docs.world_size, len(pack_of)
    loads = np.bincount(pack_of, docs.costs, minlength=num_packs)
    by_pack = np.argsort(pack_of, kind="stable")  # longest first within a pack
    counts = np.bincount(pack_of, minlength=num_packs)
    starts = counts.cumsum() - counts
    owners = pack_of[by_pack]
    members = np.full((num_packs, counts.max()), num_docs)
    members[owners, np.arange(num_docs) - starts[owners]] = by_pack
    order = np.argsort(-loads, kind="stable")
    costliest = docs.costs[members[order, 0]].reshape(-1, size).max(axis=1)
    goals = np.maximum(loads[order].reshape(-1, size).sum(axis=1) / size, costliest)
    if drained is not None:
        others = np.arange(len(goals)) != drained
        goals[others] = loads[order[::size]][others]
    target = np.empty(num_packs)
    target[order] = goals.repeat(size)
    tokens = np.bincount(pack_of, docs.lengths, minlength=num_packs)
    return _Packs(members, loads, tokens, loads - target)


@dataclass(frozen=True, slots=True)
class _Split:
    """The best division of each pair of packs."""

    first: np.ndarray  # (H,) pack
    second: np.ndarray  # (H,) pack
    rows: np.ndarray  # (H, W) documents, N where there are fewer
    subset: np.ndarray  # (H,) int64, bit j: document j goes to the first pack
    excess: np.ndarray  # (H,) the greater of the two packs' excess

    def applied(self, pack_of: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """`pack_of` after these pairs, which have no pack in common."""
        rows = self.rows[pairs]
        bits = (self.subset[pairs, None] >> np.arange(rows.shape[1])) & 1
        owners = np.where(bits == 1, self.first[pairs, None], self.second[pairs, None])
        changed, real = pack_of.copy(), rows < len(pack_of)
        changed[rows[real]] = owners[real]
        return changed


def _divide(
    docs: Documents,
    packs: _Packs,
    first: np.ndarray,  # (H,)
    second: np.ndarray,  # (H,)
    max_free: int,
    draw: np.random.Generator,
) -> _Split:
    """Try all subsets of up to `max_free` documents of each pair; more are drawn, the rest stays.

    The pair as it is counts among the subsets, so that nothing gets worse.
    """
    num_docs, width = len(docs.lengths), packs.members.shape[1]
    rows = np.concatenate((packs.members[first], packs.members[second]), axis=1)
    key = (rows == num_docs).astype(np.float64)
    if int((rows < num_docs).sum(axis=1).max()) > max_free:
        key += draw.random(rows.shape) / 2
    kept = np.argsort(key, axis=1, kind="stable")[:, :max_free]
    rows = np.take_along_axis(rows, kept, axis=1)
    num_free = int((rows < num_docs).sum(axis=1).max())
    rows, in_first = rows[:, :num_free], kept[:, :num_free] < width
    costs, lengths = np.append(docs.costs, 0.0)[rows], np.append(docs.lengths, 0.0)[rows]
    # All subset sums by doubling: (H, 1), (H, 2), (H, 4) ...; column c is the subset with bits c.
    load = (packs.loads[first] - (costs * in_first).sum(axis=1))[:, None]
    tokens = (packs.tokens[first] - (lengths * in_first).sum(axis=1))[:, None]
    for j in range(num_free):
        load = np.concatenate((load, load + costs[:, j : j + 1]), axis=1)
        tokens = np.concatenate((tokens, tokens + lengths[:, j : j + 1]), axis=1)
    middle = (packs.excess[first] + packs.excess[second]) / 2
    wanted = packs.loads[first] - packs.excess[first] + middle
    away = np.abs(load - wanted[:, None])
    both = (packs.tokens[first] + packs.tokens[second])[:, None]
    # One token at least on either side: no pack may become empty.
    fits = (tokens >= np.maximum(both - docs.capacity, 1)) & (
        tokens <= np.minimum(both - 1, docs.capacity)
    )
    away[~fits] = np.inf
    subset = away.argmin(axis=1)
    return _Split(first, second, rows, subset, middle + away[np.arange(len(first)), subset])


def _partners(
    excess: np.ndarray,  # (H,) after dividing, the pairs of each of `num_worst` packs in a row
    excess_before: np.ndarray,  # (H,) of the pair's first pack
    num_worst: int,
) -> np.ndarray:  # int64, pairs
    """For each of the worst packs the partner with which it improves most, each taken once."""
    after = excess.reshape(num_worst, -1).copy()
    before = excess_before.reshape(num_worst, -1)[:, 0]
    chosen = []
    for worst in range(num_worst):
        partner = int(after[worst].argmin())
        # A whole unit of cost: less could go round in circles.
        if after[worst, partner] <= before[worst] - 1:
            chosen.append(worst * after.shape[1] + partner)
            after[:, partner] = np.inf
    return np.array(chosen, dtype=np.int64)
