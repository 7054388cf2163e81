"""Rotary position embedding (Su et al., 2021), in the half-split order of Hugging Face weights.

Position p turns the pair (x[i], x[i + K/2]) by the angle p * theta^(-2i/K). In a pack, positions
restart with each document, so they are given, not counted.
"""

import torch
from torch import Tensor


def rope_tables(
    position_ids: Tensor,  # (T,)
    inverse_frequencies: Tensor,  # (K/2,) fp32
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # each (T, 1, K/2)
    """Cosines and sines for a pack; the angles are computed in fp32, whatever `dtype`."""
    angles = position_ids.float()[:, None, None] * inverse_frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(
    x: Tensor,  # (T, H, K)
    cos: Tensor,  # (T, 1, K/2)
    sin: Tensor,  # (T, 1, K/2)
) -> Tensor:
    """Rotate every head of every token by its position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
