"""The decoder against transformers, through an export; packed against single documents."""

import numpy as np
import pytest
import torch

from longcot.data.batch import pack_documents
from longcot.data.tokenizer import save_tokenizer, train_tokenizer
from longcot.trainer import weights
from longcot.trainer.model import Decoder, DecoderConfig

SHAPES = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "grouped": {"num_kv_heads": 2, "head_dim": 16},  # heads * head_dim is not hidden_size
    "rope": {"rope_theta": 1e6},
}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["Numbers: 3 5 7\nTarget: 26"]), path)
    return path


def build(**changes):
    shape = {
        "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 4, "head_dim": 12, "max_position_embeddings": 128, "rope_theta": 1e4,
    }  # fmt: skip
    model = Decoder(DecoderConfig(**(shape | changes)), "sdpa")
    model.initialize(1)
    with torch.no_grad():  # norms at one and small logits would hide a mistake
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.copy_(
                torch.linspace(0.5, 1.5, len(parameter))
            )
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_an_export_and_computes_the_same_logits(shape, tmp_path, tokenizer_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = build(**SHAPES[shape])
    folder = tmp_path / "model"
    weights.export(
        model, folder, tokenizer_path=tokenizer_path, dtype=torch.float32, is_writer=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == theirs.config.eos_token_id
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 320, length) for length in (2, 31, 100)]
    packed = model.logits(pack_documents(documents, [1, 1, 1]))
    start = 0
    for document in documents:
        with torch.no_grad():
            expected = theirs(torch.from_numpy(document)[None]).logits[0]
        single = model.logits(pack_documents([document], [1]))
        end = start + len(document)
        assert expected.abs().max() > 1
        assert (single - expected).abs().max() < 1e-5
        assert (packed[start:end] - expected).abs().max() < 1e-5
        start = end


def test_large_models_are_written_in_shards_with_an_index(tmp_path, tokenizer_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 50_000)
    model = build(tie_embeddings=False)
    folder = tmp_path / "model"
    weights.export(
        model, folder, tokenizer_path=tokenizer_path, dtype=torch.bfloat16, is_writer=True
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    expected = model.embedding.weight.to(torch.bfloat16)
    assert torch.equal(theirs.state_dict()["model.embed_tokens.weight"], expected)


def test_initial_weights_depend_on_the_seed_alone():
    first, second = build(), build()
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "named"), [({"num_kv_heads": 3}, "num_kv_heads 3"), ({"head_dim": 7}, "head_dim 7")]
)
def test_impossible_shapes_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        build(**change)
