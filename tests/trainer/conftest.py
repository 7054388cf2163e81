"""What the trainer's tests share: one-process groups, tiny models of every family, a tokenizer."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longcot.data.tokenizer import save_tokenizer, train_tokenizer
from longcot.trainer import weights
from longcot.trainer.model import Decoder

SHAPE = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False,
    "eos_token_id": 0,
}  # fmt: skip
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _config(model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    return {**SHAPE, "model_type": model_type, "architectures": [architecture], **changes}


CONFIGS = {
    # head_dim * heads is not hidden_size: Qwen3 allows it
    "qwen3": _config("qwen3", "Qwen3ForCausalLM", head_dim=64),
    "qwen3-tied": _config("qwen3", "Qwen3ForCausalLM", head_dim=32, tie_word_embeddings=True),
    "qwen2": _config("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True),
    "llama": _config("llama", "LlamaForCausalLM", rope_scaling=LLAMA3_SCALING),
    "mistral": _config("mistral", "MistralForCausalLM", head_dim=64, sliding_window=None),
    "internlm2": _config("internlm2", "InternLM2ForCausalLM", bias=False),
}


@pytest.fixture(params=CONFIGS)
def raw(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The config.json of a tiny model, one of each family."""
    return copy.deepcopy(CONFIGS[request.param])


@pytest.fixture
def every_raw() -> dict[str, dict[str, Any]]:
    """All of them, by name."""
    return copy.deepcopy(CONFIGS)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["Numbers: 3 5 7\nTarget: 26"]), path)
    return path


@pytest.fixture(scope="session", autouse=True)
def in_a_group(process_group: None) -> None:
    """Every test of the trainer is in one, as training is."""


@pytest.fixture(scope="session")
def build() -> Callable[..., Decoder]:
    """A model with weights so large that a mistake shows: norms off one, biases off zero."""

    def build(raw: dict[str, Any], scale: float = 4.0) -> Decoder:
        model = weights.random_model(raw, "sdpa", seed=1, device=torch.device("cpu"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(scale)
                else:
                    parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
        return model

    return build


@pytest.fixture(scope="session")
def export(tokenizer_path: Path) -> Callable[..., Path]:
    """Write a model as a Hugging Face directory."""

    def export(model: Decoder, raw: dict[str, Any], folder: Path, dtype: torch.dtype) -> Path:
        weights.export(model, folder, raw_config=raw, tokenizer_path=tokenizer_path, dtype=dtype)
        return folder

    return export
