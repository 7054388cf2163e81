"""A chunk of rows as a shard of token ids: what one process makes at a time, kept until all are
there.

A shard is one file, written beside its place and renamed, so that an interrupted build goes on with
those that are finished. The processes get their chunks through pipes: a killed one is noticed at
once, and when their parent is killed they end.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from tiktoken import Encoding

from .chat import encode, render, show_targets
from .columns import to_example
from .examples import Example
from .ledger import Entry, entry_of
from .rules import Rules
from .sources import Chunk, Row, read_chunk

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 2**20
DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every process of a build knows."""

    folder: Path
    tokenizer: Any
    """Loaded once: it travels to the processes, which need not import what loading it does."""
    fast: Encoding | None
    """The same in tiktoken, where that is exact."""
    rules: Rules
    max_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The rows of one chunk."""

    tokens: np.ndarray  # uint32, flat
    is_target: np.ndarray  # bool, flat
    lengths: np.ndarray  # (n,) int64
    weights: np.ndarray  # (n,) float32
    digests: np.ndarray  # (n, 16) uint8, equal for equal tokens and targets
    ids: list[str]
    places: list[str]
    entries: list[Entry]
    example: list[tuple[str, bool]]
    """The first row, decoded; see `chat.show_targets`."""


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npz"


def tokenize_chunks(job: Job, chunks: Sequence[Chunk], num_processes: int) -> Iterator[int]:
    """Make the shards that are not there yet; yields the number of tokens of each.

    With one process, or one chunk, the work is done here, by the tokenizer's own threads.

    Raises:
        ValueError: a row that the rules refuse; it is named.
        ChildProcessError: a process was killed or failed; finished shards stay.
        OSError: the folder cannot be written.
    """
    missing = [i for i in range(len(chunks)) if not shard_path(job.folder, i).exists()]
    if min(num_processes, len(missing)) <= 1:
        for index in missing:
            yield make_shard(job, chunks[index], index)
        return
    processes: dict[Any, subprocess.Popen[bytes]] = {}
    waiting = iter(missing)
    try:
        for _ in range(min(num_processes, len(missing))):
            connection, process = _start(job)
            processes[connection] = process
            _give(connection, process, waiting, chunks)
        for _ in missing:
            connection: Any = wait(list(processes))[0]
            num_tokens = _take(connection, processes[connection])
            _give(connection, processes[connection], waiting, chunks)
            yield num_tokens
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
        for process in processes.values():
            process.wait()


def _start(job: Job) -> tuple[Any, subprocess.Popen[bytes]]:
    """A process that waits for chunks, and our end of the pipe to it.

    Neither fork nor multiprocessing's spawn: the trainer's process has threads of torch and of the
    tokenizer, which hold locks; and spawn runs the caller's script again, which in one without a
    main guard would build, wait for our lock, and never end.
    """
    ours, theirs = multiprocessing.Pipe()
    code = f"from longcot.data.shards import work; work({theirs.fileno()})"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        # The tokenizer's only switch for its threads: each process keeps to one core.
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    theirs.close()  # so that its end is the only one, and closes with it
    try:
        ours.send(job)
    except BrokenPipeError as error:
        raise _ended(process) from error
    return ours, process


def _give(
    connection: Any,
    process: subprocess.Popen[bytes],
    waiting: Iterator[int],
    chunks: Sequence[Chunk],
) -> None:
    """Send a process its next chunk, if there is one."""
    index = next(waiting, None)
    if index is not None:
        try:
            connection.send((index, chunks[index]))
        except BrokenPipeError as error:
            raise _ended(process) from error


def _take(connection: Any, process: subprocess.Popen[bytes]) -> int:
    """The number of tokens of the shard that a process has finished.

    Raises:
        ValueError, OSError, ChildProcessError: as `tokenize_chunks`.
    """
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        raise _ended(process) from error
    if kind == "refused":
        raise ValueError(value)
    if kind == "os":
        raise OSError(value)
    if kind == "failed":
        raise ChildProcessError(f"a tokenizing process failed:\n{value}")
    return value


def _ended(process: subprocess.Popen[bytes]) -> ChildProcessError:
    code = process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return ChildProcessError(
        f"a tokenizing process {how} (out of memory?): finished shards are kept, start again to "
        "go on, with fewer processes if memory is short"
    )


def work(handle: int) -> None:
    """What a process runs: chunks in, shards to disk, sizes out; it ends when its parent does.

    Args:
        handle: file descriptor of its end of the pipe, inherited.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the parent, which ends us
    connection = Connection(handle)
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):  # the parent ended
        job = connection.recv()
        while True:
            index, chunk = connection.recv()
            try:
                reply: tuple[str, Any] = ("made", make_shard(job, chunk, index))
            except ValueError as error:
                reply = ("refused", str(error))
            except OSError as error:
                reply = ("os", str(error))
            except Exception:  # whatever it is, the parent must hear of it and not wait
                reply = ("failed", traceback.format_exc())
            connection.send(reply)


def make_shard(job: Job, chunk: Chunk, index: int) -> int:
    """Tokenize a chunk and publish its shard; returns its number of tokens."""
    maker = _ShardMaker(job)
    rules = job.rules
    for row in read_chunk(chunk, rules.prompt_column, rules.response_column):
        maker.add(row)
    shard = maker.finish()
    save_shard(shard_path(job.folder, index), shard)
    return len(shard.tokens)


