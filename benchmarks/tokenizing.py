"""Tokenizing: rows of JSONL to token ids on disk, against `datasets.map` with the same tokenizer.

The rows are long (3,000 to 40,000 characters, as reasoning is), cut from the sources of Python's
standard library; the tokenizer is a byte-level BPE of 32,000 tokens with Qwen's pattern, learned
from them. All variants use the same chat template and number of processes, and must give the same
token ids and targets, row for row, before anything is timed.

`longcot` reads the JSONL, renders, tokenizes, checks that every response decodes to itself, and
publishes the dataset with its checksums. `datasets_map` is timed from rows that lie in Arrow
already to token ids and targets in Arrow, without any check; `datasets_json_and_map` begins with
the JSONL too. `longcot_by_tokenizers` is longcot where tiktoken's encoding would not be exact.
"""

import os
import random
import statistics
import sysconfig
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..data.byte_pairs import PATTERNS
from ..data.chat import load_tokenizer
from ..data.examples import Example, write_examples
from ..data.files import write_json_atomic
from ..data.sources import open_source, scan
from ..data.tokenized import Encoder, TokenizedDataset, open_or_build
from ..data.tokenizer import END_OF_TEXT, save_tokenizer
from .timing import environment, race, spread

VOCABULARY = 32_000
MIN_CHARACTERS, MAX_CHARACTERS = 3_000, 40_000
CPU = torch.device("cpu")
REQUIRED_RATIO = 1.2
PACKAGES = ("tokenizers", "tiktoken", "transformers", "datasets", "pyarrow")


def measure(
    *, num_rows: int, num_processes: int, num_rounds: int, seconds: float, out: Path | None
) -> dict[str, Any]:
    """Tokens per second of each variant, and ratios within rounds.

    Raises:
        RuntimeError: the variants do not give the same token ids, or one of them fails.
        OSError: the disk is full.
    """
    datasets.disable_progress_bars()
    # datasets' processes are forked from this one: each is to keep to its own core, as ours do.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="longcot-tokenizing-") as scratch:
        folder = Path(scratch)
        num_characters = make_rows(folder, num_rows)
        calls = variants(folder, num_processes)
        made = {name: call() for name, call in calls.items()}
        num_tokens = compare(made.pop("longcot"), made)
        result = race(
            calls, device=CPU, num_rounds=num_rounds, num_warmup_rounds=0, seconds=seconds
        )
    if result.reasons:
        raise RuntimeError(f"a variant failed: {result.reasons}")
    rates = {
        name: [num_tokens / (ms / 1e3) for ms in times]
        for name, times in result.milliseconds.items()
    }
    document = {
        "rows": num_rows,
        "characters": num_characters,
        "tokens": num_tokens,
        "num_processes": num_processes,
        "tokens_equal": True,
        "required_ratio": REQUIRED_RATIO,
        "tokens_per_second": {name: spread(values) for name, values in rates.items()},
        "ratio_of_longcot": {
            name: spread([a / b for a, b in zip(rates["longcot"], values, strict=True)])
            for name, values in rates.items()
            if name != "longcot"
        },
        "seconds": {
            name: [round(ms / 1e3, 3) for ms in times]
            for name, times in result.milliseconds.items()
        },
        "orders": result.orders,
        "environment": environment(CPU, PACKAGES),
    }
    if out is not None:
        write_json_atomic(out, document)
    return document


def failures(document: dict[str, Any]) -> list[str]:
    """What misses the required ratio."""
    return [
        f"longcot is {ratio['median']:.2f} times as fast as {name}, less than {REQUIRED_RATIO}"
        for name, ratio in document["ratio_of_longcot"].items()
        if name.startswith("datasets") and ratio["median"] < REQUIRED_RATIO
    ]


