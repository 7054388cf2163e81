"""Where rows come from, read as a stream and in chunks that processes can take apart.

    a file                 .jsonl (.ndjson, .json with an object per line) or .parquet
    a glob                 `shards/*.parquet`, in the order of their names
    a folder               its JSONL or Parquet files; of one split where the names say so, by the
                           rules of `datasets`; or what `longcot.data countdown` built
    a saved data set       a folder by `datasets.save_to_disk`, one split of it
    OWNER/NAME             a data set of the Hugging Face hub at a revision, by `datasets`

Nothing here holds more than a chunk of rows. Every chunk knows where it lies in its file, so that
a row can be named by its line.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

from .columns import find_columns, used_columns
from .examples import parse_line
from .files import checksum

MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 2**20, 16 * 2**20
"""Of the source in one chunk: what one process takes at a time, and what an interruption costs."""
CHUNKS = 64
"""Of a source between the two, so that no process works alone for long at the end."""
_BATCH_ROWS = 64
# A process skips the rows before its chunk, which decodes them: chunks of a row group are few.
_MAX_CHUNKS_PER_GROUP = 16

Kind = Literal["jsonl", "parquet", "arrow"]
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Files found, in reading order, not read yet."""

    path: str
    kind: Kind
    files: tuple[Path, ...]
    names: tuple[str, ...]
    """What each file is called in ids and in the ledger."""
    revision: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A stretch of one file."""

    kind: Kind
    file: Path
    name: str
    first: int
    """Byte of a JSONL file; row of a row group or of an Arrow file."""
    last: int
    """Where the next chunk begins."""
    first_number: int
    """Line or row in the file at which it begins, counted from 1."""
    group: int = 0
    """Row group of a Parquet file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """A source of which every byte was read once."""

    source: Source
    digests: dict[str, str]
    """SHA-256 of each file, by its name."""
    chunks: list[Chunk]
    chunk_bytes: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as it lies in a source; or why it cannot be read."""

    number: int  # of its line or row in the file, from 1
    place: str  # `train.jsonl, line 7`
    default_id: str  # `train.jsonl:7`
    values: dict[str, Any] | None
    problem: str = ""


def open_source(
    path: str, *, split: str = "train", subset: str | None = None, revision: str | None = None
) -> Source:
    """Find the files of a source.

    Args:
        path: see the top of this file.
        split: of a folder, a saved data set or one of the hub.
        subset: configuration of a data set of the hub.
        revision: commit of a data set of the hub, 40 hex digits; needed there, and only there.

    Raises:
        ValueError: nothing there that can be read; it says what was found and what to give.
        OSError: the hub cannot be reached, a folder cannot be read.
    """
    if not re.fullmatch(r"[\w.-]+", split):
        raise ValueError(f"split is {split!r}, it must be a plain name such as 'train'")
    here = Path(path)
    if revision is not None and not here.exists():
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ValueError(
                f"revision is {revision!r}, which can move: give the commit, 40 hex digits"
            )
        return _arrow_source(path, hub_files(path, split, subset, revision), revision)
    if revision is not None or subset is not None:
        raise ValueError(f"{path} is no data set of the hub: leave out revision and subset")
    if here.is_file():
        return _file_source(path, [here], here.parent)
    if here.is_dir():
        return _folder_source(path, here, split)
    if any(sign in path for sign in "*?["):
        files = sorted(Path(name) for name in glob(path, recursive=True) if Path(name).is_file())
        if not files:
            raise ValueError(f"no file matches {path}: check the pattern, and quote it in a shell")
        root = Path(re.split(r"[*?[]", path)[0])
        return _file_source(path, files, root if path[len(str(root))] == "/" else root.parent)
    raise ValueError(
        f"{path} does not exist: build it with `python -m longcot.data`, or give a JSONL or "
        "Parquet file, a glob, a folder, or a name on the Hugging Face hub with its revision"
    )


def hub_files(path: str, split: str, subset: str | None, revision: str | None) -> list[Path]:
    """Download a data set through `datasets`; its Arrow files in the local cache.

    Raises:
        ValueError: no such data set, subset or split.
        OSError: the hub cannot be reached.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(path, subset, revision=revision, split=split)
    except FileNotFoundError as error:
        raise ValueError(f"{path} at revision {revision} cannot be found: {error}") from error
    assert isinstance(dataset, datasets.Dataset), "a plain split name gives a Dataset"
    return [Path(entry["filename"]) for entry in dataset.cache_files]


