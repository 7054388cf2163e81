"""`python -m longcot.benchmarks NAME`: measure one thing; `--json` ends with a line of JSON."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# The benchmarks import torch, inside functions here: `--help` does not need it.


def _weights(arguments: argparse.Namespace) -> list[str]:
    from .weights import measure

    figures = measure(num_ranks=arguments.ranks, checkpoint_gb=arguments.gigabytes)
    if not arguments.json:
        for name, value in figures.items():
            print(f"{name}: {value}")
    return _finish(arguments, figures, [])


def _linear_cross_entropy(arguments: argparse.Namespace) -> list[str]:
    from .linear_cross_entropy import failures, measure

    document = measure(
        shapes=arguments.shapes,
        tokens=arguments.tokens,
        patterns=arguments.variants,
        device_type=arguments.device,
        dtype_name=arguments.dtype,
        masked=arguments.masked,
        num_rounds=arguments.rounds,
        seconds=arguments.seconds,
        patience_seconds=arguments.patience,
        out=arguments.out,
        commit=arguments.commit,
    )
    return _finish(arguments, document, failures(document))


def _packing(arguments: argparse.Namespace) -> list[str]:
    from .packing import failures, measure

    document = measure(
        seed=arguments.seed,
        num_steps=arguments.steps,
        num_planned_steps=max(arguments.steps, arguments.planned_steps),
        num_other_steps=arguments.other_steps,
        out=arguments.out,
    )
    return _finish(arguments, document, failures(document))


def _tokenizing(arguments: argparse.Namespace) -> list[str]:
    from .tokenizing import failures, measure, table

    document = measure(
        num_rows=arguments.rows,
        num_processes=arguments.processes,
        num_rounds=arguments.rounds,
        seconds=arguments.seconds,
        out=arguments.out,
    )
    if not arguments.json:
        print("\n".join(table(document)))
    return _finish(arguments, document, failures(document))


def _finish(arguments: argparse.Namespace, figures: Any, failures: list[str]) -> list[str]:
    if arguments.json:
        print(json.dumps(figures))
    return failures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m longcot.benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")

    weights = names.add_parser("weights", help="loading a checkpoint into shards")
    weights.set_defaults(run=_weights)
    weights.add_argument("--ranks", type=int, default=2, help="processes that load")
    weights.add_argument(
        "--gigabytes", type=float, default=2.0, help="size of the checkpoint made for it"
    )

    head = names.add_parser("linear_cross_entropy", help="the head's loss and both gradients")
    head.set_defaults(run=_linear_cross_entropy)
    add = head.add_argument
    add(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help="names of bases, DxV, or `reduced`; all bases on a GPU, `reduced` on a CPU",
    )
    add("--tokens", nargs="+", type=int, metavar="T", help="rows; 16384 on a GPU, 256 on a CPU")
    add("--variants", nargs="+", default=["*"], metavar="NAME", help="which; * matches anything")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("bfloat16", "float32"), help="bfloat16 on a GPU, float32 on a CPU")
    add("--masked", type=float, default=0.0, help="fraction of the rows that have no target")
    add("--rounds", type=int, help="timed rounds, fewer where time runs out; 12, 5 on a CPU")
    add("--seconds", type=float, default=540.0, help="for everything, shared by the shapes")
    add(
        "--patience",
        type=float,
        default=180.0,
        help="seconds that one call, compilation included, may take before it is left out",
    )
    add("--out", type=Path, help="JSON file, written after each shape")
    add("--commit", help="recorded where the tree is not a git checkout")  # fmt: skip

    packing = names.add_parser("packing", help="how evenly and fully documents are packed")
    packing.set_defaults(run=_packing)
    packing.add_argument("--seed", type=int, default=0, help="of the lengths drawn")
    packing.add_argument("--steps", type=int, default=80, help="steps that figures are means of")
    packing.add_argument("--planned-steps", type=int, default=640, help="steps planned for time")
    packing.add_argument("--other-steps", type=int, default=6, help="steps of other distributions")
    packing.add_argument("--out", type=Path, help="JSON file, written at the end")
    tokenizing = names.add_parser("tokenizing", help="rows to token ids, against datasets.map")
    tokenizing.set_defaults(run=_tokenizing)
    tokenizing.add_argument("--rows", type=int, default=2000, help="of about 21,500 characters")
    tokenizing.add_argument("--processes", type=int, default=2, help="for each of the variants")
    tokenizing.add_argument("--rounds", type=int, default=5, help="timed rounds")
    tokenizing.add_argument("--seconds", type=float, default=540.0, help="for all rounds")
    tokenizing.add_argument("--out", type=Path, help="JSON file")
    for command in (weights, head, packing, tokenizing):
        command.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    try:
        failures = arguments.run(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"longcot.benchmarks: {error}")
    if failures:
        sys.exit(f"longcot.benchmarks: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
