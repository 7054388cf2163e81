"""Token ids on disk: what is dropped, cut or repeated is in the ledger; what is reused is whole."""

import json
import os

import numpy as np
import pytest

from longcot.data.chat import load_tokenizer
from longcot.data.tokenized import open_dataset

ARRAYS = ("tokens", "is_target", "offsets", "num_targets", "weights")


def row(i, length=1, **more):
    response = " ".join(f"word{(i + j) % 120}" for j in range(length))
    return {"id": f"r{i}", "prompt": f"What is {i}?", "response": response, **more}


def test_rows_that_do_not_fit_are_dropped_cut_or_refused(tmp_path, build, write_rows, ledger):
    path = write_rows(tmp_path / "a.jsonl", [row(0), row(1, 40), row(2), row(3, 2)])
    out = tmp_path / "out"
    whole = build(path, out)
    lengths = whole.lengths.tolist()
    fits = lengths[3]
    dropped = build(path, out, max_tokens=fits)
    assert dropped.lengths.tolist() == [lengths[0], lengths[2], lengths[3]]
    assert ledger(out) == [
        {"id": "r1", "place": "a.jsonl, line 2", "action": "dropped",
         "reason": f"longer than {fits} tokens", "detail": "", "tokens": lengths[1]}
    ]  # fmt: skip
    assert dropped.manifest["ledger"]["dropped"] == 1
    cut = build(path, out, max_tokens=fits, over_long="truncate")
    assert cut.row(1).tolist() == whole.row(1)[:fits].tolist()
    assert cut.target_mask(1).tolist() == whole.target_mask(1)[:fits].tolist()
    assert ledger(out)[0]["action"] == "cut" and ledger(out)[0]["tokens"] == lengths[1]
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2, id 'r1' has {lengths[1]} tokens"):
        build(path, out, max_tokens=fits, over_long="error")


def test_a_cut_row_has_no_end_of_sequence_target(tmp_path, build, write_rows, tokenizer_path):
    end = load_tokenizer(str(tokenizer_path)).eos_token_id
    path = write_rows(tmp_path / "a.jsonl", [row(1, 9), row(2, 1)])
    whole = build(path, tmp_path / "out")
    assert whole.row(0)[-1] == end and whole.target_mask(0)[-1]
    # One token too long: the end of sequence alone is cut, and the row must not learn to stop.
    cut = build(path, tmp_path / "cut", max_tokens=int(whole.lengths[0]) - 1, over_long="truncate")
    assert end not in cut.row(0)[cut.target_mask(0)] and cut.row(1)[-1] == end
    assert cut.manifest["ledger"]["cut"] == 1 and whole.manifest["ledger"]["cut"] == 0


def test_a_prompt_as_long_as_a_pack_is_dropped_even_when_cutting(
    tmp_path, build, write_rows, ledger
):
    path = write_rows(tmp_path / "a.jsonl", [row(1) | {"prompt": "What is " * 90}, row(2)])
    dataset = build(path, tmp_path / "out", max_tokens=50, over_long="truncate")
    assert len(dataset) == 1
    assert ledger(tmp_path / "out")[0]["reason"] == "prompt longer than 50 tokens"
    with pytest.raises(ValueError, match=r"no row left to train on; dropped: \{'longer than 5"):
        build(path, tmp_path / "none", max_tokens=5)
    assert not (tmp_path / "none").exists()


