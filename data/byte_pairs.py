"""The same byte-pair encoding by tiktoken, six times as fast as by tokenizers, where that is exact.

Both split a text into words by a pattern and merge the bytes of each word pair by pair. tokenizers
merges the listed pairs in the order of the list; tiktoken merges any two neighbours that together
are a token, lowest id first. The results are equal if

1. the listed merges make tokens in the order of their ids, and
2. every token, merged on its own, becomes itself.

For suppose that two neighbours x, y make the token t in tiktoken. No merge has crossed the borders
of t, merges are never undone, and so within t the same merges were made as in t alone, which by 2
ends with t's own listed pair: x, y is that pair, and by 1 both take it at the same time.

Both conditions are checked on the vocabulary, and the tokenizer's other parts are compared with
what tiktoken does. The two regular expression engines are not one: only patterns are taken by
which they were seen to split alike, every character of Unicode included
(tests/data/test_byte_pairs.py).
"""

import itertools
import json
import unicodedata
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer

PATTERNS = {
    # tokenizers' ByteLevel, where it splits by itself.
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Qwen2, Qwen2.5 and Qwen3.
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Those by which both engines were seen to split alike."""


def find_encoding(tokenizer: Any) -> tuple[tiktoken.Encoding | None, str]:
    """(the encoding in tiktoken, or None where it would not be exact; why in a few words)."""
    if not tokenizer.is_fast:
        return None, "no fast tokenizer"
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    pattern = _pattern(parts["pre_tokenizer"])
    if pattern is None or (parts["decoder"] or {}).get("type") != "ByteLevel":
        return None, "the tokenizer is not of bytes, split by one pattern"
    if pattern not in PATTERNS.values():
        return None, "its pattern is not one by which both were seen to split alike"
    if model["type"] != "BPE" or any(
        model.get(name)
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    ):
        return None, "its model is not plain byte-pair encoding"
    if (parts["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return None, f"its normalizer is {parts['normalizer']['type']}"
    added = {token["content"]: token["id"] for token in parts["added_tokens"]}
    if any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in parts["added_tokens"]):
        return None, "an added token takes its neighbours along"
    if _overlap(list(added)):
        return None, "its added tokens overlap"
    letters = _byte_letters()
    words = {word: id for word, id in model["vocab"].items() if id not in added.values()}
    if not all(letters.keys() >= set(word) for word in words):
        return None, "a token is not of bytes"
    reason = _inexact(parts, words, set(letters))
    if reason:
        return None, reason
    ranks = {bytes(letters[letter] for letter in word): id for word, id in words.items()}
    encoding = tiktoken.Encoding(
        "longcot", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added
    )
    return encoding, "equal byte-pair encoding"


def encode_text(encoding: tiktoken.Encoding, text: str) -> np.ndarray | None:
    """(L,) uint32; None where the text would first have to be normalized."""
    if not unicodedata.is_normalized("NFC", text):
        return None
    return encoding.encode_to_numpy(text, allowed_special="all", disallowed_special=())


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The one regular expression that splits, where nothing else happens to the words."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    last = steps[-1] or {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1 and last["use_regex"]:
        return PATTERNS["gpt2"]
    if len(steps) == 2 and not last["use_regex"]:
        split = steps[0]
        if split["type"] == "Split" and (split["behavior"], split["invert"]) == ("Isolated", False):
            return split["pattern"].get("Regex")
    return None


def _overlap(tokens: list[str]) -> bool:
    """Whether a text could be divided into these in two ways: then the order of search decides."""
    starts = {token[:n] for token in tokens for n in range(1, len(token) + 1)}
    ends_like_a_start = any(t[n:] in starts for t in tokens for n in range(1, len(t)))
    begins_with_another = any(t[:n] in tokens for t in tokens for n in range(1, len(t)))
    return ends_like_a_start or begins_with_another or any(
        a != b and a in b for a in tokens for b in tokens
    )  # fmt: skip


def _inexact(parts: dict[str, Any], words: dict[str, int], letters: set[str]) -> str:
    """What speaks against conditions 1 and 2; empty where both hold."""
    if not letters <= words.keys():
        return "a byte has no token"
    model = parts["model"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made = [model["vocab"].get("".join(pair), -1) for pair in pairs]
    if any(later < earlier for earlier, later in itertools.pairwise(made)):
        return "its merges are not in the order of its ids"
    # Whole words that are tokens are looked up by some models, and by tiktoken: here all merge.
    plain = Tokenizer.from_str(json.dumps(parts | {"model": model | {"ignore_merges": False}}))
    for word, id in words.items():
        if [token.id for token in plain.model.tokenize(word)] != [id]:
            return f"its token {id} is not what its own merges make"
    return ""


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
