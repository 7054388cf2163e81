"""Somebody else's columns become Examples; a row that cannot is refused with its reason first."""

import pytest

from longcot.data.columns import to_example
from longcot.data.examples import Example, read_examples, write_examples

USER = {"role": "user", "content": "2 + 2?"}
SAID = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"message": [USER], "response": "4"}, [USER]),
        ({"messages": [USER, SAID]}, [USER]),
        ({"messages": [USER, SAID, USER, SAID]}, [USER, SAID, USER]),
        ({"prompt": "2 + 2?", "response": "4"}, [USER]),
        ({"prompt": "2 + 2?", "completion": "4", "text": "no"}, [USER]),
        ({"prompt": [USER], "completion": "4"}, [USER]),
        # The whole conversation beside the response, as in OpenR1's data: once is enough.
        ({"messages": [USER, SAID], "response": "4"}, [USER]),
        # A Parquet file gives every turn every key.
        ({"messages": [USER | {"tool_calls": None}, SAID | {"tool_calls": []}]}, [USER]),
    ],
)
def test_known_columns_are_found(row, messages):
    example = to_example(row, "file:7")
    assert (example.messages, example.response) == (messages, "4")
    assert (example.id, example.weight) == ("file:7", 1.0)


def test_columns_can_be_named_and_the_paper_has_its_own():
    row = {"question": "2 + 2?", "solution": "4", "answer": "4"}
    assert to_example(row, "x", "question", "solution").response == "4"
    row = {"id": 12, "message": [USER], "response": "4", "advantage": 0.5, "data_source": "math"}
    example = to_example(row, "x")
    assert (example.id, example.weight, example.source) == ("12", 0.5, "math")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "2 + 2 = 4"}, "missing column: none of messages, message, prompt; found text"),
        ({"prompt": "2 + 2?"}, "missing column: response; found prompt"),
        ({}, "missing column: none of messages, message, prompt; found none"),
        ({"messages": [USER]}, "no response: the last turn is 'user'"),
        ({"messages": []}, "no response: the last turn is none"),
        ({"messages": [SAID]}, "no prompt: "),
        ({"messages": "2 + 2?", "response": 4}, "wrong type: field 'response' is int"),
        ({"messages": [USER], "response": None}, "wrong type: field 'response' is NoneType"),
        ({"messages": {"role": "user"}, "response": "4"}, "wrong type: field 'messages' is dict"),
        ({"messages": [{"from": "human"}], "response": "4"}, "wrong type: every turn"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong type: every turn"),
        ({"messages": [USER, SAID], "response": "5"}, "two responses: "),
        ({"messages": [USER, SAID | {"reasoning_content": "hm"}]}, "a turn with 'reasoning_conte"),
        ({"messages": [USER, SAID | {"weight": 0}]}, "a turn with 'weight'"),
        ({"prompt": "a", "response": "b\ud800"}, "undecodable text: '\\ud800' at character 1"),
        ({"prompt": "a", "response": "b", "advantage": "1"}, "wrong type: field 'advantage'"),
        ({"prompt": "a", "response": "b", "advantage": float("nan")}, "wrong weight: "),
        ({"prompt": "a", "response": "b", "weight": -1.0}, "wrong weight: "),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, reason):
    with pytest.raises(ValueError) as caught:
        to_example(row, "x")
    assert str(caught.value).startswith(reason)


def test_examples_survive_a_file_and_a_weight_of_one_is_not_written(tmp_path):
    values = {"messages": [USER], "response": "4\u2028", "answer": {"a": [1]}, "source": "s"}
    rows = [Example(id="a", **values), Example(id="b", **values, weight=0.25)]
    assert write_examples(tmp_path / "rows.jsonl", rows) == 2
    assert list(read_examples(tmp_path / "rows.jsonl")) == rows
    assert '"weight"' not in (tmp_path / "rows.jsonl").read_text().split("\n")[0]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"id": "a"', "line 2: not a line of JSON"),
        (b'[{"id": "a"}]', "line 2: not a JSON object: found list"),
        (b"[", "one object per line"),
        (b'{"id": "\xff\xfe"}', "line 2: bytes that are not UTF-8: byte 8"),
        (b'{"id": "a"}', "line 2: no field messages, response, answer, source; it has id"),
        (b"[" * 100_000, "line 2: not a line of JSON"),  # deeper than Python's stack
    ],
)
def test_a_broken_line_is_named(line, named, tmp_path):
    row = Example(id="a", messages=[USER], response="4", answer=None, source="s")
    write_examples(tmp_path / "rows.jsonl", [row])
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match=None) as caught:
        list(read_examples(tmp_path / "rows.jsonl"))
    assert named in str(caught.value)