def _folder_source(path: str, folder: Path, split: str) -> Source:
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    if (folder / "train.jsonl").is_file() and (folder / "heldout.jsonl").is_file():
        return _file_source(path, [folder / "train.jsonl"], folder)
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split).is_dir():
            found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
            raise ValueError(f"{folder} has no split {split!r}, it has {found or 'none'}")
        folder = folder / split
    if (folder / "state.json").is_file():
        try:
            dataset = datasets.load_from_disk(str(folder))
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} is not a saved data set: {error}") from error
        assert isinstance(dataset, datasets.Dataset), "a folder with state.json holds one split"
        return _arrow_source(path, [Path(e["filename"]) for e in dataset.cache_files], None)
    try:
        patterns = get_data_patterns(str(folder))
    except FileNotFoundError:  # datasets' EmptyDatasetError
        patterns = {}
    if patterns and split not in patterns:
        raise ValueError(f"{folder} has no split {split!r}, its files are of {', '.join(patterns)}")
    found = DataFilesDict.from_patterns(patterns, base_path=str(folder)).get(split, [])
    # A folder's .json files describe it (manifest.json); rows in one must be named.
    suffixes = _SUFFIXES.keys() - {".json"}
    files = sorted(Path(name) for name in found if Path(name).suffix in suffixes)
    if not files:
        raise ValueError(f"{folder} holds no JSONL or Parquet file of the split {split!r}")
    return _file_source(path, files, folder)


def _file_source(path: str, files: list[Path], root: Path) -> Source:
    kinds: dict[str, Kind | None] = {file.suffix: _SUFFIXES.get(file.suffix) for file in files}
    unknown = [suffix or "none" for suffix, kind in kinds.items() if kind is None]
    if unknown:
        raise ValueError(
            f"{path} has files with the suffix {', '.join(unknown)}: only "
            f"{', '.join(_SUFFIXES)} can be read; unpack or convert them"
        )
    if len(set(kinds.values())) > 1:
        raise ValueError(f"{path} holds JSONL and Parquet files: give one kind, by a glob")
    kind = kinds[files[0].suffix]
    assert kind is not None
    root = root.resolve()
    names = [
        str(resolved.relative_to(root)) if resolved.is_relative_to(root) else file.name
        for file in files
        for resolved in [file.parent.resolve() / file.name]
    ]
    return Source(path=path, kind=kind, files=tuple(files), names=tuple(names))


def _arrow_source(path: str, files: list[Path], revision: str | None) -> Source:
    names = tuple(file.name for file in files)
    return Source(path=path, kind="arrow", files=tuple(files), names=names, revision=revision)