class _ShardMaker:
    """Collects rows into batches for the tokenizer, and their tokens into a shard."""

    def __init__(self, job: Job) -> None:
        self._job, self._rules, self._tokenizer = job, job.rules, job.tokenizer
        self._waiting: list[tuple[Row, Example]] = []
        self._waiting_characters = 0
        self._tokens: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._weights: list[float] = []
        self._ids: list[str] = []
        self._places: list[str] = []
        self._entries: list[tuple[int, Entry]] = []  # with the number of the row

    def add(self, row: Row) -> None:
        rules = self._rules
        if row.values is None:
            self._refuse(row.problem, row, row.default_id)
            return
        try:
            example = to_example(
                row.values, row.default_id, rules.prompt_column, rules.response_column
            )
        except ValueError as error:
            given = row.values.get("id")
            id = str(given) if isinstance(given, str | int) else row.default_id
            self._refuse(str(error), row, id)
            return
        self._waiting.append((row, example))
        self._waiting_characters += len(example.response)
        if len(self._waiting) >= _BATCH_ROWS or self._waiting_characters >= _BATCH_CHARACTERS:
            self._flush()

    def finish(self) -> Shard:
        self._flush()
        lengths = np.array([len(tokens) for tokens in self._tokens], dtype=np.int64)
        digests = b"".join(
            hashlib.blake2b(tokens.tobytes() + mask.tobytes(), digest_size=DIGEST_BYTES).digest()
            for tokens, mask in zip(self._tokens, self._masks, strict=True)
        )
        first = self._tokens[:1], self._masks[:1]
        return Shard(
            tokens=np.concatenate([np.empty(0, np.uint32), *self._tokens]),
            is_target=np.concatenate([np.empty(0, np.bool_), *self._masks]),
            lengths=lengths,
            weights=np.array(self._weights, dtype=np.float32),
            digests=np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES),
            ids=self._ids,
            places=self._places,
            entries=[entry for _, entry in sorted(self._entries, key=lambda pair: pair[0])],
            example=show_targets(self._tokenizer, first[0][0], first[1][0]) if first[0] else [],
        )

    def _flush(self) -> None:
        rendered = []
        for row, example in self._waiting:
            try:
                rendered.append((row, example, render(self._tokenizer, example, self._rules)))
            except ValueError as error:
                self._refuse(str(error), row, example.id)
        encoded = encode(self._tokenizer, [text for _, _, text in rendered], self._job.fast)
        for (row, example, text), result in zip(rendered, encoded, strict=True):
            if isinstance(result, str):
                self._refuse(result, row, example.id)
                continue
            self._entries += [
                (row.number, entry_of(note, id=example.id, place=row.place, action="noted"))
                for note in text.notes
            ]
            self._keep(row, example, *result)
        self._waiting, self._waiting_characters = [], 0

    def _keep(self, row: Row, example: Example, tokens: np.ndarray, is_target: np.ndarray) -> None:
        num_tokens, most = len(tokens), self._job.max_tokens
        if num_tokens > most:
            reason = f"longer than {most} tokens"
            if self._rules.over_long == "error":
                raise ValueError(
                    f"{row.place}, id {example.id!r} has {num_tokens} tokens, {reason}: raise "
                    "tokens_per_pack, or set over_long to 'drop' or 'truncate'"
                )
            tokens, is_target = tokens[:most], is_target[:most]
            cut = self._rules.over_long == "truncate"
            if cut and not is_target.any():
                cut, reason = False, f"prompt {reason}"
            entry = Entry(
                id=example.id, place=row.place, action="cut" if cut else "dropped",
                reason=reason, tokens=num_tokens,
            )  # fmt: skip
            self._entries.append((row.number, entry))
            if not cut:
                return
        self._tokens.append(tokens)
        self._masks.append(is_target)
        self._weights.append(example.weight)
        self._ids.append(example.id)
        self._places.append(row.place)

    def _refuse(self, problem: str, row: Row, id: str) -> None:
        if self._rules.on_bad_row == "error":
            named = "" if id == row.default_id else f", id {id!r}"
            raise ValueError(
                f"{row.place}{named}: {problem} (repair it, or set on_bad_row to 'drop' to leave "
                "such rows out)"
            )
        self._entries.append((row.number, entry_of(problem, id=id, place=row.place)))


def save_shard(path: Path, shard: Shard) -> None:
    """Write a shard beside its place, then rename it."""
    words = {
        "ids": shard.ids,
        "places": shard.places,
        "entries": [asdict(entry) for entry in shard.entries],
        "example": shard.example,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(
                file,
                words=np.frombuffer(json.dumps(words).encode(), np.uint8),
                **{name: getattr(shard, name) for name in _ARRAYS},
            )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # numpy's names neither the file nor the reason
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error


_ARRAYS = ("tokens", "is_target", "lengths", "weights", "digests")


def load_shard(path: Path) -> Shard:
    """Read a shard back; its checksums are verified by the archive.

    Raises:
        ValueError: it is damaged.
    """
    arrays, words = _read(path, lambda file: ({n: file[n] for n in _ARRAYS}, file["words"]))
    values = json.loads(words.tobytes())
    entries = [Entry(**entry) for entry in values.pop("entries")]
    return Shard(**arrays, entries=entries, **values)


def load_digests(path: Path) -> np.ndarray:
    """Only the (n, 16) digests of a shard's rows."""
    return _read(path, lambda file: file["digests"])


def _read(path: Path, read: Callable[[Any], Any]) -> Any:
    try:
        with np.load(path) as file:
            return read(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, and start again to make it anew"
        ) from error
