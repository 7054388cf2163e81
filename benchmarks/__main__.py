"""`python -m longcot.benchmarks NAME`: measure one thing; `--json` ends with a line of JSON."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any


def _weights(arguments: argparse.Namespace) -> dict[str, Any]:
    from .weights import measure  # imports torch; `--help` does not need it

    return measure(num_ranks=arguments.ranks, checkpoint_gb=arguments.gigabytes)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"weights": _weights}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longcot.benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--json", action="store_true", help="print the figures as one line of JSON")
    parser.add_argument("--ranks", type=int, default=2, help="weights: processes that load")
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="weights: size of the checkpoint made for it"
    )
    arguments = parser.parse_args()
    try:
        figures = BENCHMARKS[arguments.name](arguments)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"longcot.benchmarks: {error}")
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
