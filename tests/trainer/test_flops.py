"""FLOPs of a document: the weights are those of the model, the attention is torch's own count."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longcot.trainer.families import base_config, decoder_config
from longcot.trainer.flops import document_flops, matmul_parameters
from longcot.trainer.model import Decoder, DecoderConfig


def shape(**changes):
    # Queries narrower than the model and fewer key heads: no two widths are alike.
    settings = {
        "vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_layers": 3,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "tie_embeddings": False,
    }  # fmt: skip
    return DecoderConfig(**(settings | changes))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True}])
def test_the_weights_are_all_matrices_but_an_untied_embedding(changes):
    config = shape(**changes)
    with torch.device("meta"):
        model = Decoder(config, "sdpa")
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    embedding = 0 if config.tie_embeddings else model.embedding.weight.numel()
    assert matmul_parameters(config) == matrices - embedding


def test_attention_costs_half_of_what_all_scores_do():
    config = shape()
    heads = torch.zeros(1, config.num_heads, 32, config.head_dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        scores = heads @ heads.transpose(2, 3)
        (scores @ heads).sum().backward()
    # torch counts two matmuls forward and four backward, over all 32 x 32 scores.
    all_scores = counter.get_total_flops() * config.num_layers
    assert document_flops(config).quadratic * 32**2 == all_scores / 2


def test_qwen3_8b_at_16k():
    cost = document_flops(decoder_config(base_config("Qwen3-8B-Base")))
    per_token = float(cost.of(np.array([16_384]))[0]) / 16_384
    # By hand: 6 x 7.568e9 weights, 36 layers of 32 heads of 128: 45.4 and 14.5 GFLOP a token.
    assert per_token == pytest.approx(59.9e9, rel=1e-3)
