"""`python -m longcot.kernels`: what every Triton kernel takes of every GPU, without having one.

Compiles each kernel in every configuration that can be picked for the known bases, for sm_80,
sm_90 and sm_100. Exits with 1 if one spills or does not fit.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longcot.kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the table as one line of JSON")
    arguments = parser.parse_args()
    import triton  # slow to import: not for `--help`

    rows = table()
    failing = [row for row in rows if row["obstacles"]]
    if arguments.json:
        print(json.dumps({"triton": triton.__version__, "rows": rows}))
    else:
        print(f"Triton {triton.__version__}; registers and spilled bytes are of a thread")
        print(
            f"{'sm':>4} {'ctas':>4} {'warps':>5} {'regs':>5} {'spill':>5} {'shared':>7}  launches"
        )
        for row in rows:
            more = len(row["launches"]) - 1
            print(
                f"{row['capability']:>4} {row['num_ctas']:>4} {row['num_warps']:>5} "
                f"{row['registers']:>5} {row['spill_bytes']:>5} {row['shared_bytes']:>7}  "
                f"{row['launches'][0]}{f' and {more} more' if more else ''}"
                f"{' <- ' if row['obstacles'] else ''}{'; '.join(row['obstacles'])}"
            )
        print(f"{len(rows)} binaries, {len(failing)} of which must not be picked")
    sys.exit(1 if failing else 0)


def table() -> list[dict[str, Any]]:
    """A row for each binary, with the names of all launches that share it.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    from .ahead_of_time import CAPABILITIES, compile_for, launches

    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for capability in CAPABILITIES:
        for name, launch in launches(capability):
            resources = compile_for(capability, launch)
            key = (capability, resources.binary)
            if key not in rows:
                rows[key] = {"capability": capability, "launches": []} | asdict(resources)
                rows[key]["obstacles"] = resources.obstacles(capability)
            rows[key]["launches"].append(name)
    return list(rows.values())


if __name__ == "__main__":
    main()
