"""What the tests of data share: a tokenizer, its chat templates, rows, and builds of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longcot.data.rules import Rules
from longcot.data.sources import open_source, scan
from longcot.data.tokenized import TokenizedDataset, open_or_build
from longcot.data.tokenizer import save_tokenizer, train_tokenizer

# As Qwen3's: thinking is taken out of earlier turns and laid out anew in the last.
REWRITING_TEMPLATE = (
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- if loop.last %}"
    "{%- set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{%- endif %}"
    "{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    words = " ".join(f"word{i} {i}" for i in range(120))
    save_tokenizer(train_tokenizer([f"{words} What is the sum of? Think, then box. é日"]), path)
    return path


@pytest.fixture(scope="session")
def with_template(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """A copy of the tokenizer with another chat template."""

    def change(template: str = REWRITING_TEMPLATE) -> Path:
        from transformers import AutoTokenizer

        path = tmp_path_factory.mktemp("tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_path))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(str(path))
        return path

    return change


@pytest.fixture(scope="session")
def build(tokenizer_path: Path) -> Callable[..., TokenizedDataset]:
    """`open_or_build` of a path, in this process unless asked otherwise."""

    def build(path: Path, folder: Path, **changes: Any) -> TokenizedDataset:
        settings = {"tokenizer_path": tokenizer_path, "max_tokens": 10_000, "num_processes": 1}
        settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
        chunk_bytes = changes.pop("chunk_bytes", 2**20)
        scanned = scan(open_source(str(path), split=changes.pop("split", "train")), chunk_bytes)
        return open_or_build(folder, scanned, rules=Rules(**changes), **settings)

    return build


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list[dict[str, Any]]], Path]:
    """Rows as JSONL."""

    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def ledger() -> Callable[[Path], list[dict[str, Any]]]:
    """The entries of a finished dataset."""
    return lambda folder: [
        json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()
    ]
