"""Files and folders that are either whole or absent: written beside, synced to disk, renamed into
place.

A reader never sees half a file, a second run never trusts one, and a full disk leaves the old
version standing. Nothing here knows what the files mean.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".partial"


def write_text_atomic(path: str | Path, text: str) -> None:
    """`write_bytes_atomic` of `text` in UTF-8."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Replace `path` by a file that holds `content`.

    Raises:
        OSError: the folder cannot be written or the disk is full; the old file, if any, is
            untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """`write_text_atomic` of `value` as indented JSON; keys keep their order."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def publish_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends without an
    error.

    All files are synced before the rename. An existing `path` is replaced; after an error it stands
    as it was and the partial folder is removed.

    Raises:
        OSError: as `write_text_atomic`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        finish_directory(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def finish_directory(partial: Path, path: Path) -> None:
    """Sync every file under `partial`, then rename it to `path`, replacing what stood there."""
    for file in sorted(partial.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        else:
            _sync_directory(file)
    _sync_directory(partial)
    if path.exists():
        # A rename cannot replace a folder that is not empty: move the old one aside first.
        old = path.with_name(f".{path.name}.{os.getpid()}.old{PARTIAL_SUFFIX}")
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        partial.rename(path)
    _sync_directory(path.parent)


def remove_partials(folder: str | Path) -> list[str]:
    """Delete what an interrupted `publish_directory` left in `folder`; returns the names."""
    leftovers = [p for p in Path(folder).glob(f".*{PARTIAL_SUFFIX}") if _owner_is_gone(p.name)]
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [p.name for p in leftovers]


def _owner_is_gone(name: str) -> bool:
    """False while the process whose id stands in a partial's name is alive: it may still be
    writing.
    """
    pid = name.removesuffix(PARTIAL_SUFFIX).removesuffix(".old").rpartition(".")[2]
    return not (pid.isdigit() and Path("/proc", pid).exists())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_manifest(folder: Path, remedy: str) -> dict[str, Any]:
    """The manifest of a finished folder, every file in it checked against its checksum.

    Raises:
        ValueError: no manifest (the folder is absent or was never finished), or a file that is
            missing or differs.
    """
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        state = "is not finished (no manifest.json)" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {state}: {remedy}")
    manifest = json.loads(manifest_path.read_text())
    for name, expected in manifest["sha256"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: remove {folder}, then {remedy}")
        if checksum(file) != expected:
            raise ValueError(
                f"{file} is not the file that was built (checksum differs): remove {folder}, then "
                f"{remedy}"
            )
    return manifest