BAD = [
    (b'{"prompt": "a", "respo', "not a line of JSON"),
    (b'{"prompt": "a", "response": "\xff"}', "bytes that are not UTF-8"),
    (b'{"id": "x", "prompt": "a", "response": ""}', "empty response"),
    (b'{"prompt": "a"}', "missing column"),
    (b'{"prompt": "a", "response": 4}', "wrong type"),
    (b'["a"]', "not a JSON object"),
]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_bad_rows_end_the_build_or_go_to_the_ledger(
    num_processes, tmp_path, build, write_rows, ledger
):
    path = write_rows(tmp_path / "a.jsonl", [row(i) for i in range(30)])
    good = path.read_bytes()
    path.write_bytes(good + b"\n".join(line for line, _ in BAD))
    settings = {"num_processes": num_processes, "chunk_bytes": 500}
    with pytest.raises(ValueError, match=r"a\.jsonl, line 31: not a line of JSON.*on_bad_row"):
        build(path, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    dataset = build(path, tmp_path / "out", on_bad_row="drop", **settings)
    assert len(dataset) == 30
    found = ledger(tmp_path / "out")
    assert [entry["reason"] for entry in found] == [reason for _, reason in BAD]
    assert [entry["place"] for entry in found] == [f"a.jsonl, line {31 + i}" for i in range(6)]
    assert found[2]["id"] == "x" and found[0]["id"] == "a.jsonl:31"
    assert dataset.manifest["ledger"]["refused"] == 6
    # Who does not ask for it is not given rows that somebody else has agreed to lose.
    with pytest.raises(ValueError, match=r"6 rows of .* cannot be used"):
        build(path, tmp_path / "out", **settings)


def test_exact_duplicates_are_listed_and_dropped_where_asked(tmp_path, build, write_rows, ledger):
    rows = [row(1), row(2), row(1) | {"id": "again"}, row(1) | {"response": "word1 "}]
    path = write_rows(tmp_path / "a.jsonl", [*rows, *[row(i) for i in range(3, 30)], row(2)])
    kept = build(path, tmp_path / "kept", chunk_bytes=400)  # duplicates in other shards
    assert len(kept) == 32
    found = [(e["id"], e["action"], e["detail"]) for e in ledger(tmp_path / "kept")]
    assert found == [("again", "noted", "of r1"), ("r2", "noted", "of r2")]
    dropped = build(path, tmp_path / "dropped", chunk_bytes=400, duplicates="drop")
    assert [e["action"] for e in ledger(tmp_path / "dropped")] == ["dropped", "dropped"]
    wanted = [i for i in range(32) if i not in (2, 31)]
    assert [dropped.row(i).tolist() for i in range(30)] == [kept.row(i).tolist() for i in wanted]
    assert dropped.num_targets.tolist() == kept.num_targets[wanted].tolist()


def test_weights_and_turns_of_the_template_reach_the_dataset(
    tmp_path, build, write_rows, ledger, with_template
):
    thinking = {"role": "assistant", "content": "<think>\nword1\n</think>\n\nword2"}
    user = {"role": "user", "content": "What?"}
    path = write_rows(
        tmp_path / "a.jsonl",
        [{"id": "m", "messages": [user, thinking, user, thinking], "advantage": 0.5}],
    )
    dataset = build(path, tmp_path / "out", tokenizer_path=with_template())
    assert dataset.weights.tolist() == [0.5]
    (entry,) = ledger(tmp_path / "out")
    assert (entry["action"], entry["reason"]) == ("noted", "the template changes a turn")
    with pytest.raises(ValueError, match=r"line 1, id 'm': the template rewrites the row: at char"):
        build(path, tmp_path / "out", tokenizer_path=with_template(), targets="every_turn")


def test_what_is_whole_is_reused_and_what_changed_is_built_anew(
    tmp_path, build, write_rows, with_template, capsys
):
    path = write_rows(tmp_path / "a.jsonl", [row(i) for i in range(5)])
    out = tmp_path / "out"
    inode = [build(path, out), (out / "tokens.npy").stat().st_ino][1]

    def built_anew(named, **changes):
        nonlocal inode
        before, dataset = inode, build(path, out, **changes)
        inode = (out / "tokens.npy").stat().st_ino
        assert named in capsys.readouterr().out
        assert len(dataset) in (5, 6)
        return inode != before

    assert not built_anew("")
    write_rows(path, [row(i) for i in range(6)])
    assert built_anew("another source_sha256")
    assert built_anew("another rules", over_long="truncate")
    assert built_anew("another rules")
    os.utime(path)  # another time, the same bytes
    assert not built_anew("")
    assert built_anew("template_sha256", tokenizer_path=with_template())
    assert built_anew("another tokenizer_sha256, template_sha256")
    assert built_anew("another max_tokens", max_tokens=999)


def test_a_damaged_dataset_is_refused_and_built_anew(tmp_path, build, write_rows, capsys):
    path = write_rows(tmp_path / "a.jsonl", [row(i) for i in range(50)])
    out = tmp_path / "out"
    wanted = np.array(build(path, out).tokens)
    content = bytearray((out / "tokens.npy").read_bytes())
    content[-3] ^= 1
    (out / "tokens.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokens\.npy is damaged, its checksum differs"):
        open_dataset(out, verify=True)
    assert np.array_equal(build(path, out).tokens, wanted)
    assert "is damaged" in capsys.readouterr().out
    np.save(out / "offsets.npy", np.arange(5))
    with pytest.raises(ValueError, match="its manifest says"):
        open_dataset(out)
    assert np.array_equal(build(path, out).tokens, wanted)
    (out / "manifest.json").write_text('{"key": ')
    assert np.array_equal(build(path, out).tokens, wanted)
    (out / "manifest.json").write_text(json.dumps({"prompt_lengths": [1]}))  # an older version's
    assert np.array_equal(build(path, out).tokens, wanted)


@pytest.mark.parametrize("chunk_bytes", [1, 700, 2**20])  # a row a shard, several, all in one
@pytest.mark.parametrize("num_processes", [1, 2])
def test_shards_and_processes_change_nothing(
    chunk_bytes, num_processes, tmp_path, build, write_rows
):
    path = write_rows(tmp_path / "a.jsonl", [row(i, 1 + i % 7) for i in range(12)])
    wanted = build(path, tmp_path / "wanted")
    made = build(path, tmp_path / "made", chunk_bytes=chunk_bytes, num_processes=num_processes)
    for name in ARRAYS:
        assert np.array_equal(getattr(made, name), getattr(wanted, name)), name
    assert sorted(p.name for p in tmp_path.iterdir() if "shards" in p.name) == []
