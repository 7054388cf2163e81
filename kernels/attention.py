"""Causal attention inside each document of a pack, never across: one call, several backends.

Documents stand one behind the other; `cu_seqlens` holds where each starts, and the end. Grouped
queries: H query heads share G key and value heads, H a multiple of G.

T packed tokens, S documents, H query heads, G key heads, K head size.
"""

import importlib.util
import itertools
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Backend = Literal["torch_varlen", "sdpa"]


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """The backend to run, and why; called once at start-up and logged.

    Raises:
        ValueError: an unknown name, or one that cannot run on `device`; nothing falls back in
            silence.
    """
    if requested == "auto":
        if device.type == "cuda" and dtype != torch.float32:
            return "torch_varlen", "CUDA device: torch's own varlen flash attention"
        reason = "flash attention takes no float32" if device.type == "cuda" else "no CUDA device"
        return "sdpa", f"{reason}: scaled_dot_product_attention per document"
    if requested == "sdpa":
        return "sdpa", "asked for"
    if requested != "torch_varlen":
        names = ", ".join(get_args(Backend))
        raise ValueError(f"attention {requested!r} is unknown; choose auto, {names}")
    if device.type != "cuda":
        raise ValueError(
            f"attention 'torch_varlen' needs a CUDA device, not {device.type}: choose auto or sdpa"
        )
    if dtype == torch.float32:
        raise ValueError("attention 'torch_varlen' takes no float32: set bfloat16, or choose sdpa")
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise ValueError(
            f"attention 'torch_varlen' needs torch 2.11 or later, this is {torch.__version__}"
        )
    return "torch_varlen", "asked for"


def varlen_attention(
    q: Tensor,  # (T, H, K)
    k: Tensor,  # (T, G, K)
    v: Tensor,  # (T, G, K)
    cu_seqlens: Tensor,  # (S + 1,) int32
    max_seqlen: int,
    backend: Backend,
) -> Tensor:  # (T, H, K)
    """Softmax(q k^T / sqrt(K)) v over each token's own document up to itself."""
    if backend == "torch_varlen":
        return _torch_varlen(q, k, v, cu_seqlens, max_seqlen)
    return sdpa_per_document(q, k, v, cu_seqlens)


def sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The plain statement, in `scaled_dot_product_attention`: the path on a CPU."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat(
        [
            functional.scaled_dot_product_attention(
                q_s.transpose(0, 1)[None],
                k_s.transpose(0, 1)[None],
                v_s.transpose(0, 1)[None],
                is_causal=True,
                enable_gqa=q.shape[1] != k.shape[1],
            )[0].transpose(0, 1)
            for q_s, k_s, v_s in documents
        ]
    )


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if q.shape[1] != k.shape[1]:
        # torch 2.11 has no `enable_gqa`: repeat the shared heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    output = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0)
    )
    assert isinstance(output, Tensor)  # a pair only where more is asked for
    return output
