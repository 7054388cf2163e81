"""Started by test_builds.py: a build of its own, which may pause after a number of shards.

build_worker.py SOURCE OUT TOKENIZER PROCESSES CHUNK_BYTES [PAUSE_AFTER]

Prints a line for each shard. At the pause it prints its processes and waits for a line on stdin; at
the end it prints what it sees of the dataset, and how far its memory rose.
"""

import json
import resource
import sys
from pathlib import Path

from longcot.data import tokenized
from longcot.data.sources import open_source, scan


def main(
    source: str, out: str, tokenizer: str, processes: str, size: str, pause: str = "0"
) -> None:
    tokenize_chunks = tokenized.tokenize_chunks

    def announced(*arguments):
        for number, num_tokens in enumerate(tokenize_chunks(*arguments), start=1):
            say(shard=number)
            if number == int(pause):
                say(processes=children())
                sys.stdin.readline()
            yield num_tokens

    tokenized.tokenize_chunks = announced
    dataset = tokenized.open_or_build(
        Path(out),
        scan(open_source(source), int(size)),
        tokenizer_path=Path(tokenizer),
        max_tokens=100_000,
        num_processes=int(processes),
    )
    say(
        rows=len(dataset),
        inode=(Path(out) / "tokens.npy").stat().st_ino,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def children() -> list[int]:
    return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]


def say(**values) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
