"""Public model families: their `config.json` as a `DecoderConfig`, their tensors as ours.

What a config asks for is either implemented, known to be harmless, or refused by name: a field that
is silently ignored trains another model than the one that was loaded.

A fused matrix of ours is a stack of row ranges of their tensors; `sources` lists them. InternLM2
stores query, key and value interleaved: for each key head, its query heads, it, its value.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels.rope import RopeScaling, yarn_attention_factor
from .model import DecoderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What sets a family apart."""

    architecture: str
    """`architectures[0]` of its config."""
    qk_norm: bool = False
    qkv_bias: bool = False
    uses_internlm2_names: bool = False


FAMILIES = {
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True),
    "llama": Family(architecture="LlamaForCausalLM"),
    "mistral": Family(architecture="MistralForCausalLM"),
    "internlm2": Family(architecture="InternLM2ForCausalLM", uses_internlm2_names=True),
}

_IMPLEMENTED = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "hidden_act", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types",
}  # fmt: skip
_HARMLESS = {
    "_name_or_path", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
    "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "return_dict", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
    "problem_type", "decoder_start_token_id",
}  # fmt: skip
_ROPE_FIELDS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "truncate",
    "mscale", "mscale_all_dim",
}  # fmt: skip


def decoder_config(raw: dict[str, Any]) -> DecoderConfig:
    """The shape that a Hugging Face `config.json` describes.

    Raises:
        ValueError: an architecture or a field that is not implemented, by name; a missing field.
    """
    family_name = raw.get("model_type")
    architecture = (raw.get("architectures") or [None])[0]
    family = FAMILIES.get(str(family_name))
    if family is None or architecture not in (None, family.architecture):
        known = ", ".join(f"{f.architecture} ({name})" for name, f in FAMILIES.items())
        raise ValueError(
            f"config.json: architecture {architecture} ({family_name}) is not supported; "
            f"supported are {known}"
        )
    _refuse_unimplemented(raw)
    try:
        num_heads, hidden_size = raw["num_attention_heads"], raw["hidden_size"]
        return DecoderConfig(
            family=str(family_name),
            vocab_size=raw["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or hidden_size // num_heads,
            max_position_embeddings=raw["max_position_embeddings"],
            rope_theta=float(_rope_parameters(raw).get("rope_theta", 10_000.0)),
            rope_scaling=_rope_scaling(raw),
            rms_norm_epsilon=raw["rms_norm_eps"],
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias,
            tie_embeddings=raw.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"config.json has no field {error}") from None


def qwen3_config(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_position_embeddings: int,
    rope_theta: float,
    tie_embeddings: bool,
    eos_token_id: int,
) -> dict[str, Any]:
    """The `config.json` of a Qwen3 of any shape, for models trained from random weights."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tie_embeddings,
        "eos_token_id": eos_token_id,
    }


def base_config(name: str) -> dict[str, Any]:
    """The `config.json` of a base of the study, by its public name without the owner.

    For benchmarks and memory estimates of its exact shape, without a download.

    Raises:
        ValueError: an unknown name.
    """
    bases = json.loads(Path(__file__).with_name("bases.json").read_text())
    if name not in bases:
        raise ValueError(f"no base is called {name!r}; there are {', '.join(bases)}")
    return bases[name]


def check_vocabulary(raw: dict[str, Any], num_tokens: int, eos_token_id: int) -> str | None:
    """Compare a tokenizer with the model it is to serve; a sentence where the model is padded.

    Raises:
        ValueError: the tokenizer has tokens that the model lacks, or ends responses otherwise.
    """
    vocab_size, ends = raw["vocab_size"], raw.get("eos_token_id")
    if num_tokens > vocab_size:
        raise ValueError(
            f"the tokenizer has {num_tokens} tokens, the model's vocab_size is {vocab_size}: they "
            "do not belong together"
        )
    if ends is not None and eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"the tokenizer's end-of-sequence token is {eos_token_id}, config.json says {ends}: "
            "set eos_token in tokenizer_config.json, or eos_token_id in config.json"
        )
    if num_tokens < vocab_size:
        return f"vocab_size {vocab_size} is padded: {vocab_size - num_tokens} rows have no token"
    return None


def _refuse_unimplemented(raw: dict[str, Any]) -> None:
    window, context = raw.get("sliding_window"), raw["max_position_embeddings"]
    is_qwen = raw["model_type"].startswith("qwen")
    uses_window = raw.get("use_sliding_window", False) if is_qwen else window is not None
    if uses_window and window is not None and window < context:
        raise ValueError(
            f"config.json: sliding_window {window} is shorter than the context of {context}; "
            "sliding-window attention is not implemented"
        )
    layer_types = set(raw.get("layer_types") or []) - {"full_attention"}
    if layer_types:
        raise ValueError(f"config.json: layer_types {sorted(layer_types)} are not implemented")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {raw['hidden_act']!r} is not implemented (silu)")
    for name in sorted(raw.keys() - _IMPLEMENTED - _HARMLESS):
        if not _is_inactive(raw[name]):
            raise ValueError(
                f"config.json: {name} = {raw[name]!r} is not implemented; training would ignore it"
            )


def _rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 keeps everything in `rope_parameters`, earlier ones in two fields."""
    nested = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return {"rope_theta": raw.get("rope_theta", 10_000.0), **nested}


def _rope_scaling(raw: dict[str, Any]) -> RopeScaling:
    given = _rope_parameters(raw)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise ValueError(f"config.json: rope type {kind!r} is not implemented")
    unknown = sorted(k for k in given.keys() - _ROPE_FIELDS if not _is_inactive(given[k]))
    if unknown:
        raise ValueError(f"config.json: rope parameters {unknown} are not implemented")
    if kind == "default":
        return RopeScaling()
    context = raw["max_position_embeddings"]
    # Dynamic scaling counts from max_position_embeddings, in transformers as in the original code.
    original = context if kind == "dynamic" else given.get("original_max_position_embeddings")
    factor = given.get("factor") or context / (original or context)
    scales = given.get("mscale"), given.get("mscale_all_dim")
    attention_factor = given.get("attention_factor") or (
        yarn_attention_factor(factor, scales[0]) / yarn_attention_factor(factor, scales[1])
        if scales[0] and scales[1]
        else yarn_attention_factor(factor)
    )
    return RopeScaling(
        kind=kind,
        factor=float(factor),
        original_max_positions=original or context,
        low_frequency_factor=given.get("low_freq_factor", 1.0),
        high_frequency_factor=given.get("high_freq_factor", 4.0),
        beta_fast=given.get("beta_fast") or 32.0,
        beta_slow=given.get("beta_slow") or 1.0,
        truncate=given.get("truncate", True),
        attention_factor=attention_factor if kind == "yarn" else 1.0,
    )


def _is_inactive(value: Any) -> bool:
    """Whether a field that we do not know asks for nothing: no bias, a scale of 1, ..."""
    return value is None or value is False or (value is not True and value in (0, 1, "", [], {}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """`num_rows` rows of one of their tensors, from `first_row` on."""

    tensor: str
    first_row: int
    num_rows: int


def sources(parameter: str, config: DecoderConfig) -> list[Source]:
    """Their rows, in our order, that make up our parameter."""
    uses_internlm2 = FAMILIES[config.family].uses_internlm2_names
    names = _INTERNLM2_NAMES if uses_internlm2 else _LLAMA_NAMES
    if not parameter.startswith("blocks."):
        rows = config.hidden_size if parameter == "norm.weight" else config.vocab_size
        return [Source(tensor=names[parameter], first_row=0, num_rows=rows)]
    _, layer, inner = parameter.split(".", 2)
    prefix = f"model.layers.{layer}."
    module, kind = inner.rsplit(".", 1)
    query_rows, key_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if module == "attention.qkv_proj" and uses_internlm2:
        return _interleaved(f"{prefix}attention.wqkv.{kind}", config)
    parts = {
        "attention.qkv_proj": [
            ("attention.q_proj", query_rows),
            ("attention.k_proj", key_rows),
            ("attention.v_proj", key_rows),
        ],
        "feed_forward.gate_up_proj": [
            ("feed_forward.gate_proj", config.intermediate_size),
            ("feed_forward.up_proj", config.intermediate_size),
        ],
        "attention.q_norm": [(module, config.head_dim)],
        "attention.k_norm": [(module, config.head_dim)],
    }.get(module, [(module, config.hidden_size)])
    return [
        Source(tensor=f"{prefix}{names[part]}.{kind}", first_row=0, num_rows=rows)
        for part, rows in parts
    ]


def _interleaved(tensor: str, config: DecoderConfig) -> list[Source]:
    """InternLM2's wqkv: for each key head, its query heads, the key head, the value head."""
    head, queries = config.head_dim, config.num_heads // config.num_kv_heads
    starts = [group * (queries + 2) * head for group in range(config.num_kv_heads)]
    return [
        Source(tensor=tensor, first_row=start + offset * head, num_rows=heads * head)
        for offset, heads in ((0, queries), (queries, 1), (queries + 1, 1))
        for start in starts
    ]


_LLAMA_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.o_proj": "self_attn.o_proj",
    "feed_forward.gate_proj": "mlp.gate_proj",
    "feed_forward.up_proj": "mlp.up_proj",
    "feed_forward.down_proj": "mlp.down_proj",
}
_INTERNLM2_NAMES = {
    "embedding.weight": "model.tok_embeddings.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "output.weight",
    "input_norm": "attention_norm",
    "post_attention_norm": "ffn_norm",
    "attention.o_proj": "attention.wo",
    "feed_forward.gate_proj": "feed_forward.w1",
    "feed_forward.up_proj": "feed_forward.w3",
    "feed_forward.down_proj": "feed_forward.w2",
}
