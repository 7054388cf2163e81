"""Our parameters under the Hugging Face names, and a Hugging Face directory from a sharded model.

Fused matrices are stacks of rows: `qkv_proj` holds q, k and v, `gate_up_proj` holds gate and up.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .model import Decoder, DecoderConfig

MAX_SHARD_BYTES = 5 * 10**9


def hugging_face_names(name: str, config: DecoderConfig) -> list[tuple[str, int]]:
    """(Hugging Face name, rows) of each tensor in our parameter `name`; -1 stands for all rows."""
    outer = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    if name in outer:
        return [(outer[name], -1)]
    _, layer, inner = name.split(".", 2)
    query_rows, key_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {
        "input_norm.weight": [("input_layernorm.weight", -1)],
        "post_attention_norm.weight": [("post_attention_layernorm.weight", -1)],
        "attention.q_norm.weight": [("self_attn.q_norm.weight", -1)],
        "attention.k_norm.weight": [("self_attn.k_norm.weight", -1)],
        "attention.o_proj.weight": [("self_attn.o_proj.weight", -1)],
        "attention.qkv_proj.weight": [
            ("self_attn.q_proj.weight", query_rows),
            ("self_attn.k_proj.weight", key_rows),
            ("self_attn.v_proj.weight", key_rows),
        ],
        "feed_forward.gate_up_proj.weight": [
            ("mlp.gate_proj.weight", config.intermediate_size),
            ("mlp.up_proj.weight", config.intermediate_size),
        ],
        "feed_forward.down_proj.weight": [("mlp.down_proj.weight", -1)],
    }[inner]
    return [(f"model.layers.{layer}.{part}", rows) for part, rows in parts]


def hugging_face_tensors(model: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under its Hugging Face name, whole, on CPU, rounded once to `dtype`.

    A collective: every rank must run through it. One parameter is gathered at a time.
    """
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        whole = (value.full_tensor() if isinstance(value, DTensor) else value).to("cpu", dtype)
        start = 0
        for tensor_name, rows in hugging_face_names(name, model.config):
            end = start + (rows if rows >= 0 else whole.shape[0])
            yield tensor_name, whole[start:end].contiguous()
            start = end


def export(
    model: Decoder, folder: Path, *, tokenizer_path: Path, dtype: torch.dtype, is_writer: bool
) -> None:
    """Write a folder that transformers and vLLM load as it is. A collective; one rank writes.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    if is_writer:
        folder.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    shards: list[Path] = []
    weight_map: dict[str, int] = {}  # tensor -> number of its shard, from 0
    total_bytes = held_bytes = 0
    for name, tensor in hugging_face_tensors(model, dtype):
        if shard and held_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append(_write_shard(shard, folder, len(shards), is_writer))
            shard, held_bytes = {}, 0
        shard[name] = tensor
        weight_map[name] = len(shards)
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    shards.append(_write_shard(shard, folder, len(shards), is_writer))
    if is_writer:
        _name_shards(shards, weight_map, total_bytes)
        _write_config(model.config, folder, tokenizer_path, dtype)


def _write_shard(tensors: dict[str, Tensor], folder: Path, number: int, is_writer: bool) -> Path:
    path = folder / f"shard-{number}.safetensors"
    if is_writer:
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # its only failure here is the disk's
            raise OSError(f"{path} cannot be written: {error}") from error
    return path


def _name_shards(shards: list[Path], weight_map: dict[str, int], total_bytes: int) -> None:
    """Give the shards their final names, which hold their number: known only at the end."""
    if len(shards) == 1:
        shards[0].rename(shards[0].with_name("model.safetensors"))
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for path, name in zip(shards, names, strict=True):
        path.rename(path.with_name(name))
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {tensor: names[number] for tensor, number in weight_map.items()},
    }
    (shards[0].parent / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_config(
    config: DecoderConfig, folder: Path, tokenizer_path: Path, dtype: torch.dtype
) -> None:
    from transformers import GenerationConfig, Qwen3Config

    from ..data.chat import load_tokenizer

    for file in sorted(tokenizer_path.iterdir()):
        shutil.copyfile(file, folder / file.name)
    end_of_sequence = load_tokenizer(str(tokenizer_path)).eos_token_id
    Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_epsilon,
        tie_word_embeddings=config.tie_embeddings,
        eos_token_id=end_of_sequence,
        dtype=str(dtype).removeprefix("torch."),
    ).save_pretrained(str(folder))
    GenerationConfig(eos_token_id=end_of_sequence).save_pretrained(str(folder))
