"""tiktoken gives tokenizers' ids: for texts of every kind, every character, or it is not used."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longcot.data.byte_pairs import PATTERNS, encode_text, find_encoding
from longcot.data.chat import load_tokenizer
from longcot.data.tokenizer import train_tokenizer

# Words, code, runs of blanks, signs and letters of several scripts, so that many merges are learnt.
CORPUS = [
    "".join(f"    for i{n} in range({n}): # it's {n * n}\n\n\treturn aab{'ab' * (n % 7)}  \n"
            for n in range(400)),
    "The sum of the angles is 180°, so β + ω = 90° — naïve, 日本語の文章, Привет мир! " * 20,
]  # fmt: skip


def learnt(pattern: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["qwen", "llama3", "gpt2"])
def both(request):
    """(Hugging Face's tokenizer, the same in tiktoken)."""
    if request.param == "gpt2":  # the demo's: ByteLevel splits by its own pattern
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(CORPUS))
    else:
        tokenizer = learnt(PATTERNS[request.param])
    encoding, why = find_encoding(tokenizer)
    assert encoding is not None, why
    return tokenizer, encoding


def assert_equal(both, texts):
    tokenizer, encoding = both
    wanted = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, wanted, strict=True):
        found = encode_text(encoding, text)
        assert found is None or found.tolist() == ids, text


PARTS = st.one_of(
    st.text(max_size=8),
    st.text(alphabet=" \t\n\r'sStTeE.,()12ab", max_size=12),
    st.sampled_from(["<|im_end|>", "<think>", "</think", "|>", "it's", "aabababab", "日本語", "°"]),
)


@settings(deadline=None, max_examples=400)
@given(parts=st.lists(PARTS, max_size=12))
def test_any_text_gives_the_same_ids(both, parts):
    assert_equal(both, ["".join(parts)])


@pytest.mark.parametrize(
    "stop", [0x3400, pytest.param(0x110000, marks=pytest.mark.slow)], ids=["to CJK", "all"]
)
def test_every_character_is_split_alike(both, stop):
    """In words, between digits, before breaks, behind an apostrophe."""
    characters = [chr(c) for c in range(stop) if not 0xD800 <= c < 0xE000]
    contexts = [f"a{c}b 1{c}2 {c}{c}\n{c} '{c}{c}\t" for c in characters]
    # Many in one text: a call for each would take minutes.
    assert_equal(both, ["".join(contexts[i : i + 200]) for i in range(0, len(contexts), 200)])


def test_long_runs_are_merged_alike(both):
    assert_equal(both, [c * n for c in "ab ^\n9é" for n in (1, 2, 7, 1000, 50_001)])


def test_text_that_is_normalized_first_is_left_to_tokenizers(both):
    assert encode_text(both[1], "e\u0301") is None
    assert encode_text(both[1], "\u00e9") is not None


def changed(tokenizer, change):
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))


def swap_ids(parts):
    """Two tokens exchange their ids: tiktoken would merge them in the other order."""
    vocabulary = parts["model"]["vocab"]
    first, second = (next(t for t, i in vocabulary.items() if i == n) for n in (300, 350))
    vocabulary[first], vocabulary[second] = 350, 300


def drop_merge(parts):
    """A token that nothing makes any more: tiktoken would still find it."""
    del parts["model"]["merges"][50]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_ids, "its merges are not in the order of its ids"),
        (drop_merge, "is not what its own merges make"),
        (lambda p: p.update(normalizer={"type": "NFKC"}), "its normalizer is NFKC"),
        (lambda p: p.update(normalizer={"type": "Lowercase"}), "its normalizer is Lowercase"),
        (lambda p: p.update(decoder=None), "not of bytes"),
        (lambda p: p["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "not of"),
        (lambda p: p["pre_tokenizer"]["pretokenizers"][0].update(invert=True), "not of bytes"),
        (lambda p: p["added_tokens"][3].update(lstrip=True), "takes its neighbours along"),
        (lambda p: p["added_tokens"][3].update(content="<|im"), "added tokens overlap"),
        (
            lambda p: p["pre_tokenizer"]["pretokenizers"][0].update(
                pattern={"Regex": r"\\s+|\\S+"}
            ),
            "its pattern is not one",
        ),
        (lambda p: p["model"].update(dropout=0.1), "not plain byte-pair encoding"),
    ],
)
def test_a_tokenizer_that_would_differ_is_left_alone(change, reason):
    encoding, why = find_encoding(changed(learnt(PATTERNS["qwen"]), change))
    assert encoding is None and reason in why


def test_a_vocabulary_of_single_words_is_left_alone():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert find_encoding(PreTrainedTokenizerFast(tokenizer_object=tokenizer))[0] is None


def test_a_build_by_either_is_the_same(tmp_path, write_rows, tokenizer_path):
    from longcot.data.sources import open_source, scan
    from longcot.data.tokenized import open_or_build

    texts = [*CORPUS, "e\u0301 stays", "<think>\n</think>", " " * 99]
    path = write_rows(
        tmp_path / "a.jsonl",
        [{"id": str(i), "prompt": "e\u0301" + text[:30], "response": text}
         for i, text in enumerate(texts)],
    )  # fmt: skip
    made = [
        open_or_build(
            tmp_path / name, scan(open_source(str(path))), tokenizer_path=tokenizer_path,
            max_tokens=10**6, encoder=name,
        )
        for name in ("auto", "tokenizers")
    ]  # fmt: skip
    assert find_encoding(load_tokenizer(str(tokenizer_path)))[0] is not None
    assert np.array_equal(made[0].tokens, made[1].tokens)
    assert np.array_equal(made[0].is_target, made[1].is_target)
