"""A row as token ids: the prompt by the chat template, the response tokenized alone, the
tokenizer's EOS behind it.

This is how the paper behind this project does it. What is a target: every response token and the
EOS.
"""

from typing import Any

from .examples import Example


def load_tokenizer(folder: str) -> Any:
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
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer in {folder} has no chat template: set one in its tokenizer_config.json"
        )
    return tokenizer


def encode_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of the chat turns and the header of the assistant's turn."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_example(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids with EOS).

    Raises:
        ValueError: an empty response, or one that its tokens do not give back to the letter.
    """
    if not example.response:
        raise ValueError("empty response")
    response = tokenizer(example.response, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(response) != example.response:
        raise ValueError("tokens do not decode to the response")
    return encode_prompt(tokenizer, example.messages), [*response, tokenizer.eos_token_id]


def show_targets(tokenizer: Any, prompt: list[int], response: list[int]) -> str:
    """One row as the model sees it; the targets stand between the angle quotes."""
    return f"{tokenizer.decode(prompt)}\u00bb{tokenizer.decode(response)}\u00ab"
