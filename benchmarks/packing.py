"""How evenly and how fully a step's documents are packed, against two published rules.

    imbalance = (sum over micro-steps of the slowest pack's FLOPs) / (all FLOPs / ranks)
    fill      = tokens / (micro-steps * ranks * tokens_per_pack)

An imbalance of 1.05 lets the ranks wait for 5 % of the step's ideal time. The FLOPs are the
model's, by `trainer.flops`. Everything here runs in one process on the CPU, on the same lengths;
every plan is checked before it is counted.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.packing import CostModel, documents, plan_step
from ..data.placement import fewest_packs, lower_bound
from ..trainer.families import base_config, decoder_config
from ..trainer.flops import document_flops
from .packing_rules import Packs, best_fit, karmarkar_karp, longest_first
from .supervisor import write_json
from .timing import environment

MODEL = "Qwen3-8B-Base"
SEQUENCES_PER_STEP = 256
TOKENS_PER_PACK = 32_768
WORLD_SIZES = (8, 64)
OURS = "longcot"
LIMITS = {"imbalance_8": 1.003, "imbalance_64": 1.015, "plan_seconds": 20.0}

RULES: dict[str, Callable[..., Packs]] = {
    "longest_first": longest_first,
    "verl_karmarkar_karp": karmarkar_karp,
    "trl_best_fit": best_fit,
}


def measure(
    *,
    seed: int,
    num_steps: int,
    num_planned_steps: int,
    num_other_steps: int,
    out: Path | None,
) -> dict[str, Any]:
    """All figures; a table to the console as they come.

    Raises:
        RuntimeError: a plan that is none.
    """
    cost = document_flops(decoder_config(base_config(MODEL)))
    figures: dict[str, Any] = {}
    rules: dict[str, dict[str, Any]] = {name: {} for name in RULES}
    lengths = draw_lengths("long_cot", num_planned_steps * SEQUENCES_PER_STEP, seed)
    for world_size in WORLD_SIZES:
        rows = [
            judged(lengths, step, world_size, cost, with_rules=step < num_steps)
            for step in range(num_planned_steps)
        ]
        seconds = [row["seconds"] for row in rows]
        figures[f"plan_seconds_{world_size}"] = round(sum(seconds), 3)
        figures[f"step_milliseconds_{world_size}"] = {
            "median": round(statistics.median(seconds) * 1e3, 2),
            "p95": round(float(np.percentile(seconds, 95)) * 1e3, 2),
            "max": round(max(seconds) * 1e3, 2),
        }
        for name, summary in summaries(rows[:num_steps]).items():
            target = figures if name == OURS else rules[name]
            target |= {f"{key}_{world_size}": value for key, value in summary.items()}
    figures["plan_seconds"] = max(figures[f"plan_seconds_{size}"] for size in WORLD_SIZES)
    show("long_cot", seed, {OURS: figures} | rules)
    others = [
        other_figures(name, other_seed, num_other_steps, cost)
        for name in DISTRIBUTIONS
        for other_seed in (seed, seed + 1, seed + 2)
    ]
    document = {
        **figures,
        "peers": rules,
        "others": others,
        "seed": seed,
        "model": MODEL,
        "sequences_per_step": SEQUENCES_PER_STEP,
        "tokens_per_pack": TOKENS_PER_PACK,
        "num_steps": num_steps,
        "num_planned_steps": num_planned_steps,
        "num_other_steps": num_other_steps,
        **environment(torch.device("cpu"), ("numpy", "torch")),
    }
    if out:
        write_json(out, document)
    return document


def failures(document: dict[str, Any]) -> list[str]:
    """Which limits were missed, and where a rule was better than ours on the main lengths."""
    missed = [
        f"{name} is {document[name]}, above {limit}"
        for name, limit in LIMITS.items()
        if document[name] > limit
    ]
    for name, rule in document["peers"].items():
        for size in WORLD_SIZES:
            if rule[f"imbalance_{size}"] < document[f"imbalance_{size}"]:
                missed.append(f"{name} has the better imbalance_{size}")
            is_fuller = rule[f"fill_{size}"] > document[f"fill_{size}"]
            # Packs above the limit are not fuller, they are out of memory.
            if is_fuller and not rule[f"overfull_packs_{size}"]:
                missed.append(f"{name} has the better fill_{size}")
    return missed


def other_figures(name: str, seed: int, num_steps: int, cost: CostModel) -> dict[str, Any]:
    """The figures of one distribution, ours and the rules'."""
    lengths = draw_lengths(name, num_steps * SEQUENCES_PER_STEP, seed)
    row: dict[str, Any] = {"distribution": name, "seed": seed}
    by_rule: dict[str, dict[str, Any]] = {}
    for world_size in WORLD_SIZES:
        rows = [judged(lengths, s, world_size, cost, with_rules=True) for s in range(num_steps)]
        for rule, summary in summaries(rows).items():
            figures = {f"{key}_{world_size}": value for key, value in summary.items()}
            by_rule[rule] = by_rule.get(rule, {}) | figures
    show(name, seed, by_rule)
    return row | by_rule


