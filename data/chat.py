"""A row as token ids: the prompt by the chat template, the response tokenized alone, the
tokenizer's EOS behind it.

This is how the paper behind this project does it, and the default; `data/rules.py` lists the other
ways. A row is rendered as pieces of text, each a target or not, and every piece is tokenized by
itself: while sampling, too, a prompt ends where its tokens end. The tokens of every target must
decode to the text of the row to the letter, whatever the template does with `<think>` blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tiktoken import Encoding

from .byte_pairs import encode_text
from .examples import Example
from .rules import Rules

_EXCERPT_CHARACTERS = 40
_SHOWN_CHARACTERS = 2400


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered row that is tokenized by itself."""

    text: str
    is_target: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A row as text."""

    pieces: list[Piece]
    ends_with_eos: bool
    """The end-of-sequence id follows the last piece, as a target."""
    notes: list[str]
    """What the template changed in turns that are not learnt."""


def load_tokenizer(folder: str, *, needs_chat_template: bool = True) -> Any:
    """The Hugging Face tokenizer in `folder`.

    Raises:
        ValueError: there is none, or it lacks an end-of-sequence token or a chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be loaded from {folder}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} has no end-of-sequence token: no response could ever end"
        )
    if needs_chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer in {folder} has no chat template: set one in its tokenizer_config.json"
        )
    return tokenizer


def encode_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of the chat turns and the header of the assistant's turn."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(tokenizer: Any, example: Example, rules: Rules) -> Rendered:
    """The row as pieces of text.

    Raises:
        ValueError: `reason: detail` where the row cannot be learnt as it stands.
    """
    if not example.response:
        raise ValueError("empty response")
    if tokenizer.eos_token in example.response:
        raise ValueError(
            f"end of sequence inside the response: it holds {tokenizer.eos_token!r} as text, where "
            "the model would learn to stop; remove it"
        )
    prompt = _prompt_text(tokenizer, example.messages, rules)
    if not prompt:
        raise ValueError("empty prompt: the first token of a row cannot be learnt")
    notes = [
        f"the template changes a turn: the {turn['role']}'s, {_excerpt(turn['content'], 0)}"
        for turn in example.messages
        if turn["content"] not in prompt
    ]
    pieces: list[Piece] = []
    position = 0
    if rules.targets == "every_turn":
        for index, turn in enumerate(example.messages):
            if turn["role"] == "assistant":
                before = _prompt_text(tokenizer, example.messages[:index], rules)
                if not prompt.startswith(before):
                    raise ValueError(_rewritten(before, prompt))
                start = len(before)
                end, closing = _find_turn(tokenizer, prompt, start, turn["content"])
                pieces += [
                    Piece(prompt[position:start], False),
                    Piece(turn["content"], True),
                    Piece(closing, True),
                ]
                position = end
    pieces.append(Piece(prompt[position:], False))
    pieces.append(Piece(example.response, True))
    if rules.response == "template":
        turns = [*example.messages, {"role": "assistant", "content": example.response}]
        whole = _apply(tokenizer, turns, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ValueError(_rewritten(prompt, whole))
        _, closing = _find_turn(tokenizer, whole, len(prompt), example.response)
        pieces.append(Piece(closing, True))
    elif prompt.rstrip().endswith("<think>") and example.response.lstrip().startswith("<think>"):
        raise ValueError(
            "<think> twice: the template's generation prompt ends with it and the response begins "
            "with it; remove it from the responses, or choose another template"
        )
    return Rendered(pieces=pieces, ends_with_eos=rules.response == "alone", notes=notes)


def encode(
    tokenizer: Any, rows: Sequence[Rendered], fast: Encoding | None = None
) -> list[tuple[np.ndarray, np.ndarray] | str]:
    """(token ids, is target) of each row, uint32 and bool; or why its tokens cannot be used.

    Args:
        fast: the same encoding in tiktoken, from `byte_pairs.find_encoding`.
    """
    pieces = [piece for row in rows for piece in row.pieces]
    ids = _encode_texts(tokenizer, [piece.text for piece in pieces], fast)
    differing = _differing(
        tokenizer,
        {i: (p.text, ids[i].tolist()) for i, p in enumerate(pieces) if p.is_target},
        fast,
    )
    results: list[tuple[np.ndarray, np.ndarray] | str] = []
    at = 0
    for row in rows:
        mine = range(at, at + len(row.pieces))
        at = mine.stop
        wrong = next((i for i in mine if i in differing), None)
        if wrong is not None:
            difference = _difference(pieces[wrong].text, differing[wrong])
            results.append(f"tokens do not decode to the response: {difference}")
            continue
        parts = [ids[i] for i in mine]
        masks = [
            np.full(len(part), piece.is_target)
            for part, piece in zip(parts, row.pieces, strict=True)
        ]
        if row.ends_with_eos:
            parts.append(np.array([tokenizer.eos_token_id], dtype=np.uint32))
            masks.append(np.array([True]))
        tokens, is_target = np.concatenate(parts), np.concatenate(masks)
        results.append("empty prompt: it has no tokens" if is_target[0] else (tokens, is_target))
    return results


def show_targets(
    tokenizer: Any,
    tokens: np.ndarray,  # (L,) ids of one row
    is_target: np.ndarray,  # (L,) bool
) -> list[tuple[str, bool]]:
    """A row as the model sees it: its stretches of text, and whether each is learnt."""
    cuts = np.flatnonzero(np.diff(is_target)) + 1
    starts = [0, *cuts.tolist()]
    texts = _decode_texts(tokenizer, [part.tolist() for part in np.split(tokens, cuts)])
    return [(text, bool(is_target[start])) for text, start in zip(texts, starts, strict=True)]


def marked(stretches: Sequence[Sequence[Any]], *, colour: bool = False) -> str:
    """`show_targets` for people: targets in angle quotes, or green; long ones without their middle.

    Args:
        stretches: (text, is target) each.
    """
    before, behind = ("\x1b[32m", "\x1b[0m") if colour else ("\u00bb", "\u00ab")
    shown = []
    for text, is_target in stretches:
        if len(text) > _SHOWN_CHARACTERS:
            half = _SHOWN_CHARACTERS // 2
            left_out = f"{len(text) - 2 * half:,} characters"
            text = f"{text[:half]}\n[... {left_out} not shown ...]\n{text[-half:]}"
        shown.append(f"{before}{text}{behind}" if is_target else text)
    return "".join(shown)


def _encode_texts(tokenizer: Any, texts: list[str], fast: Encoding | None) -> list[np.ndarray]:
    """Ids of each text, uint32."""
    found = [None if fast is None else encode_text(fast, text) for text in texts]
    rest = [text for text, ids in zip(texts, found, strict=True) if ids is None]
    if not rest:
        slow = []
    elif tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # a saved tokenizer may carry a length at which it cuts in silence
        backend.no_padding()
        # Without the offsets, which nobody reads.
        slow = [e.ids for e in backend.encode_batch_fast(rest, add_special_tokens=False)]
    else:
        slow = tokenizer(rest, add_special_tokens=False)["input_ids"]
    others = iter(slow)
    return [np.array(next(others), np.uint32) if ids is None else ids for ids in found]


def _differing(
    tokenizer: Any, rows: dict[int, tuple[str, list[int]]], fast: Encoding | None
) -> dict[int, str]:
    """The rows whose ids do not decode to their text, with what they decode to."""
    if fast is not None:
        rows = {
            key: (text, ids)
            for key, (text, ids) in rows.items()
            if fast.decode_bytes(ids) != text.encode()
        }
    decoded = _decode_texts(tokenizer, [ids for _, ids in rows.values()])
    return {
        key: found
        for (key, (text, _)), found in zip(rows.items(), decoded, strict=True)
        if found != text
    }


def _decode_texts(tokenizer: Any, ids: list[list[int]]) -> list[str]:
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids]


