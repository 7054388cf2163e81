"""Reading a Hugging Face model directory without loading the model."""

import hashlib
import json
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",  # holds the end-of-sequence ids that vLLM stops at
)


def model_config(model: Path) -> dict[str, Any]:
    """`config.json` of a model directory.

    Raises:
        ValueError: no such file, or not an object with a context length.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        context = config["max_position_embeddings"]
    except FileNotFoundError:
        raise ValueError(f"{model} is not a model directory: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{model}/config.json cannot be used: {error!r}") from error
    if not isinstance(context, int):
        raise ValueError(f"{model}/config.json: max_position_embeddings is {context!r}")
    return config


def tensor_shapes(model: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Data type and shape of every tensor in a model directory, read from the file headers.

    Raises:
        ValueError: no weights, or a file that is cut short or otherwise corrupt.
    """
    from safetensors import SafetensorError, safe_open

    shapes = {}
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model} has no weights (*.safetensors)")
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    shapes[name] = (part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise ValueError(
                f"{file} is corrupt ({error}): remove this checkpoint, or write it again"
            ) from error
    return shapes


def model_signature(model: Path) -> tuple[Any, ...]:
    """Equal for two directories exactly if one engine can hold the weights of either."""
    config = {k: v for k, v in model_config(model).items() if k != "transformers_version"}
    files = tuple(
        hashlib.sha256((model / name).read_bytes()).digest() if (model / name).exists() else None
        for name in TOKENIZER_FILES
    )
    # vLLM only warns about a tensor that a checkpoint lacks and keeps the old one: compare here.
    return json.dumps(config, sort_keys=True), files, tensor_shapes(model)
