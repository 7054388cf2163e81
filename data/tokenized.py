"""Tokenized rows on disk: flat token ids, mapped into memory, and a ledger of every row that was
left out.

tokens.npy (all ids, uint32)     is_target.npy (bool, as long)     offsets.npy (N + 1, int64)
num_targets.npy (N, int64)       weights.npy (N, float32)
ledger.jsonl (an entry per line) manifest.json (what it was made from, totals, checksums)

N rows. A build makes shards, each by one process, in a folder beside the place of the result, and
joins them at the end; one build of a folder runs at a time.
"""

import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from .byte_pairs import find_encoding
from .chat import load_tokenizer
from .files import checksum, publish_directory, remove_partials, write_json_atomic
from .ledger import Entry, Ledger, summary_lines
from .progress import Progress
from .rules import Rules
from .shards import (
    DIGEST_BYTES,
    Job,
    Shard,
    load_digests,
    load_shard,
    shard_path,
    tokenize_chunks,
)
from .sources import Scan, Source, check_table

FORMAT = 2
Encoder = Literal["auto", "tokenizers"]
ARRAYS = {
    "tokens": np.uint32,
    "is_target": np.bool_,
    "offsets": np.int64,
    "num_targets": np.int64,
    "weights": np.float32,
}
MAX_PROCESSES = 32
PACKAGES = ("tokenizers", "tiktoken", "transformers")
# A process takes a second to start, in which one that runs does as much as this.
BYTES_PER_PROCESS = 16 * 2**20
# Whatever of a tokenizer's folder can change its ids; the weights beside them are not read.
_TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
_NOT_TOKENIZER = {"config.json", "generation_config.json"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedDataset:
    """N rows; row i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: np.ndarray  # flat, uint32
    is_target: np.ndarray  # flat, bool: the token is learnt
    offsets: np.ndarray  # (N + 1,) int64
    num_targets: np.ndarray  # (N,) int64
    weights: np.ndarray  # (N,) float32
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.num_targets)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each row, prompt and response."""
        return np.diff(self.offsets)

    def row(self, index: int) -> np.ndarray:
        """Token ids of one row."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def target_mask(self, index: int) -> np.ndarray:
        """Which tokens of one row are learnt, bool."""
        return self.is_target[self.offsets[index] : self.offsets[index + 1]]


def open_or_build(
    folder: Path,
    scanned: Scan,
    *,
    tokenizer_path: Path,
    max_tokens: int,
    rules: Rules | None = None,
    num_processes: int | None = None,
    encoder: Encoder = "auto",
) -> TokenizedDataset:
    """The dataset in `folder`, built first if it is absent, damaged, or made from something else.

    Call it on one process; the others call `open_dataset` when it is done. Where another process
    builds the same folder, this one waits for it.

    Args:
        max_tokens: what happens to longer rows, `rules.over_long` says.
        num_processes: that tokenize; None: one for each core that this process may use, fewer for
            little data.
        encoder: `auto` encodes by tiktoken where that gives the same ids.

    Raises:
        ValueError: a malformed source or tokenizer, a row that the rules refuse, or no row left to
            train on.
        ChildProcessError: a tokenizing process was killed.
        OSError: a file cannot be read or written.
    """
    rules = rules or Rules()
    check_table(scanned.source, rules.prompt_column, rules.response_column)
    tokenizer = load_tokenizer(str(tokenizer_path), needs_chat_template=rules.needs_chat_template)
    key = {
        "format": FORMAT,
        "source_sha256": scanned.digests,
        "revision": scanned.source.revision,
        **_tokenizer_key(tokenizer_path, tokenizer),
        "max_tokens": max_tokens,
        # Whether refused rows end the work is asked of the finished ledger, not of the rows.
        "rules": {name: value for name, value in asdict(rules).items() if name != "on_bad_row"},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        remove_partials(folder.parent)
        dataset = _usable(folder, key)
        if dataset is None:
            shards = _shard_folder(folder, {**key, "chunk_bytes": scanned.chunk_bytes})
            fast, why = find_encoding(tokenizer) if encoder == "auto" else (None, "asked for")
            print(f"encoding by {'tiktoken' if fast else 'tokenizers'} ({why})", flush=True)
            job = Job(
                folder=shards, tokenizer=tokenizer, fast=fast, rules=rules, max_tokens=max_tokens
            )
            if num_processes is None:
                cores = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
                num_processes = max(1, min(cores, scanned.num_bytes // BYTES_PER_PROCESS))
            _build(folder, key, scanned, job, num_processes)
            dataset = open_dataset(folder)
    ledger = dataset.manifest["ledger"]
    if rules.on_bad_row == "error" and ledger["refused"]:
        reasons = [s for s in ledger["reasons"] if s["action"] == "refused"]
        first = "; ".join(f"{s['reason']}: {s['first'][0]['id']}" for s in reasons[:3])
        raise ValueError(
            f"{ledger['refused']} rows of {scanned.source.path} cannot be used ({first}), all are "
            f"in {folder / 'ledger.jsonl'}: repair them, or set on_bad_row to 'drop'"
        )
    return dataset


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time; the lock of a killed one is free."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process builds {folder}: waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def open_dataset(folder: Path, *, verify: bool = False) -> TokenizedDataset:
    """Map a finished dataset.

    Args:
        verify: compare the checksums too, which reads every byte.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files are not those its manifest describes.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.get("key", {}).get("format") != FORMAT:
        raise ValueError(f"{folder} was written by another version: remove the folder")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    sizes = {name: len(array) for name, array in arrays.items()}
    if sizes != manifest["sizes"]:
        raise ValueError(
            f"{folder} holds {sizes}, its manifest says {manifest['sizes']}: remove the folder"
        )
    if verify:
        for name, expected in manifest["sha256"].items():
            if checksum(folder / name) != expected:
                raise ValueError(f"{folder / name} is damaged, its checksum differs: remove it")
    return TokenizedDataset(**arrays, manifest=manifest)


def key_digest(manifest: dict[str, Any]) -> str:
    """Equal for datasets made from the same rows, tokenizer and rules."""
    return sha256(json.dumps(manifest["key"], sort_keys=True).encode()).hexdigest()


def describe(dataset: TokenizedDataset) -> list[str]:
    """What training and `inspect` say of it at start-up: sizes, then the ledger's totals."""
    manifest = dataset.manifest
    return [
        f"{len(dataset):,} rows, {len(dataset.tokens):,} tokens, {manifest['targets']:,} of them "
        "targets",
        *summary_lines(manifest["ledger"]),
        *manifest["notes"],
    ]


def _usable(folder: Path, key: dict[str, Any]) -> TokenizedDataset | None:
    """The finished dataset, if it is whole and was made from just this."""
    if not folder.exists():
        return None
    try:
        dataset = open_dataset(folder, verify=True)
    except (OSError, ValueError) as error:
        print(f"{folder} is built anew: {error}", flush=True)
        return None
    if dataset.manifest["key"] == key:
        return dataset
    old = dataset.manifest["key"]
    differing = [name for name in key if old.get(name) != key[name]]
    print(f"{folder} is built anew: another {', '.join(differing)}", flush=True)
    return None


def _tokenizer_key(path: Path, tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer_sha256": {
            file.name: checksum(file)
            for file in sorted(path.iterdir())
            if file.suffix in _TOKENIZER_SUFFIXES
            and file.name not in _NOT_TOKENIZER
            and not file.name.endswith(".index.json")
        },
        "template_sha256": sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    }


