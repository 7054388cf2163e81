"""What is learnt is what the row says: every template, every way to render, decoded again."""

import pytest
from tokenizers import normalizers

from longcot.data.chat import encode, load_tokenizer, marked, render, show_targets
from longcot.data.examples import Example
from longcot.data.rules import Rules

THOUGHT = "<think>\nword1\n</think>\n\n\\boxed{1}"
TURNS = [
    {"role": "system", "content": "Think."},
    {"role": "user", "content": "What is 1?"},
    {"role": "assistant", "content": "word1"},
    {"role": "user", "content": "What is 2?"},
]


def example(messages=TURNS[1:2], response=THOUGHT):
    return Example(id="a", messages=messages, response=response, answer=None, source="")


def shown(tokenizer, row, **rules):
    """The row in words, what is learnt between angle quotes."""
    (encoded,) = encode(tokenizer, [render(tokenizer, row, Rules(**rules))])
    assert not isinstance(encoded, str), encoded
    tokens, is_target = encoded
    return marked(show_targets(tokenizer, tokens, is_target))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return load_tokenizer(str(tokenizer_path))


@pytest.fixture(scope="module")
def rewriting(with_template):
    return load_tokenizer(str(with_template()))


USER = "<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\n"


def test_the_response_and_its_end_are_learnt_alone_or_as_the_template_renders_it(tokenizer):
    assert shown(tokenizer, example()) == f"{USER}»{THOUGHT}<|endoftext|>«"
    assert shown(tokenizer, example(), response="template") == f"{USER}»{THOUGHT}<|im_end|>«"
    plain = shown(tokenizer, example(TURNS[:2]), template="plain")
    assert plain == f"Think.\nQuestion: What is 1?\nAnswer:»{THOUGHT}<|endoftext|>«"


def test_every_turn_of_the_assistant_is_learnt_with_the_token_that_closes_it(tokenizer):
    begin = "<|im_start|>system\nThink.<|im_end|>\n" + USER
    between = "\n<|im_start|>user\nWhat is 2?<|im_end|>\n<|im_start|>assistant\n"
    assert shown(tokenizer, example(TURNS)) == (
        f"{begin}word1<|im_end|>{between}»{THOUGHT}<|endoftext|>«"
    )
    assert shown(tokenizer, example(TURNS), targets="every_turn") == (
        f"{begin}»word1<|im_end|>«{between}»{THOUGHT}<|endoftext|>«"
    )
    assert shown(tokenizer, example(TURNS), targets="every_turn", response="template") == (
        f"{begin}»word1<|im_end|>«{between}»{THOUGHT}<|im_end|>«"
    )


def test_a_template_that_rewrites_the_response_is_caught_with_the_difference(rewriting):
    one_line = THOUGHT.replace("\n\n", "\n")
    # Alone the response stays as it is, whatever the template would do.
    assert f"»{one_line}<|endoftext|>«" in shown(rewriting, example(response=one_line))
    assert f"»{THOUGHT}<|im_end|>«" in shown(rewriting, example(), response="template")
    with pytest.raises(ValueError) as caught:
        render(rewriting, example(response=one_line), Rules(response="template"))
    assert str(caught.value) == (
        "the template rewrites the row: at character 23 the row has "
        "...'\\n</think>\\n\\\\boxed{1}', the result "
        "...'\\n</think>\\n\\n\\\\boxed{1}<|im_end|>\\n'"
    )


def test_a_template_that_takes_thinking_out_of_earlier_turns_is_caught_or_noted(rewriting):
    messages = [TURNS[1], {"role": "assistant", "content": THOUGHT}, TURNS[3]]
    with pytest.raises(ValueError, match="rewrites the row: at character 0 the row has '<think"):
        render(rewriting, example(messages), Rules(targets="every_turn"))
    # Not learnt, it is what the model will see when sampled too; somebody should know.
    (note,) = render(rewriting, example(messages), Rules()).notes
    assert note.startswith("the template changes a turn: the assistant's, '<think>")
    assert render(rewriting, example(TURNS), Rules()).notes == []


@pytest.mark.parametrize(
    ("template", "row", "rules", "reason"),
    [
        (None, example(response=""), {}, "empty response"),
        (None, example(response="a<|endoftext|>b"), {}, "end of sequence inside the response: "),
        ("{{ raise_exception('roles must alternate') }}", example(), {},
         "the chat template refuses the row: roles must alternate"),
        ("", example(), {}, "the tokenizer in"),
        ("{% if false %}{% endif %}", example(), {}, "empty prompt: "),
        ("{{ messages[0].content }}\n<think>\n", example(), {}, "<think> twice: "),
        # DeepSeek-R1's distillations open the thinking in the generation prompt.
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
         "{% if add_generation_prompt %}<think>\n{% endif %}", example(),
         {"response": "template"}, "the template rewrites the row: "),
        ("{% for m in messages %}{{ m.content }}\nEND\n{% endfor %}", example(),
         {"response": "template"}, "no end of turn: "),
        (None, example([{"role": "tool", "content": "x"}]), {"template": "plain"}, "unknown role"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_learnt_says_why(
    template, row, rules, reason, tokenizer, with_template
):
    with pytest.raises(ValueError) as caught:
        ours = tokenizer if template is None else load_tokenizer(str(with_template(template)))
        render(ours, row, Rules(**rules))
    assert str(caught.value).startswith(reason)


def test_tokens_that_do_not_decode_to_the_response_are_caught(tokenizer_path):
    tokenizer = load_tokenizer(str(tokenizer_path))
    # As Qwen's: composed and decomposed letters become one, so the text is not what it was.
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    rows = [example(response="e\u0301"), example(response="\u00e9")]
    wrong, right = encode(tokenizer, [render(tokenizer, row, Rules()) for row in rows])
    assert wrong == (
        "tokens do not decode to the response: at character 0 the row has 'e\u0301', the "
        "result '\u00e9'"
    )
    assert not isinstance(right, str)


def test_a_saved_length_of_the_tokenizer_cuts_nothing(tokenizer_path):
    tokenizer = load_tokenizer(str(tokenizer_path))
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert shown(tokenizer, example()) == f"{USER}»{THOUGHT}<|endoftext|>«"


def test_a_tokenizer_that_cannot_end_or_has_no_template_is_refused(tokenizer_path, with_template):
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="no tokenizer can be loaded from /nowhere"):
        load_tokenizer("/nowhere")
    without_template = with_template("")
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(str(without_template))
    plain = load_tokenizer(str(without_template), needs_chat_template=False)
    assert f"Answer:»{THOUGHT}" in shown(plain, example(), template="plain")
    endless = AutoTokenizer.from_pretrained(str(tokenizer_path))
    endless.eos_token = None
    endless.save_pretrained(str(without_template))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(str(without_template))


def test_rules_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="template is 'plain'"):
        Rules(template="plain", response="template")
    with pytest.raises(ValueError, match="template is 'plain'"):
        Rules(template="plain", targets="every_turn")


def test_a_long_row_is_shown_without_its_middle_and_in_colour():
    text = marked([("prompt", False), ("a" * 5000 + "z", True)], colour=True)
    assert text.startswith("prompt\x1b[32maaa") and text.endswith("az\x1b[0m")
    assert "2,601 characters not shown" in text and len(text) < 2600
