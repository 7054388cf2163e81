"""Which examples go into which pack, on which rank, in which micro-step: a pure function, no state.

A step takes `sequences_per_step` examples in epoch order. Longest first, each goes to the least
loaded pack that still has room; every rank gets the same number of packs, and packs of like size
run side by side, because sharded ranks wait for each other in every micro-step.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One optimizer step."""

    packs: tuple[tuple[tuple[int, ...], ...], ...]
    """`packs[rank][micro_step]` holds example indices; every rank has as many micro-steps."""
    num_tokens: int
    """Tokens of all packs, prompts included."""
    num_targets: int
    """Target tokens of all packs: what the loss is divided by, known before the first backward."""


def plan_step(
    step: int,
    *,
    lengths: np.ndarray,  # (N,) tokens of each example
    num_targets: np.ndarray,  # (N,) target tokens of each
    sequences_per_step: int,
    tokens_per_pack: int,
    world_size: int,
    seed: int | None,
) -> StepPlan:
    """The plan of optimizer step `step`, counted from 0; the same on every rank.

    Args:
        seed: shuffles each epoch anew; None keeps the rows in file order, epoch after epoch.

    Raises:
        ValueError: an example longer than a pack, or too few sequences to give every rank as many
            packs.
    """
    if sequences_per_step < world_size:
        raise ValueError(
            f"sequences_per_step {sequences_per_step} leaves some of {world_size} ranks without "
            "work: "
            f"set it to at least {world_size}"
        )
    examples = step_examples(step, len(lengths), sequences_per_step, seed)
    longest = int(lengths[examples].max())
    if longest > tokens_per_pack:
        raise ValueError(
            f"an example of {longest} tokens does not fit tokens_per_pack {tokens_per_pack}: "
            "raise it"
        )
    packs = _pack(examples, lengths, tokens_per_pack, world_size)
    packs.sort(key=lambda pack: (-int(lengths[pack].sum()), pack))
    return StepPlan(
        packs=tuple(
            tuple(tuple(pack) for pack in packs[rank::world_size]) for rank in range(world_size)
        ),
        num_tokens=int(lengths[examples].sum()),
        num_targets=int(num_targets[examples].sum()),
    )


def step_examples(
    step: int, num_examples: int, sequences_per_step: int, seed: int | None
) -> np.ndarray:
    """Indices of the step's examples: the next stretch of an endless row of epochs."""
    positions = np.arange(step * sequences_per_step, (step + 1) * sequences_per_step)
    epochs, places = np.divmod(positions, num_examples)
    if seed is None:
        return places
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(num_examples)
        for epoch in np.unique(epochs).tolist()
    }
    return np.array([orders[e][p] for e, p in zip(epochs.tolist(), places.tolist(), strict=True)])


def _pack(
    examples: np.ndarray, lengths: np.ndarray, capacity: int, world_size: int
) -> list[list[int]]:
    """Fewest packs, a multiple of `world_size`, in which longest-first placement finds room for
    all.
    """
    longest_first = sorted(examples.tolist(), key=lambda i: (-int(lengths[i]), i))
    fewest = -(-int(lengths[examples].sum()) // capacity)
    num_packs = -(-fewest // world_size) * world_size
    while num_packs <= len(examples):
        packs = _place(longest_first, lengths, capacity, num_packs)
        if packs is not None:
            return packs
        num_packs += world_size
    raise ValueError(
        f"{len(examples)} sequences cannot fill {num_packs} packs of {capacity} tokens, "
        f"{num_packs // world_size} on "
        f"each of {world_size} ranks: raise tokens_per_pack, or make sequences_per_step a "
        f"multiple of {world_size}"
    )


def _place(
    longest_first: list[int], lengths: np.ndarray, capacity: int, num_packs: int
) -> list[list[int]] | None:
    """Each example into the lightest pack; None where one does not fit. No pack stays empty."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    loads = np.zeros(num_packs, dtype=np.int64)
    for example in longest_first:
        lightest = int(loads.argmin())
        if loads[lightest] + lengths[example] > capacity:
            return None
        packs[lightest].append(example)
        loads[lightest] += lengths[example]
    return packs
