"""Rotary position embedding (Su et al., 2021), in the half-split order of Hugging Face weights.

Position p turns the pair (x[i], x[i + K/2]) by the angle p * f_i, where f_i = theta^(-2i/K) unless
a scaling stretches it to contexts longer than the model was pretrained on. In a pack, positions
restart with each document, so they are given, not counted.

On CUDA liger-kernel turns the pairs, queries and keys in one kernel.

T packed tokens, H query heads, G key heads, K head size.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .liger import liger_op


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How the frequencies are stretched; the fields are those of a Hugging Face config."""

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    """How many times longer the context becomes."""
    original_max_positions: int = 0
    """Context of the pretraining, in tokens; `dynamic` starts to stretch beyond it."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / this are stretched by `factor`."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / this are left alone."""
    beta_fast: float = 32.0
    """yarn: pairs with more turns over the original context are left alone."""
    beta_slow: float = 1.0
    """yarn: pairs with fewer turns are stretched by `factor`."""
    truncate: bool = True
    """yarn: round the bounds of the ramp between the two to whole pairs."""
    attention_factor: float = 1.0
    """yarn: multiplies cosines and sines, and so the queries and the keys."""


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """YaRN's default attention factor, 0.1 * scale * ln(factor) + 1 (Peng et al., 2023, eq. 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(
    theta: float, head_dim: int, scaling: RopeScaling, device: torch.device
) -> Tensor:  # (K/2,) fp32
    """The angle per position of each pair, for documents within the model's context."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    plain = 1.0 / theta**exponents
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    if scaling.kind == "yarn":
        return _yarn(plain, theta, head_dim, scaling)
    return plain  # dynamic scaling stretches longer documents only: `dynamic_frequencies`


def dynamic_frequencies(
    lengths: Tensor,  # (...,) tokens of the document
    theta: float,
    head_dim: int,
    scaling: RopeScaling,
) -> Tensor:  # (..., K/2) fp32
    """Dynamic NTK: theta grows with the length of the document, beyond the original context.

    Per document, so that a pack gives each of them what it would get alone.
    """
    stretch = lengths.float().clamp(min=scaling.original_max_positions)
    stretch = scaling.factor * stretch / scaling.original_max_positions - (scaling.factor - 1)
    thetas = theta * stretch ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, device=lengths.device, dtype=torch.float32) / head_dim
    return 1.0 / thetas[..., None] ** exponents


def rope_tables(
    position_ids: Tensor,  # (T,)
    frequencies: Tensor,  # (K/2,) or (T, K/2) fp32
    dtype: torch.dtype,
    attention_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:  # each (T, 1, K/2)
    """Cosines and sines for a pack; the angles are computed in fp32, whatever `dtype`."""
    angles = (position_ids.float()[:, None] * frequencies)[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    if attention_factor != 1.0:
        cos, sin = cos * attention_factor, sin * attention_factor
    return cos.to(dtype), sin.to(dtype)


def apply_rope(
    q: Tensor,  # (T, H, K)
    k: Tensor,  # (T, G, K)
    cos: Tensor,  # (T, 1, K/2)
    sin: Tensor,  # (T, 1, K/2)
) -> tuple[Tensor, Tensor]:  # (T, H, K), (T, G, K)
    """Rotate every head of every token by its position."""
    if not q.is_cuda:
        return apply_rope_reference(q, k, cos, sin)
    return _LigerRope.apply(q, k, cos, sin)


def apply_rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rope` in plain torch."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _LigerRope(torch.autograd.Function):
    """Liger's kernel, which rotates in place, on copies.

    LigerRopeFunction would turn the caller's tensors, and on the way back the gradient it is
    given, wherever they are contiguous: autograd saw neither change and may need both. What is not
    contiguous, a slice of the fused query, key and value, Liger copies itself: no copy is added.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate_copies("rope_forward", q, k, cos, sin)

    @staticmethod
    @once_differentiable  # autograd would not see what the kernel writes
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        dq, dk = _rotate_copies("rope_backward", *grad_outputs, *ctx.saved_tensors)
        return dq, dk, None, None


def _rotate_copies(
    function: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    # Liger wants (1, H, T, K) that lies in memory as (1, T, H, K), and says so by `transpose`.
    q, k = (x.clone(memory_format=torch.contiguous_format)[None].transpose(1, 2) for x in (q, k))
    # Its tables are K wide, of which it reads the first half: all that ours have. Hence rotary_dim.
    tables = (cos.squeeze(1), sin.squeeze(1))
    q, k, *_ = liger_op("rope", function)(q, k, *tables, rotary_dim=q.shape[-1])
    return q.transpose(1, 2)[0], k.transpose(1, 2)[0]


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's: long wavelengths stretched, short ones left, a linear blend between."""
    turns = scaling.original_max_positions * plain / (2 * math.pi)  # over the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share_left_alone = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * share_left_alone + plain / scaling.factor * (1 - share_left_alone)


def _yarn(plain: Tensor, theta: float, head_dim: int, scaling: RopeScaling) -> Tensor:
    """YaRN's: stretched below `beta_slow` turns, left alone above `beta_fast`, a ramp between."""

    def pair_with_turns(turns: float) -> float:
        wavelengths = scaling.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(theta))

    first, last = pair_with_turns(scaling.beta_fast), pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last = last + 0.001 if first == last else last  # a step instead of a division by zero
    pairs = torch.arange(head_dim // 2, device=plain.device, dtype=torch.float32)
    share_stretched = ((pairs - first) / (last - first)).clamp(0, 1)
    return plain / scaling.factor * share_stretched + plain * (1 - share_stretched)
