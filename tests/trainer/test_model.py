"""Parity with transformers: logits and gradients of every family, packed and single."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from longcot.data.batch import pack_documents, prompt_mask
from longcot.trainer.families import decoder_config, sources
from longcot.trainer.model import Decoder

LENGTHS = (2, 31, 100)  # the shortest that predicts anything, a prime, one beyond a llama3 context


def documents():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 320, length) for length in LENGTHS]


def theirs_of(folder, raw):
    """transformers' model of an exported directory; InternLM2, which it lacks, as a Llama."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if raw["model_type"] != "internlm2":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    from safetensors.torch import load_file

    skip = ("model_type", "architectures", "bias")
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in raw.items() if k not in skip}))
    names = {
        "tok_embeddings": "embed_tokens", "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "output.weight": "lm_head.weight",
    }  # fmt: skip
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "wqkv" in name:
            # As the original code reads it: (key heads, queries per key + 2, head size, hidden).
            grouped = tensor.view(2, 4, 32, 128)
            prefix = name.replace("attention.wqkv.weight", "self_attn.")
            state[prefix + "q_proj.weight"] = grouped[:, :2].reshape(-1, 128)
            state[prefix + "k_proj.weight"] = grouped[:, 2].reshape(-1, 128)
            state[prefix + "v_proj.weight"] = grouped[:, 3].reshape(-1, 128)
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    model.load_state_dict(state)
    return model


def assert_same_logits(model, theirs):
    """Packed and one document at a time, to 1e-5."""
    packed = model.logits(
        pack_documents(documents(), [prompt_mask(length, 1) for length in LENGTHS])
    )
    for document, ours in zip(documents(), packed.split(LENGTHS), strict=True):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(document)[None]).logits[0]
        single = model.logits(pack_documents([document], [prompt_mask(len(document), 1)]))
        assert expected.abs().max() > 1  # else 1e-5 would say little
        assert (single - expected).abs().max() < 1e-5
        assert (ours - expected).abs().max() < 1e-5


def test_parity_with_transformers_logits(raw, build, export, tmp_path):
    model = build(raw)
    assert_same_logits(model, theirs_of(export(model, raw, tmp_path / "m", torch.float32), raw))


def test_parity_with_transformers_gradients(raw, build, export, tmp_path):
    model = build(raw)
    theirs = theirs_of(export(model, raw, tmp_path / "model", torch.float32), raw)
    model(pack_documents(documents(), [prompt_mask(length, 1) for length in LENGTHS])).backward()
    for document in documents():
        ids = torch.from_numpy(document)
        logits = theirs(ids[None]).logits[0, :-1]
        functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    llama_raw = {**raw, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    names = decoder_config(llama_raw if raw["model_type"] == "internlm2" else raw)
    for name, parameter in model.named_parameters():
        stacked = torch.cat([expected[source.tensor] for source in sources(name, names)])
        assert parameter.grad is not None
        difference = (parameter.grad - stacked).norm() / stacked.norm()
        assert difference < 1e-5, f"{name}: {difference}"


ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-all": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "yarn-factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
    },
    "old-spelling": {"type": "linear", "factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("scaling", ROPE)
def test_parity_of_every_rope_scaling(scaling, build, export, tmp_path):
    # A context of 64: the document of 100 tokens is beyond it, where `dynamic` begins to stretch.
    raw = {
        **CONFIG, "rope_scaling": ROPE[scaling],
        "max_position_embeddings": 64 if scaling == "dynamic" else 128,
    }  # fmt: skip
    model = build(raw)
    assert_same_logits(model, theirs_of(export(model, raw, tmp_path / "m", torch.float32), raw))


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "hidden_act": "silu", "eos_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_key_value_heads": 3}, "num_kv_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
    ],
)
def test_impossible_shapes_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        Decoder(decoder_config(CONFIG | change), "sdpa")
