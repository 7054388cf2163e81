"""Weights in and out: byte for byte over ranks and files, and every damage refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longcot.trainer import weights
from longcot.trainer.families import base_config, check_vocabulary, decoder_config
from longcot.trainer.model import Decoder

WORKER = Path(__file__).with_name("weights_worker.py")


def tensors_of(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def round_trip(source, destination, tokenizer_path, ranks, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(WORKER)]
    command += [str(source), str(destination), str(tokenizer_path), *map(str, more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return tensors_of(destination)


def same_bytes(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and tensor.shape == second[name].shape, name
        assert torch.equal(tensor.view(torch.int16), second[name].view(torch.int16)), name


def test_weights_loaded_and_exported_by_three_ranks_are_byte_identical(
    raw, build, export, tmp_path, tokenizer_path
):
    # Three ranks divide no dimension here evenly, so ranges cut through heads and stacked parts.
    source = export(build(raw), raw, tmp_path / "source", torch.bfloat16)
    again = round_trip(source, tmp_path / "again", tokenizer_path, 3)
    same_bytes(tensors_of(source), again)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_weights_written_by_transformers_survive_in_several_files(tmp_path, tokenizer_path):
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, eos_token_id=0,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    source = tmp_path / "source"
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(source, max_shard_size="60KB")
    assert (source / weights.INDEX_NAME).exists()
    again = round_trip(source, tmp_path / "again", tokenizer_path, 2, 70_000)
    same_bytes(tensors_of(source), again)
    files = list((tmp_path / "again").glob("model-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 80_000 for file in files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")  # reads our index
    same_bytes({k: v for k, v in loaded.state_dict().items()}, again)


def test_weights_from_a_seed_are_the_same_each_time_and_others_from_another(every_raw):
    raw = every_raw["qwen3"]
    device = torch.device("cpu")
    first, second, other = (
        weights.random_model(raw, "sdpa", seed=seed, device=device) for seed in (3, 3, 4)
    )
    for one, again in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, again)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_weights_are_rounded_once_to_bf16(build, export, tmp_path, every_raw):
    model = build(every_raw["qwen2"])
    folder = export(model, every_raw["qwen2"], tmp_path / "model", torch.bfloat16)
    expected = model.embedding.weight.to(torch.bfloat16)
    assert torch.equal(tensors_of(folder)["model.embed_tokens.weight"], expected)
    assert "lm_head.weight" not in tensors_of(folder)  # tied weights once


@pytest.fixture
def saved(build, export, tmp_path, every_raw):
    """A sound directory for the damages below."""
    return export(build(every_raw["qwen3"]), every_raw["qwen3"], tmp_path / "m", torch.bfloat16)


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def load(folder):
    raw = json.loads((folder / "config.json").read_text())
    weights.load(Decoder(decoder_config(raw), "sdpa"), folder)


NORM = "model.norm.weight"
DAMAGES = {
    "missing": (lambda t: t.pop(NORM), f"{NORM} is missing"),
    "extra": (lambda t: t.update(x=torch.zeros(2)), r"x \[2\] is not part of this architecture"),
    "misshapen": (
        lambda t: t.update({NORM: torch.zeros(5)}), rf"{NORM} has shape \[5\], expected \[128\]",
    ),
    "quantised": (
        lambda t: t.update({NORM: torch.zeros(128, dtype=torch.int8)}), f"{NORM} has dtype I8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_are_refused_by_name(damage, saved):
    change, named = DAMAGES[damage]
    rewrite(saved, change)
    with pytest.raises(ValueError, match=named):
        load(saved)


def test_weights_cut_short_or_corrupt_are_refused_by_name(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    for damaged, named in [
        (content[:-7], "was cut short"),
        (content[:100], "not a safetensors file, or was cut short"),
        (b"", "not a safetensors file"),
        (content[:8] + b"#" * 20 + content[28:], "corrupt header"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"model.safetensors .*{named}"):
            load(saved)
    path.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load(saved)


def test_weights_index_that_names_an_absent_file_is_refused(saved):
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (saved / weights.INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names model-00001-of-00002\.safetensors, absent"):
        load(saved)


@pytest.mark.parametrize("same", [True, False])
def test_weights_with_a_copy_of_a_tied_head_must_agree_with_the_embedding(
    same, build, export, tmp_path, every_raw
):
    raw = every_raw["qwen2"]
    folder = export(build(raw), raw, tmp_path / "m", torch.bfloat16)

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not same:
            tensors["lm_head.weight"][-1, -1] += 1

    rewrite(folder, add_head)
    if same:
        load(folder)
    else:
        with pytest.raises(ValueError, match="differs from the embedding"):
            load(folder)


REFUSED = [
    ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported"),
    ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
    ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"num_experts": 8}, "num_experts"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"attention_bias": True}, "attention_bias"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2, "trick": 3}}, "trick"),
    ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow"),
    ({"vocab_size": None}, "vocab_size"),
]


@pytest.mark.parametrize(("change", "named"), REFUSED)
def test_config_fields_that_are_not_implemented_are_refused_by_name(change, named, every_raw):
    raw = every_raw["qwen3"] | change
    with pytest.raises(ValueError, match=named):
        decoder_config({k: v for k, v in raw.items() if v is not None})


def test_config_fields_that_ask_for_nothing_are_accepted(every_raw):
    idle = {"attention_bias": False, "attention_dropout": 0.0, "logit_scale": 1.0, "experts": None}
    assert decoder_config(every_raw["qwen3"] | idle) == decoder_config(every_raw["qwen3"])
    # A window no shorter than the context never cuts anything.
    decoder_config(every_raw["mistral"] | {"sliding_window": 256})
    with pytest.raises(ValueError, match="sliding_window 255"):
        decoder_config(every_raw["mistral"] | {"sliding_window": 255})


def test_vocabulary_and_end_of_sequence_must_agree_with_the_weights():
    raw = {"vocab_size": 320, "eos_token_id": [5, 7]}
    assert check_vocabulary(raw, 320, 7) is None
    assert "20 rows have no token" in (check_vocabulary(raw, 300, 5) or "")
    with pytest.raises(ValueError, match="321 tokens"):
        check_vocabulary(raw, 321, 5)
    with pytest.raises(ValueError, match="end-of-sequence token is 6"):
        check_vocabulary(raw, 320, 6)


# Parameters as the model cards give them, in billions.
PUBLISHED = {
    "Qwen3-1.7B-Base": 1.72, "Qwen3-4B-Base": 4.02, "Qwen3-8B-Base": 8.19, "Qwen3-14B-Base": 14.77,
    "Qwen2.5-1.5B": 1.54, "Qwen2.5-3B": 3.09, "Qwen2.5-7B": 7.61, "Qwen2.5-14B": 14.77,
    "internlm2_5-20b": 19.86,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_bases_of_the_study_have_their_published_size(name):
    with torch.device("meta"):
        model = Decoder(decoder_config(base_config(name)), "sdpa")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)


def test_an_unknown_base_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'Qwen9'; there are Qwen3-1.7B-Base,"):
        base_config("Qwen9")
