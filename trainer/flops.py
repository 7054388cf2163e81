"""Floating-point operations that training on a document takes: what plans balance and MFU counts.

Forward and backward, a multiply-add counted as two. Each matmul weight meets each token once
forward and twice backward, and of the scores of a document of s tokens the causal half is needed:

    flops(s) = 6 P s + 6 L H K s^2

The first term is that of Kaplan et al. (2020, arXiv 2001.08361, section 2.1), with P the parameters
of all matmuls, the head included, tied or not; embedding, norms and biases are none. The second is
the 12 L H K s^2 of Chowdhery et al. (2022, arXiv 2204.02311, appendix B), which counts all scores,
halved as Dao (2023, arXiv 2307.08691, section 4.1) does. No padding, no recomputation, nothing
across documents.

L layers, H query heads, K head size, D model size.
"""

from ..data.packing import CostModel
from .model import DecoderConfig


def document_flops(config: DecoderConfig) -> CostModel:
    """FLOPs of a document as a function of its tokens."""
    width = config.num_heads * config.head_dim
    return CostModel(
        linear=6.0 * matmul_parameters(config), quadratic=6.0 * config.num_layers * width
    )


def matmul_parameters(config: DecoderConfig) -> int:
    """Weights that a token is multiplied with; a tied head counts, an embedding does not."""
    query = config.num_heads * config.head_dim
    key = config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (query + 2 * key) + query * config.hidden_size
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    head = config.hidden_size * config.vocab_size
    return config.num_layers * (attention + feed_forward) + head
