"""What is in a data set, for people, before they spend a GPU day on it: `longcot.data inspect`.

Lengths, what was left out and why, how the packs fill and the ranks balance, how many steps and
tokens an epoch is, and one row decoded with what is learnt marked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .chat import marked
from .packing import CostModel, StepPlan, plan_step
from .tokenized import TokenizedDataset, describe

_BINS = 12
_BAR_CHARACTERS = 50
_MAX_STEPS = 100
"""Steps that are planned, spread over the epoch; a plan of 256 rows takes milliseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """How the rows would be cut into steps."""

    sequences_per_step: int
    tokens_per_pack: int
    world_size: int
    cost: CostModel
    seed: int | None


def report(dataset: TokenizedDataset, steps: Steps, *, colour: bool) -> str:
    """Everything, as text.

    Raises:
        ValueError: fewer rows than a step takes, or a step that cannot be packed.
    """
    sections = [
        ("Rows", describe(dataset)),
        ("Lengths", length_lines(dataset)),
        ("Steps", step_lines(dataset, steps)),
        (
            f"The first row; what is learnt {'in green' if colour else 'between the quotes'}",
            [marked(dataset.manifest["example"], colour=colour)],
        ),
    ]
    return "\n\n".join("\n".join([f"{name}:", *lines]) for name, lines in sections)


def length_lines(dataset: TokenizedDataset) -> list[str]:
    """Percentiles of the rows' tokens and targets, and a histogram of their tokens."""
    marks = {"min": 0, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
    lines = ["           " + "".join(f"{name:>10}" for name in ("mean", *marks))]
    for name, values in (
        ("tokens", dataset.lengths),
        ("targets", dataset.num_targets),
        ("others", dataset.lengths - dataset.num_targets),
    ):
        found = np.percentile(values, list(marks.values()))
        lines.append(f"  {name:<9}" + "".join(f"{v:>10,.0f}" for v in [values.mean(), *found]))
    lengths = dataset.lengths
    counts, edges = np.histogram(lengths, bins=_BINS, range=(0, int(lengths.max()) + 1))
    lines.append("")
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        bar = "#" * -(-count * _BAR_CHARACTERS // int(counts.max()))
        lines.append(f"  {low:>8,.0f} to {high:>8,.0f} {count:>9,} {bar}")
    return lines


def step_lines(dataset: TokenizedDataset, steps: Steps) -> list[str]:
    """Steps and tokens of an epoch; how full packs are, and how evenly ranks are loaded."""
    num_rows, lengths = len(dataset), dataset.lengths
    if num_rows < steps.sequences_per_step:
        raise ValueError(
            f"the data has {num_rows} usable rows, sequences_per_step is "
            f"{steps.sequences_per_step}: a step would take rows twice, lower it to at most "
            f"{num_rows}"
        )
    whole_steps = num_rows // steps.sequences_per_step
    planned = np.unique(np.linspace(0, whole_steps - 1, _MAX_STEPS).round().astype(int))
    plans = [_plan(dataset, lengths, steps, step) for step in planned.tolist()]
    num_packs = np.array([sum(map(len, plan.packs)) for plan in plans])
    tokens = np.array([plan.num_tokens for plan in plans])
    fill = tokens.sum() / (num_packs.sum() * steps.tokens_per_pack)
    micro_steps = num_packs // steps.world_size
    what = "all steps" if len(plans) == whole_steps else f"{len(plans)} of {whole_steps:,} steps"
    return [
        f"  an epoch: {num_rows / steps.sequences_per_step:,.2f} steps of "
        f"{steps.sequences_per_step:,} rows, {len(dataset.tokens):,} tokens, "
        f"{int(dataset.num_targets.sum()):,} of them targets",
        f"  a step: {tokens.mean():,.0f} tokens ({tokens.min():,} to {tokens.max():,}), "
        f"{micro_steps.mean():.1f} micro-steps of {steps.world_size} packs "
        f"({micro_steps.min()} to {micro_steps.max()})",
        f"  packs of {steps.tokens_per_pack:,} tokens are {fill:.1%} full",
        f"  ranks work {_balance(plans, lengths, steps.cost):.1%} of the time that the costliest "
        "pack of each micro-step takes",
        f"  ({what} planned, seed {steps.seed})",
    ]


def _plan(dataset: TokenizedDataset, lengths: np.ndarray, steps: Steps, step: int) -> StepPlan:
    return plan_step(
        step,
        lengths=lengths,
        num_targets=dataset.num_targets,
        sequences_per_step=steps.sequences_per_step,
        tokens_per_pack=steps.tokens_per_pack,
        world_size=steps.world_size,
        cost=steps.cost,
        seed=steps.seed,
    )


def _balance(plans: Sequence[StepPlan], lengths: np.ndarray, cost: CostModel) -> float:
    """Mean over ranks of the cost of their packs, over that of the costliest, micro-step for
    micro-step.
    """
    useful = waited = 0.0
    for plan in plans:
        costs = np.array(
            [[cost.of(lengths[list(pack)]).sum() for pack in rank] for rank in plan.packs]
        )  # (ranks, micro-steps)
        useful += float(costs.mean(axis=0).sum())
        waited += float(costs.max(axis=0).sum())
    return useful / waited
