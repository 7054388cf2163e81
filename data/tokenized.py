"""Tokenized rows on disk: flat token ids, mapped into memory, and a ledger of every row that was
left out.

tokens.npy (all ids, uint32)   offsets.npy (N + 1)   prompt_lengths.npy (N)   manifest.json
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .chat import encode_example, load_tokenizer, show_targets
from .examples import read_examples
from .files import checksum, publish_directory, remove_partials, write_json_atomic

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedDataset:
    """N rows; row i is `tokens[offsets[i]:offsets[i + 1]]`, its prompt the first
    `prompt_lengths[i]` of them.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each row, prompt and response."""
        return np.diff(self.offsets)

    def row(self, index: int) -> np.ndarray:
        """Token ids of one row."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def open_or_build(
    folder: Path, *, source: Path, tokenizer_path: Path, max_tokens: int
) -> TokenizedDataset:
    """The dataset in `folder`, built first if it is absent, damaged, or made from something else.

    Call it on one process; the others call `open_dataset` when it is done.

    Args:
        max_tokens: rows longer than this are dropped and entered in the ledger, never cut.

    Raises:
        ValueError: a malformed source or tokenizer, or no row left to train on.
        FileNotFoundError: no such source.
    """
    key = {
        "format": FORMAT,
        "source_sha256": checksum(source),
        "tokenizer_sha256": {
            p.name: checksum(p) for p in sorted(tokenizer_path.iterdir()) if p.is_file()
        },
        "max_tokens": max_tokens,
    }
    remove_partials(folder.parent)
    try:
        dataset = open_dataset(folder)
    except (OSError, ValueError):
        dataset = None  # absent, or not what its manifest promises: built anew
    if dataset is None or dataset.manifest["key"] != key:
        _build(folder, key, source, tokenizer_path, max_tokens)
        dataset = open_dataset(folder)
    return dataset


def open_dataset(folder: Path) -> TokenizedDataset:
    """Map a finished dataset.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files are not those its manifest describes.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("tokens", "offsets", "prompt_lengths")
    }
    sizes = {name: len(array) for name, array in arrays.items()}
    if sizes != manifest["sizes"]:
        raise ValueError(
            f"{folder} holds {sizes}, its manifest says {manifest['sizes']}: remove the folder"
        )
    return TokenizedDataset(**arrays, manifest=manifest)


def _build(
    folder: Path, key: dict[str, Any], source: Path, tokenizer_path: Path, max_tokens: int
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_path))
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    dropped: list[dict[str, Any]] = []
    shown = ""
    for example in read_examples(source):
        try:
            prompt, response = encode_example(tokenizer, example)
        except ValueError as error:
            dropped.append({"id": example.id, "reason": str(error)})
            continue
        if len(prompt) + len(response) > max_tokens:
            reason = f"longer than {max_tokens} tokens"
            dropped.append(
                {"id": example.id, "reason": reason, "tokens": len(prompt) + len(response)}
            )
            continue
        shown = shown or show_targets(tokenizer, prompt, response)
        rows.append(prompt + response)
        prompt_lengths.append(len(prompt))
    if not rows:
        reasons = Counter(row["reason"] for row in dropped)
        raise ValueError(
            f"{source}: no row left to train on; dropped: {dict(reasons) or 'the file is empty'}"
        )
    arrays = {
        "tokens": np.concatenate([np.array(row, dtype=np.uint32) for row in rows]),
        "offsets": np.cumsum([0, *map(len, rows)]),
        "prompt_lengths": np.array(prompt_lengths),
    }
    with publish_directory(folder) as partial:
        for name, array in arrays.items():
            try:
                np.save(partial / f"{name}.npy", array)
            except OSError as error:  # numpy's names neither the file nor the reason
                raise OSError(f"{folder}/{name}.npy cannot be written: {error}") from error
        manifest = {
            "key": key,
            "source": str(source),
            "sizes": {name: len(array) for name, array in arrays.items()},
            "rows": len(rows),
            "dropped": dropped,
            "example": shown,
        }
        write_json_atomic(partial / "manifest.json", manifest)