def _shard_folder(folder: Path, key: dict[str, Any]) -> Path:
    """Where the shards of this build are; those of builds from something else are removed."""
    digest = key_digest({"key": key})[:16]
    ours = folder.with_name(f".{folder.name}.shards-{digest}")
    for other in folder.parent.glob(f".{folder.name}.shards-*"):
        if other != ours:
            shutil.rmtree(other, ignore_errors=True)
    ours.mkdir(exist_ok=True)
    return ours


def _build(
    folder: Path,
    key: dict[str, Any],
    scanned: Scan,
    job: Job,
    num_processes: int,
) -> None:
    source, chunks = scanned.source, scanned.chunks
    started = time.perf_counter()
    found = sum(shard_path(job.folder, i).exists() for i in range(len(chunks)))
    if found:
        print(f"{folder}: going on, {found} of {len(chunks)} shards are there", flush=True)
    label = f"tokenizing {source.path}"
    with Progress(label, len(chunks) - found, rate_unit="tokens") as progress:
        for num_tokens in tokenize_chunks(job, chunks, num_processes):
            progress.advance(1, num_tokens)
    with publish_directory(folder) as partial:
        joined = _join(partial, job, len(chunks), source)
        manifest = {
            "key": key,
            "source": {"path": source.path, "kind": source.kind, "revision": source.revision},
            **joined,
            "sha256": {f"{name}.npy": checksum(partial / f"{name}.npy") for name in ARRAYS},
            "notes": _notes(job),
            "versions": {n: importlib.metadata.version(n) for n in PACKAGES},
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_json_atomic(partial / "manifest.json", manifest)
    shutil.rmtree(job.folder)


def _notes(job: Job) -> list[str]:
    """What about a template cannot be seen in one row."""
    if job.rules.needs_chat_template and "strftime_now" in str(job.tokenizer.chat_template):
        return [
            "the chat template writes today's date into prompts: token ids depend on the day they "
            "were made"
        ]
    return []


def _join(partial: Path, job: Job, num_shards: int, source: Source) -> dict[str, Any]:
    """Write the arrays and the ledger of all shards, one in memory at a time."""
    paths = [shard_path(job.folder, i) for i in range(num_shards)]
    repeats = _repeats(paths)
    drop_repeats = job.rules.duplicates == "drop"
    writers = {name: _ArrayFile(partial / f"{name}.npy", kind) for name, kind in ARRAYS.items()}
    ledger = Ledger(partial / "ledger.jsonl")
    writers["offsets"].append(np.zeros(1, np.int64))
    first_row = num_tokens = num_targets = 0
    example: list[Any] = []
    first_ids: dict[int, str] = {}
    wanted_ids = set(repeats.values())
    for path in paths:
        shard = load_shard(path)
        rows = range(first_row, first_row + len(shard.ids))
        first_ids.update({row: shard.ids[row - first_row] for row in rows if row in wanted_ids})
        ledger.add(shard.entries)
        ledger.add(_repeat_entries(shard, rows, repeats, first_ids, drop_repeats))
        keep = np.array([not (drop_repeats and row in repeats) for row in rows], dtype=np.bool_)
        in_kept_rows = keep.repeat(shard.lengths)
        ends = shard.lengths.cumsum()
        counts = np.diff(np.append(0, shard.is_target.cumsum())[np.append(0, ends)])
        writers["tokens"].append(shard.tokens[in_kept_rows])
        writers["is_target"].append(shard.is_target[in_kept_rows])
        writers["offsets"].append(num_tokens + shard.lengths[keep].cumsum())
        writers["num_targets"].append(counts[keep])
        writers["weights"].append(shard.weights[keep])
        num_tokens += int(shard.lengths[keep].sum())
        num_targets += int(counts[keep].sum())
        example = example or shard.example
        first_row = rows.stop
    sizes = {name: writer.close() for name, writer in writers.items()}
    totals = ledger.close()
    if sizes["num_targets"] == 0:
        reasons = {
            s["reason"]: s["rows"]
            for s in totals["reasons"]
            if s["action"] in ("dropped", "refused")
        }
        raise ValueError(f"{source.path}: no row left to train on; dropped: {reasons or 'none'}")
    return {
        "sizes": sizes,
        "rows": sizes["num_targets"],
        "targets": num_targets,
        "ledger": totals,
        "example": example,
    }


def _repeats(paths: list[Path]) -> dict[int, int]:
    """Row -> the first row with the same tokens and targets, over all shards; 16 bytes a row."""
    digests = np.concatenate([load_digests(path) for path in paths])
    if not len(digests):
        return {}
    flat = np.ascontiguousarray(digests).view([("", f"V{DIGEST_BYTES}")]).ravel()
    _, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
    firsts = first[inverse]
    repeated = np.flatnonzero(firsts != np.arange(len(firsts)))
    return dict(zip(repeated.tolist(), firsts[repeated].tolist(), strict=True))


def _repeat_entries(
    shard: Shard, rows: range, repeats: dict[int, int], first_ids: dict[int, str], dropped: bool
) -> list[Entry]:
    return [
        Entry(
            id=shard.ids[row - rows.start],
            place=shard.places[row - rows.start],
            action="dropped" if dropped else "noted",
            reason="exact duplicate",
            detail=f"of {first_ids[repeats[row]]}",
            tokens=int(shard.lengths[row - rows.start]),
        )
        for row in rows
        if row in repeats
    ]


class _ArrayFile:
    """A .npy file that grows: its length stands in the header, written again at the end."""

    def __init__(self, path: Path, kind: type[np.generic]) -> None:
        self._path, self._kind, self._length = path, np.dtype(kind), 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        try:
            self._file.write(np.ascontiguousarray(values, dtype=self._kind).data)
        except OSError as error:
            raise OSError(f"{self._path} cannot be written: {error}") from error
        self._length += len(values)

    def close(self) -> int:
        """The number of values."""
        start = self._file.tell() - self._length * self._kind.itemsize
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == start, "numpy leaves room for a longer length in the header"
        self._file.close()
        return self._length

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._kind),
            "fortran_order": False,
            "shape": (self._length,),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