def scan(source: Source, chunk_bytes: int | None = None) -> Scan:
    """Checksums and chunks of a source; reads every byte once.

    Args:
        chunk_bytes: of the source in one chunk; None: by its size.

    Raises:
        ValueError: an unreadable file, or no rows at all.
        OSError: a file cannot be read.
    """
    num_bytes = sum(file.stat().st_size for file in source.files)
    if chunk_bytes is None:
        chunk_bytes = min(max(num_bytes // CHUNKS, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
    digests: dict[str, str] = {}
    chunks: list[Chunk] = []
    for file, name in zip(source.files, source.names, strict=True):
        if source.kind == "jsonl":
            digests[name], found = _scan_jsonl(file, name, chunk_bytes)
        else:
            digests[name] = checksum(file)
            found = _table_chunks(source.kind, file, name, chunk_bytes)
        chunks += found
    if not chunks:
        raise ValueError(f"{source.path} is empty: it has no rows")
    return Scan(
        source=source, digests=digests, chunks=chunks, chunk_bytes=chunk_bytes, num_bytes=num_bytes
    )


def _scan_jsonl(file: Path, name: str, chunk_bytes: int) -> tuple[str, list[Chunk]]:
    digest, chunks = hashlib.sha256(), []
    position = first = 0
    number = first_number = 1

    def cut(at: int) -> None:
        nonlocal first, first_number
        chunks.append(
            Chunk(
                kind="jsonl", file=file, name=name, first=first, last=at, first_number=first_number
            )
        )
        first, first_number = at, number

    with file.open("rb") as handle:
        while block := handle.read(min(2**20, -(-chunk_bytes // 4))):
            digest.update(block)
            end_of_line = block.rfind(b"\n") + 1
            number += block.count(b"\n")
            if end_of_line and position + end_of_line - first >= chunk_bytes:
                cut(position + end_of_line)
            position += len(block)
    if position > first:
        cut(position)
    return digest.hexdigest(), chunks


def _table_chunks(kind: Kind, file: Path, name: str, chunk_bytes: int) -> list[Chunk]:
    """Chunks of a Parquet or Arrow file: rows of one row group, of about as many bytes."""
    if kind == "parquet":
        metadata = _reading(file, lambda: _parquet(file)).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        most = _MAX_CHUNKS_PER_GROUP
    else:
        import datasets

        num_rows = len(_reading(file, lambda: datasets.Dataset.from_file(str(file))))
        sizes, most = [(num_rows, file.stat().st_size)], 2**62
    chunks, number = [], 1
    for group, (num_rows, num_bytes) in enumerate(sizes):
        num_chunks = max(1, min(num_rows, most, -(-num_bytes // chunk_bytes)))
        rows = -(-num_rows // num_chunks)
        for first in range(0, num_rows, max(rows, 1)):
            last = min(first + rows, num_rows)
            chunks.append(
                Chunk(
                    kind=kind, file=file, name=name, first=first, last=last,
                    first_number=number + first, group=group,
                )
            )  # fmt: skip
        number += num_rows
    return chunks


def check_table(
    source: Source, prompt_column: str | None = None, response_column: str | None = None
) -> None:
    """Refuse a table without the columns that are needed, before any work; JSONL has none.

    Raises:
        ValueError: naming the file and the columns it has.
    """
    if source.kind == "jsonl":
        return
    for file in source.files:
        try:
            find_columns(_column_names(source.kind, file), prompt_column, response_column)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def read_chunk(
    chunk: Chunk, prompt_column: str | None = None, response_column: str | None = None
) -> Iterator[Row]:
    """Yield the rows of a chunk in order.

    Raises:
        ValueError: the file itself cannot be read; a single bad line is a Row with its problem.
    """
    if chunk.kind == "jsonl":
        yield from _read_jsonl(chunk)
        return
    columns = used_columns(_column_names(chunk.kind, chunk.file), prompt_column, response_column)
    read = _parquet_batches if chunk.kind == "parquet" else _arrow_batches
    number = chunk.first_number
    for batch in read(chunk, columns):
        for values in batch:
            yield Row(
                number=number,
                place=f"{chunk.name}, row {number}",
                default_id=f"{chunk.name}:{number}",
                values=values,
            )
            number += 1


def _read_jsonl(chunk: Chunk) -> Iterator[Row]:
    with chunk.file.open("rb") as handle:
        handle.seek(chunk.first)
        position, number = chunk.first, chunk.first_number
        while position < chunk.last:
            line = handle.readline()
            position += len(line)
            if line.strip():
                values, problem = None, ""
                try:
                    values = parse_line(line)
                except ValueError as error:
                    problem = str(error)
                yield Row(
                    number=number,
                    place=f"{chunk.name}, line {number}",
                    default_id=f"{chunk.name}:{number}",
                    values=values,
                    problem=problem,
                )
            number += 1


def _parquet_batches(chunk: Chunk, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    file = _reading(chunk.file, lambda: _parquet(chunk.file))
    batches = file.iter_batches(_BATCH_ROWS, row_groups=[chunk.group], columns=columns)
    position = 0
    while position < chunk.last:
        batch = _reading(chunk.file, lambda: next(batches))
        start = max(chunk.first - position, 0)
        stop = min(chunk.last - position, len(batch))
        if start < stop:
            rows = batch.slice(start, stop - start)
            yield _reading(chunk.file, lambda rows=rows: rows.to_pylist())
        position += len(batch)


def _arrow_batches(chunk: Chunk, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    import datasets

    table = datasets.Dataset.from_file(str(chunk.file)).select_columns(columns)
    for first in range(chunk.first, chunk.last, _BATCH_ROWS):
        rows = range(first, min(first + _BATCH_ROWS, chunk.last))
        yield table.select(rows).to_list()


def _column_names(kind: Kind, file: Path) -> list[str]:
    if kind == "parquet":
        return _reading(file, lambda: _parquet(file)).schema_arrow.names
    import datasets

    return _reading(file, lambda: datasets.Dataset.from_file(str(file))).column_names


def _parquet(file: Path) -> Any:
    """A Parquet file, read page by page: a row group may be as large as the file."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)


def _reading(file: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns; a corrupt file becomes a ValueError with its name."""
    import pyarrow

    try:
        return read()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError, StopIteration) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own, such as a missing permission; pyarrow's have no number
        raise ValueError(f"{file} cannot be read: {error}: repair or replace the file") from error
