"""Which examples go into which pack, on which rank, in which micro-step: a pure function, no state.

A step takes `sequences_per_step` examples in epoch order; `balancing` divides them so that the step
is short. Every rank gets the same number of packs, because sharded ranks meet in every micro-step.
"""

import functools
from dataclasses import dataclass

import numpy as np

from .balancing import balance
from .placement import Documents, fewest_packs


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """A document of s tokens costs `linear * s + quadratic * s**2`, in any unit.

    `trainer.flops` derives both from a model's config.
    """

    linear: float
    quadratic: float

    def __post_init__(self) -> None:
        for name in ("linear", "quadratic"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"cost.{name} is {value}, it must be finite and not negative")
        if self.linear == self.quadratic == 0:
            raise ValueError("cost.linear and cost.quadratic are both 0: every plan would be equal")

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """(N,) float64, the cost of documents of these lengths, (N,) tokens."""
        tokens = lengths.astype(np.float64)
        return self.linear * tokens + self.quadratic * tokens * tokens


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
    cost: CostModel,
    seed: int | None,
) -> StepPlan:
    """The plan of optimizer step `step`, counted from 0; the same on every rank.

    Args:
        cost: what a document costs; ranks wait for the costliest pack of each micro-step.
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
    longest_first = examples[np.argsort(-lengths[examples], kind="stable")]
    docs = documents(lengths[longest_first], cost, tokens_per_pack, world_size)
    packs = [longest_first[pack].tolist() for pack in balance(docs) or ()]
    if not packs:
        raise ValueError(_unfillable(docs))
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
    examples = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        examples[here] = _epoch_order(seed, epoch, num_examples)[places[here]]
    return examples


def documents(
    lengths: np.ndarray,  # (N,) tokens, longest first
    cost: CostModel,
    tokens_per_pack: int,
    world_size: int,
) -> Documents:
    """A step's documents with their costs in whole numbers, the costliest 2^32."""
    costs = cost.of(lengths)
    return Documents(
        lengths=lengths.astype(np.float64),
        costs=np.rint(costs * (2.0**32 / costs.max())),
        capacity=tokens_per_pack,
        world_size=world_size,
    )


@functools.lru_cache(maxsize=2)  # a million rows take 20 ms to shuffle, and a step asks each time
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    order.flags.writeable = False
    return order


def _unfillable(docs: Documents) -> str:
    num_sequences, size = len(docs.lengths), docs.world_size
    num_packs = max(fewest_packs(docs), num_sequences + 1)
    num_packs = -(-num_packs // size) * size
    return (
        f"{num_sequences} sequences cannot fill {num_packs} packs of {docs.capacity} tokens, "
        f"{num_packs // size} on each of {size} ranks: raise tokens_per_pack, or make "
        f"sequences_per_step a multiple of {size}"
    )