def make_rows(folder: Path, num_rows: int) -> int:
    """Write rows.jsonl and tokenizer/; the number of characters in all responses."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")])
    texts = [
        # The tokenizer normalizes as Qwen's does: text that is not so would not decode to itself.
        unicodedata.normalize("NFC", file.read_text(encoding="utf-8", errors="ignore"))
        for file in files
        if not {"site-packages", "test"} & set(file.parts)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["qwen"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    save_tokenizer(tokenizer, folder / "tokenizer")
    everything, draw = "".join(texts), random.Random(0)
    rows = []
    for index in range(num_rows):
        length = draw.randint(MIN_CHARACTERS, MAX_CHARACTERS)
        start = draw.randrange(len(everything) - length)
        question = f"{everything[start - 200 : start]}\nPlease reason step by step."
        rows.append(
            Example(
                id=str(index),
                messages=[{"role": "user", "content": question}],
                response=everything[start : start + length],
                answer=None,
                source="",
            )
        )
    write_examples(folder / "rows.jsonl", rows)
    return sum(len(row.response) for row in rows)


def variants(folder: Path, num_processes: int) -> dict[str, Callable[[], Any]]:
    """Calls that make the token ids on disk, anew each time."""
    rows, tokenizer_path = folder / "rows.jsonl", folder / "tokenizer"
    tokenizer = load_tokenizer(str(tokenizer_path))
    in_arrow = _load(rows, folder / "arrow")
    count = iter(range(10**9))

    def longcot(encoder: Encoder) -> TokenizedDataset:
        return open_or_build(
            folder / f"tokenized-{next(count)}",
            scan(open_source(str(rows))),
            tokenizer_path=tokenizer_path,
            max_tokens=10**9,
            num_processes=num_processes,
            encoder=encoder,
        )

    def mapped(table: Any) -> Any:
        return table.map(
            tokenize,
            batched=True,
            # By 1,000, the default, it would use fewer processes than asked for on few rows.
            batch_size=64,
            fn_kwargs={"tokenizer": tokenizer},
            num_proc=num_processes,
            remove_columns=table.column_names,
            load_from_cache_file=False,
            cache_file_name=str(folder / f"mapped-{next(count)}.arrow"),
        )

    return {
        "longcot": lambda: longcot("auto"),
        "longcot_by_tokenizers": lambda: longcot("tokenizers"),
        "datasets_map": lambda: mapped(in_arrow),
        "datasets_json_and_map": lambda: mapped(_load(rows, folder / f"arrow-{next(count)}")),
    }


def tokenize(batch: dict[str, list[Any]], tokenizer: Any) -> dict[str, list[Any]]:
    """What is given to `datasets.map`: the same prompt, response and end of sequence."""
    prompts = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        for turns in batch["messages"]
    ]
    settings = {"add_special_tokens": False, "return_attention_mask": False}
    before = tokenizer(prompts, **settings)["input_ids"]
    after = tokenizer(batch["response"], **settings)["input_ids"]
    end = tokenizer.eos_token_id
    return {
        "input_ids": [[*a, *b, end] for a, b in zip(before, after, strict=True)],
        "is_target": [
            [False] * len(a) + [True] * (len(b) + 1) for a, b in zip(before, after, strict=True)
        ],
    }


def compare(ours: TokenizedDataset, others: dict[str, Any]) -> int:
    """The number of tokens, after finding that all rows are equal in all variants.

    Raises:
        RuntimeError: naming the first row that differs.
    """
    for name, table in others.items():
        if len(table) != len(ours):
            raise RuntimeError(f"{name} has {len(table)} rows, longcot has {len(ours)}")
        for index in range(len(table)):
            if isinstance(table, TokenizedDataset):
                ids, is_target = table.row(index), table.target_mask(index)
            else:
                row = table[index]
                ids, is_target = row["input_ids"], row["is_target"]
            if not (
                np.array_equal(ours.row(index), ids)
                and np.array_equal(ours.target_mask(index), is_target)
            ):
                raise RuntimeError(f"row {index} of {name} differs from longcot's")
    return len(ours.tokens)


def _load(rows: Path, cache: Path) -> Any:
    return datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache))


def table(document: dict[str, Any]) -> list[str]:
    """The figures for people."""
    lines = [
        f"{document['rows']:,} rows, {document['tokens']:,} tokens, {document['num_processes']} "
        f"processes, {statistics.median(map(len, document['seconds'].values())):.0f} rounds"
    ]
    for name, rate in document["tokens_per_second"].items():
        ratio = document["ratio_of_longcot"].get(name)
        more = f", longcot is {ratio['median']:.2f} times as fast" if ratio else ""
        lines.append(f"{name}: {rate['median']:,.0f} tokens/s{more}")
    return lines