def judged(
    lengths: np.ndarray, step: int, world_size: int, cost: CostModel, *, with_rules: bool
) -> dict[str, Any]:
    """Figures of one step: ours under `longcot`, with the seconds it took, and the rules'."""
    started = time.perf_counter()
    plan = plan_step(
        step,
        lengths=lengths,
        num_targets=lengths,
        sequences_per_step=SEQUENCES_PER_STEP,
        tokens_per_pack=TOKENS_PER_PACK,
        world_size=world_size,
        cost=cost,
        seed=None,
    )
    seconds = time.perf_counter() - started
    first = step * SEQUENCES_PER_STEP
    here = lengths[first : first + SEQUENCES_PER_STEP]
    ours = [[[i - first for i in pack] for pack in rank] for rank in plan.packs]
    costs = cost.of(here)
    docs = documents(np.sort(here)[::-1], cost, TOKENS_PER_PACK, world_size)
    row = {
        "seconds": seconds,
        "lower_bound": lower_bound(docs) * world_size / float(docs.costs.sum()),
        "least_rounds": -(-fewest_packs(docs) // world_size),
        OURS: weighed(ours, here, costs),
    }
    if row[OURS]["overfull"]:
        raise RuntimeError(f"step {step} on {world_size} ranks has packs over the limit")
    if with_rules:
        for name, rule in RULES.items():
            packs = rule(here, cost, TOKENS_PER_PACK, world_size)
            row[name] = weighed(packs, here, costs)
    return row


def weighed(packs: Packs, lengths: np.ndarray, costs: np.ndarray) -> dict[str, Any]:
    """Figures of one plan, `packs[rank][micro_step]`; a rank may have fewer micro-steps.

    Raises:
        RuntimeError: a document is missing, or is there twice.
    """
    shown = sorted(i for rank in packs for pack in rank for i in pack)
    if shown != list(range(len(lengths))):
        raise RuntimeError("a plan lacks a document, or has one twice")
    rounds = max(len(rank) for rank in packs)
    loads = np.zeros((len(packs), rounds))
    overfull = 0
    for r, rank in enumerate(packs):
        for m, pack in enumerate(rank):
            loads[r, m] = costs[pack].sum()
            overfull += int(lengths[pack].sum()) > TOKENS_PER_PACK
    return {
        "imbalance": float(loads.max(axis=0).sum() * len(packs) / loads.sum()),
        "fill": float(lengths.sum() / (rounds * len(packs) * TOKENS_PER_PACK)),
        "overfull": overfull,
        "rounds": rounds,
    }


def summaries(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the steps, and the worst step, of ours and of each rule that ran."""
    result = {}
    for name in (OURS, *RULES):
        figures = [row[name] for row in rows]
        imbalances = [figure["imbalance"] for figure in figures]
        result[name] = {
            "imbalance": round(statistics.mean(imbalances), 5),
            "worst_imbalance": round(max(imbalances), 5),
            "fill": round(statistics.mean(figure["fill"] for figure in figures), 5),
        }
        if name == OURS:
            bounds = [row["lower_bound"] for row in rows]
            above = [i / bound for i, bound in zip(imbalances, bounds, strict=True)]
            result[name] |= {
                "lower_bound": round(statistics.mean(bounds), 5),
                "worst_above_bound": round(max(above), 5),
                "most_extra_rounds": max(row[name]["rounds"] - row["least_rounds"] for row in rows),
            }
        else:
            result[name]["overfull_packs"] = sum(figure["overfull"] for figure in figures)
    return result


def show(name: str, seed: int, by_rule: dict[str, dict[str, Any]]) -> None:
    for rule, figures in by_rule.items():
        cells = [
            f"{size} ranks: imbalance {figures[f'imbalance_{size}']:.4f} "
            f"(worst {figures[f'worst_imbalance_{size}']:.4f}), fill {figures[f'fill_{size}']:.3f}"
            for size in WORLD_SIZES
        ]
        print(f"{name} {seed} {rule:20} {'; '.join(cells)}", flush=True)


def draw_lengths(name: str, count: int, seed: int) -> np.ndarray:
    """(count,) tokens of each document, drawn like the named distribution."""
    draw = np.random.default_rng(seed)
    parts: Iterable[np.ndarray] = (
        DISTRIBUTIONS[name](draw) for _ in range(-(-count // SEQUENCES_PER_STEP))
    )
    lengths = np.concatenate(list(parts))[:count].astype(np.int64)
    return np.clip(lengths, 1, TOKENS_PER_PACK)


def _log_normal(draw: np.random.Generator, median: float, sigma: float, most: float) -> np.ndarray:
    return np.clip(np.exp(draw.normal(np.log(median), sigma, SEQUENCES_PER_STEP)), 16, most)


def _some(draw: np.random.Generator, few: int, long: float, rest: np.ndarray) -> np.ndarray:
    return draw.permutation(np.append(np.full(few, long), rest[few:]))


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "long_cot": lambda draw: _log_normal(draw, 5_000, 0.7, 20_000),
    "log_normal_wide": lambda draw: _log_normal(draw, 4_000, 1.3, 32_768),
    "equal": lambda draw: np.full(SEQUENCES_PER_STEP, draw.integers(100, 16_000)),
    "nearly_equal": lambda draw: draw.integers(5_900, 6_100, SEQUENCES_PER_STEP),
    "uniform": lambda draw: draw.integers(16, 16_384, SEQUENCES_PER_STEP),
    "uniform_to_a_pack": lambda draw: draw.integers(16, 32_768, SEQUENCES_PER_STEP),
    "bimodal": lambda draw: np.where(
        draw.random(SEQUENCES_PER_STEP) < draw.random(),
        draw.integers(14_000, 18_000, SEQUENCES_PER_STEP),
        draw.integers(300, 900, SEQUENCES_PER_STEP),
    ),
    "three_lengths": lambda draw: draw.choice(draw.integers(100, 16_000, 3), SEQUENCES_PER_STEP),
    "few_giants": lambda draw: _some(
        draw, int(draw.integers(1, 20)), 32_768, _log_normal(draw, 2_000, 0.5, 32_768)
    ),
    "one_huge_many_tiny": lambda draw: _some(draw, 1, 32_768, draw.integers(50, 200, 256)),
    "heavy_tail": lambda draw: 500 * (draw.pareto(1.1, SEQUENCES_PER_STEP) + 1),
    "full_packs": lambda draw: np.concatenate(
        [draw.multinomial(32_500, np.full(4, 0.25)) for _ in range(SEQUENCES_PER_STEP // 4)]
    ),
}
"""Each call draws the lengths of one step."""
