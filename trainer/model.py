"""The decoder, for packed tokens only: every tensor is (T, ...), documents one behind the other.

    x = embed(tokens)
    for each block:  x += attention(norm(x));  x += feed_forward(norm(x))
    logits = norm(x) head^T

Query, key and value share one matmul, and so do gate and up: the same dot products in the same
order, so the results are those of separate matmuls. This is the one place where kernels meet
modules.

T packed tokens, D model, H query heads, G key heads, K head size, F feed-forward size, V
vocabulary.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..data.batch import PackedBatch
from ..kernels.attention import Backend, varlen_attention
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope import (
    RopeScaling,
    apply_rope,
    dynamic_frequencies,
    inverse_frequencies,
    rope_tables,
)
from ..kernels.swiglu import swiglu


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """A model's shape, in the field's usual words."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    family: str = "qwen3"
    """Whose config and tensor names it has: a key of `families.FAMILIES`."""
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rms_norm_epsilon: float = 1e-6
    qk_norm: bool = True
    """Normalise each query and key head (Qwen3)."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values (Qwen2)."""
    tie_embeddings: bool = True
    """One matrix is both the embedding and the head."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE turns pairs")


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, backend: Backend) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.head_counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.backend: Backend = backend
        self.qkv_proj = nn.Linear(
            config.hidden_size, sum(self.head_counts) * config.head_dim, bias=config.qkv_bias
        )
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = (
            RMSNorm(config.head_dim, config.rms_norm_epsilon) if config.qk_norm else nn.Identity()
        )
        self.k_norm = (
            RMSNorm(config.head_dim, config.rms_norm_epsilon) if config.qk_norm else nn.Identity()
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split(self.head_counts, dim=1)
        q, k = apply_rope(self.q_norm(q), self.k_norm(k), cos, sin)
        return self.o_proj(
            varlen_attention(q, k, v, cu_seqlens, max_seqlen, self.backend).flatten(1)
        )


class FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, backend: Backend) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_epsilon)
        self.attention = Attention(config, backend)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_epsilon)
        self.feed_forward = FeedForward(config)
        # How `compute` is called: trainer/activations.py may have it called twice.
        self.run: Callable[..., Tensor] = lambda compute, *arguments: compute(*arguments)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        return self.run(self.compute, x, cos, sin, cu_seqlens, max_seqlen)

    def compute(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        attended = self.attention(self.input_norm(x), cos, sin, cu_seqlens, max_seqlen)
        norm = self.post_attention_norm
        x, normed = add_rms_norm(x, attended, norm.weight, norm.epsilon)
        return x + self.feed_forward(normed)


class Head(nn.Module):
    """The output matrix and its loss; logits exist only inside, a chunk at a time."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, batch: PackedBatch, scale: float) -> Tensor:
        return head_loss(hidden, self.weight, batch, scale)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig, attention_backend: Backend) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, attention_backend) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_epsilon)
        self.head = None if config.tie_embeddings else Head(config)

    def forward(self, batch: PackedBatch, scale: float = 1.0) -> Tensor:
        """Sum of the pack's token losses, each times `scale`, () fp32; call backward() on it as is.

        The scale goes in here, because an upstream gradient of 1 is what lets the head add up its
        gradient over micro-steps in one fp32 buffer.
        """
        hidden = self.hidden(batch)
        if self.head is not None:
            return self.head(hidden, batch, scale)
        return head_loss(hidden, self.embedding.weight, batch, scale)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The normed states that the head reads, (T, D)."""
        x = self.embedding(batch.input_ids)
        cos, sin = self.rope(batch, x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, batch.cu_seqlens, batch.max_seqlen)
        return self.norm(x)

    def rope(self, batch: PackedBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the pack, each (T, 1, K/2).

        Made anew each time, so that no buffer has to survive sharding or the meta device.
        """
        config, scaling = self.config, self.config.rope_scaling
        if scaling.kind == "dynamic" and batch.max_seqlen > scaling.original_max_positions:
            lengths = batch.cu_seqlens.diff()
            lengths_T = lengths.repeat_interleave(lengths, output_size=len(batch.position_ids))
            frequencies = dynamic_frequencies(
                lengths_T, config.rope_theta, config.head_dim, scaling
            )
        else:
            device = batch.position_ids.device
            frequencies = inverse_frequencies(config.rope_theta, config.head_dim, scaling, device)
        return rope_tables(batch.position_ids, frequencies, dtype, scaling.attention_factor)

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> Tensor:
        """(T, V), all at once: for tests on small models, not for training."""
        return self.hidden(batch) @ (self.embedding if self.head is None else self.head).weight.T


def draw_weights(name: str, shape: torch.Size, config: DecoderConfig, seed: int) -> Tensor:
    """Initial values of one parameter, whole, fp32, on the CPU: a function of its name and `seed`.

    N(0, 0.02), residual outputs scaled down by depth (GPT-2); norms one, biases zero.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = 0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02
    # crc32, not hash(): the same in every process. The CPU generator heeds 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.normal(0.0, std, shape, generator=generator)


def head_loss(hidden: Tensor, weight: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    """The head's part of a micro-step; `weight` is the gathered parameter, not a shard."""
    if batch.weights is None:
        weights = torch.full(batch.targets.shape, scale, device=hidden.device)
    else:
        weights = batch.weights * scale
    grad_weight = None
    if weight.requires_grad and torch.is_grad_enabled():
        if weight.grad is not None:
            grad_weight = weight.grad  # an earlier micro-step's: add to it in place
        elif weight.grad_dtype != torch.float32:
            # Or autograd would round the fp32 gradient to the dtype of the gathered weight, before
            # FSDP reduces it in fp32.
            weight.grad_dtype = torch.float32
    loss_sum, _ = linear_cross_entropy(
        hidden, weight, batch.targets, weights, num_targets=batch.num_targets,
        grad_weight=grad_weight,
    )  # fmt: skip
    return loss_sum
