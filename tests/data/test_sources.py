"""Rows from real files of every kind give the same tokens; what cannot be read is named."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from longcot.data.chat import load_tokenizer
from longcot.data.sources import hub_files, open_source, read_chunk, scan

ROWS = [
    {
        "message": [{"role": "user", "content": f"What is the sum of {i} and é日?"}],
        "response": f"<think>\nword{i}\n</think>\n\\boxed{{{i}}}",
        "advantage": 1.0 if i % 3 else 0.5,
        "answer": str(i),
        "data_source": "math",
        "response_length": 7,
    }
    for i in range(23)
]


def as_jsonl(folder, rows):
    path = folder / "rows.jsonl"
    # Blank lines, a byte order mark, Windows line ends and no last newline: seen in the wild.
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    path.write_text("\ufeff" + "\r\n".join([lines[0], "", *lines[1:]]), newline="")
    return path


def as_parquet(folder, rows):
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    return path


def as_many(folder, rows):
    for index, part in enumerate((rows[:5], rows[5:6], rows[6:])):
        (folder / f"{index}").mkdir()
        as_parquet(folder / f"{index}", part)
    return folder


def as_glob(folder, rows):
    return as_many(folder, rows) / "*" / "*.parquet"


def as_split_folder(folder, rows):
    """As data sets lie on the hub; the rows of another split must not come in."""
    (folder / "data").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet"
    )
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows[:2]), folder / "data" / "test-00000-of-00001.parquet"
    )
    (folder / "README.md").write_text("# A data set")
    (folder / "dataset_infos.json").write_text("{}")
    return folder


def as_saved(folder, rows):
    # A selection, which is what a filtered data set is: saving must not bring the others back.
    datasets.Dataset.from_list([*rows, *rows]).select(range(len(rows))).save_to_disk(folder / "s")
    return folder / "s"


def as_saved_splits(folder, rows):
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": split, "test": split.select([0])}).save_to_disk(folder / "s")
    return folder / "s"


KINDS = [as_jsonl, as_parquet, as_many, as_glob, as_split_folder, as_saved, as_saved_splits]


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize("chunk_bytes", [300, 2**20])  # several chunks a file, and one
def test_every_kind_of_source_gives_the_same_tokens(
    write, chunk_bytes, tmp_path, build, tokenizer_path
):
    path = write(tmp_path, ROWS)
    dataset = build(path, tmp_path / "tokenized", chunk_bytes=chunk_bytes)
    tokenizer = load_tokenizer(str(tokenizer_path))
    assert len(dataset) == len(ROWS)
    for i, row in enumerate(ROWS):
        # The paper's way, by transformers' own functions.
        prompt = tokenizer.apply_chat_template(
            row["message"], add_generation_prompt=True, return_dict=False
        )
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        assert dataset.row(i).tolist() == [*prompt, *response, tokenizer.eos_token_id]
        learnt = np.arange(len(dataset.row(i))) >= len(prompt)
        assert dataset.target_mask(i).tolist() == learnt.tolist()
        assert dataset.num_targets[i] == learnt.sum() and dataset.weights[i] == row["advantage"]
    assert dataset.tokens.dtype == np.uint32 and dataset.is_target.dtype == np.bool_
    assert dataset.offsets.dtype == np.int64 and dataset.weights.dtype == np.float32
    assert dataset.lengths.sum() == len(dataset.tokens) == len(dataset.is_target)


@pytest.mark.parametrize("write", KINDS)
def test_chunks_hold_every_row_once_and_in_order(write, tmp_path):
    scanned = scan(open_source(str(write(tmp_path, ROWS))), 400)
    assert len(scanned.chunks) > 2
    rows = [row for chunk in scanned.chunks for row in read_chunk(chunk)]
    assert [row.values and row.values["response"] for row in rows] == [
        row["response"] for row in ROWS
    ]
    assert len({row.place for row in rows}) == len(ROWS)


def test_a_row_is_named_by_its_line(tmp_path):
    scanned = scan(open_source(str(as_jsonl(tmp_path, ROWS))), 400)
    rows = [row for chunk in scanned.chunks for row in read_chunk(chunk)]
    places = [row.place for row in rows]
    assert places[:2] == ["rows.jsonl, line 1", "rows.jsonl, line 3"]  # line 2 is blank
    assert places[-1] == f"rows.jsonl, line {len(ROWS) + 1}"


def test_a_data_set_is_fetched_by_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "OWNER" / "NAME"
    folder.mkdir(parents=True)
    files = hub_files(str(as_split_folder(folder, ROWS)), "train", None, None)
    table = datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
    assert table["response"][:] == [row["response"] for row in ROWS]


def broken(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda f: f / "nowhere", "nowhere does not exist: build it with `python -m longcot.data`"),
        (lambda f: f / "*.jsonl", "no file matches"),
        (lambda f: broken(f, "a.jsonl", b""), "is empty: it has no rows"),
        (lambda f: broken(f, "a.jsonl.gz", b"x"), "suffix .gz: only .jsonl"),
        (lambda f: broken(f, "a.parquet", b"PAR1 not at all"), "a.parquet cannot be read"),
        (lambda f: f, "holds no JSONL or Parquet file"),
        (lambda f: as_parquet(f, [{"text": "a", "label": 1}]), "found label, text"),
        (lambda f: as_parquet(f, ROWS[:0] or [{"response": "a"}]), "found response"),
    ],
)
def test_what_cannot_be_read_is_named(make, named, tmp_path, build):
    with pytest.raises(ValueError, match=None) as caught:
        build(make(tmp_path), tmp_path / "tokenized")
    assert named in str(caught.value)
    assert not (tmp_path / "tokenized").exists()


def test_a_parquet_file_cut_short_is_named(tmp_path, build):
    path = as_parquet(tmp_path, ROWS)
    # The footer is whole and the pages are not: only reading them shows it.
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read"):
        build(path, tmp_path / "tokenized")


def test_a_mixture_of_kinds_and_a_missing_split_are_refused(tmp_path, build):
    as_split_folder(tmp_path, ROWS)
    with pytest.raises(ValueError, match="no split 'validation', its files are of train, test"):
        open_source(str(tmp_path), split="validation")
    with pytest.raises(ValueError, match="plain name"):
        open_source(str(tmp_path), split="train[:10%]")
    as_saved_splits(tmp_path, ROWS)
    with pytest.raises(ValueError, match="no split 'dev', it has test, train"):
        open_source(str(tmp_path / "s"), split="dev")
    (tmp_path / "mixed").mkdir()
    as_jsonl(tmp_path / "mixed", ROWS)
    as_parquet(tmp_path / "mixed", ROWS)
    with pytest.raises(ValueError, match="JSONL and Parquet"):
        open_source(str(tmp_path / "mixed"))


@pytest.mark.parametrize("revision", ["main", "v1.0", "abc123"])
def test_a_revision_that_can_move_is_refused(revision, tmp_path):
    with pytest.raises(ValueError, match="40 hex digits"):
        open_source("owner/name", revision=revision)
    with pytest.raises(ValueError, match="no data set of the hub"):
        open_source(str(as_jsonl(tmp_path, ROWS)), revision=revision)


def test_a_table_without_rows_is_empty(tmp_path, build):
    table = pyarrow.Table.from_pylist(ROWS[:1]).slice(0, 0)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="is empty"):
        build(tmp_path / "rows.parquet", tmp_path / "tokenized")