def _prompt_text(tokenizer: Any, messages: list[dict[str, str]], rules: Rules) -> str:
    if rules.template == "chat":
        return _apply(tokenizer, messages, add_generation_prompt=True)
    forms = {"system": "{}\n", "user": "Question: {}\nAnswer:", "assistant": "{}\n"}
    unknown = [turn["role"] for turn in messages if turn["role"] not in forms]
    if unknown:
        raise ValueError(f"unknown role: {unknown[0]!r} in the plain template")
    # Not str.format on the turn: braces in it are text.
    return "".join(forms[turn["role"]].replace("{}", turn["content"]) for turn in messages)


def _apply(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the row: {error}") from error


def _find_turn(tokenizer: Any, rendered: str, start: int, content: str) -> tuple[int, str]:
    """(where the turn that begins at `start` ends, the text that closes it).

    Raises:
        ValueError: the template rewrites the turn, or closes it without a special token.
    """
    if not rendered.startswith(content, start):
        raise ValueError(_rewritten(content, rendered[start:]))
    end = start + len(content)
    specials = [s for t in tokenizer.added_tokens_decoder.values() if t.special and (s := str(t))]
    found = [(at, token) for token in specials if (at := rendered.find(token, end)) >= 0]
    at, token = min(found, default=(-1, ""))
    if at < 0 or rendered[end:at].strip():
        raise ValueError(
            "no end of turn: the chat template does not close the assistant's turn with a special "
            f"token but with {_excerpt(rendered, end)}; use response 'alone'"
        )
    return at + len(token), rendered[end : at + len(token)]


def _rewritten(expected: str, found: str) -> str:
    return f"the template rewrites the row: {_difference(expected, found)}"


def _difference(expected: str, found: str) -> str:
    """Where two texts part, with what stands there in each."""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
        min(len(expected), len(found)),
    )
    return (
        f"at character {at} the row has {_excerpt(expected, at)}, the result {_excerpt(found, at)}"
    )


def _excerpt(text: str, at: int) -> str:
    start = max(at - _EXCERPT_CHARACTERS // 4, 0)
    stop = at + _EXCERPT_CHARACTERS
    return f"{'...' if start else ''}{text[start:stop]!r}{'...' if stop < len(text) else ''}"
