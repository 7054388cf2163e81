"""A row of somebody else's columns as an Example.

What is understood, by the names of the columns:

    message (turns), response, advantage, ...    the paper's public data
    messages (turns), response                   this project's own rows
    messages (turns)                             OpenAI's: the last turn, the assistant's, is the
                                                 response
    prompt (text or turns), response             pairs; `completion` instead of `response` too
    any two names given as prompt and response column

`id`, `weight` (or `advantage`) and `source` (or `data_source`) are read where they stand. What a
row says and a chat template would not be given (`reasoning_content`, tool calls) is refused.
"""

from collections.abc import Collection
from typing import Any

from .examples import Example, check_turns, check_weight

PROMPT_NAMES = ("messages", "message", "prompt")
RESPONSE_NAMES = ("response", "completion")
WEIGHT_NAMES = ("weight", "advantage")
SOURCE_NAMES = ("source", "data_source")
# Keys of a turn that carry content of their own: dropping them would change what is learnt.
CARRIERS = (
    "reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "tool_call_id",
    "weight",
)  # fmt: skip


def find_columns(
    names: Collection[str], prompt_column: str | None = None, response_column: str | None = None
) -> tuple[str, str | None]:
    """(column of the prompt, column of the response or None where the last turn is the response).

    Raises:
        ValueError: no such columns; it names those found.
    """
    found = ", ".join(sorted(names)) or "none"
    prompt = prompt_column or next((name for name in PROMPT_NAMES if name in names), None)
    response = response_column or next((name for name in RESPONSE_NAMES if name in names), None)
    missing = [name for name in (prompt_column, response_column) if name and name not in names]
    if prompt is None:
        raise ValueError(
            f"missing column: none of {', '.join(PROMPT_NAMES)}; found {found}: name the columns "
            "with prompt_column and response_column"
        )
    if response is None and prompt == "prompt":
        missing.append("response")
    if missing:
        raise ValueError(
            f"missing column: {', '.join(missing)}; found {found}: name the columns with "
            "prompt_column and response_column"
        )
    return prompt, response


def used_columns(
    names: Collection[str], prompt_column: str | None = None, response_column: str | None = None
) -> list[str]:
    """The columns of a table that `to_example` reads; the others need not leave the disk."""
    wanted = {"id", *WEIGHT_NAMES, *SOURCE_NAMES}
    wanted.update(n for n in find_columns(names, prompt_column, response_column) if n is not None)
    return [name for name in names if name in wanted]


def to_example(
    row: dict[str, Any],
    default_id: str,
    prompt_column: str | None = None,
    response_column: str | None = None,
) -> Example:
    """The row as an Example.

    Raises:
        ValueError: `reason: detail`; the reason is the same for all rows with the same fault.
    """
    prompt_name, response_name = find_columns(row.keys(), prompt_column, response_column)
    turns = row[prompt_name]
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    check_turns(turns, prompt_name)
    for turn in turns:
        carried = [name for name in CARRIERS if turn.get(name) not in (None, "", [], {}, 1)]
        if carried:
            raise ValueError(
                f"a turn with {carried[0]!r}: it would not reach the model as it stands; put it "
                "into 'content', or remove it"
            )
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    ends_with_assistant = bool(turns) and turns[-1]["role"] == "assistant"
    response = row[response_name] if response_name else None
    if response_name is None:
        if not ends_with_assistant:
            last = repr(turns[-1]["role"]) if turns else "none"
            raise ValueError(f"no response: the last turn is {last}, expected 'assistant'")
        response = turns.pop()["content"]
    elif not isinstance(response, str):
        kind = type(response).__name__
        raise ValueError(f"wrong type: field {response_name!r} is {kind}, expected str")
    elif ends_with_assistant and turns.pop()["content"] != response:
        raise ValueError(
            f"two responses: {prompt_name!r} ends with an assistant's turn that is not the text of "
            f"{response_name!r}; keep one"
        )
    if not turns:
        raise ValueError(f"no prompt: {prompt_name!r} has no turn before the response")
    _check_text([*(turn["content"] for turn in turns), response])
    weight = next((n for n in WEIGHT_NAMES if row.get(n) is not None), None)
    source = next((row[n] for n in SOURCE_NAMES if isinstance(row.get(n), str)), "")
    return Example(
        id=str(row["id"]) if isinstance(row.get("id"), str | int) else default_id,
        messages=turns,
        response=response,
        answer=row.get("answer"),
        source=source,
        weight=check_weight(row[weight], weight) if weight else 1.0,
    )


def _check_text(texts: list[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"undecodable text: {text[error.start : error.start + 1]!r} at character "
                f"{error.start} is half of a character"
            ) from error
