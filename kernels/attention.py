"""Causal attention inside each document of a pack, never across: one call, several backends.

Documents stand one behind the other; `cu_seqlens` holds where each starts, and the end. Grouped
queries: H query heads share G key and value heads, H a multiple of G.

    flash_attn            package flash-attn, FlashAttention 2
    torch_varlen          torch's varlen_attn on the FlashAttention 2 that torch brings
    torch_varlen_fa3      the same call on FlashAttention 3 (module flash_attn_interface)
    torch_varlen_fa4      the same call on FlashAttention 4 (package flash-attn-4)
    torch_varlen_cudnn    the same call on cuDNN, from torch 2.15
    flex                  torch's FlexAttention with a document mask: a second opinion, slower
    sdpa                  scaled_dot_product_attention, one document at a time: CPU and float32

T packed tokens, S documents, H query heads, G key heads, K head size.
"""

import functools
import importlib.util
import inspect
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

Backend = Literal[
    "flash_attn",
    "torch_varlen",
    "torch_varlen_fa3",
    "torch_varlen_fa4",
    "torch_varlen_cudnn",
    "flex",
    "sdpa",
]

# What torch's varlen_attn runs on under each name; None is the FlashAttention 2 it brings.
_IMPLEMENTATIONS = {
    "torch_varlen": None,
    "torch_varlen_cudnn": None,
    "torch_varlen_fa3": "FA3",
    "torch_varlen_fa4": "FA4",
}
# Where torch and the packages look, so that `auto` can say what is missing without importing it.
# FlashAttention 4 alone also makes a `flash_attn`, so version 2 is known by its compiled module.
_MODULES = {
    "flash_attn": "flash_attn_2_cuda",
    "torch_varlen_fa3": "flash_attn_interface",
    "torch_varlen_fa4": "flash_attn.cute.interface",
}
_REMEDIES = {
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "torch_varlen_fa3": "install FlashAttention 3, hopper/ in its repository",
    "torch_varlen_fa4": "pip install --pre flash-attn-4",
}
# Compute capabilities that torch's adapters let pass; the other backends take 8.0 and later.
_MAJORS = {"torch_varlen_fa3": (9,), "torch_varlen_fa4": (9, 10), "torch_varlen_cudnn": (9, 10)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What decides which backends can run, read once: the decision is a function of it."""

    device_type: str
    capability: tuple[int, int]
    """CUDA compute capability, (0, 0) without a CUDA device."""
    torch_version: tuple[int, int]
    cudnn_version: int
    """91900 is cuDNN 9.19.0; 0 without."""
    modules: frozenset[str]
    """Those of `_MODULES` that are installed."""


def this_machine(device: torch.device) -> Machine:
    """The machine we are on, seen from `device`; imports none of the optional packages."""
    is_cuda = device.type == "cuda"
    major, minor = torch.__version__.split(".")[:2]
    return Machine(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if is_cuda else (0, 0),
        torch_version=(int(major), int(minor)),
        cudnn_version=(torch.backends.cudnn.version() or 0) if is_cuda else 0,
        modules=frozenset(module for module in _MODULES.values() if _is_installed(module)),
    )


def _is_installed(module: str) -> bool:
    # find_spec on the whole of a.b.c would import a.b, and so whatever is broken there.
    top, *path = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not path:
        return spec is not None
    folders = spec.submodule_search_locations or ()
    return any(Path(folder, *path).with_suffix(".py").is_file() for folder in folders)


def choose_backend(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[Backend, str]:
    """The backend to run, and why; called once at start-up and logged.

    Has an effect on the whole process: torch has one flash attention active at a time, for
    `varlen_attn` and `scaled_dot_product_attention` alike, and this sets the one chosen.

    Raises:
        ValueError: an unknown name, or one that cannot run; nothing falls back in silence.
    """
    backend, why = decide(requested, this_machine(device), dtype, head_dim)
    _activate(_IMPLEMENTATIONS.get(backend))
    return backend, why


def decide(
    requested: str, machine: Machine, dtype: torch.dtype, head_dim: int
) -> tuple[Backend, str]:
    """`choose_backend` without its effect: the backend for `machine`, and why."""
    if requested == "auto":
        return _decide_automatically(machine, dtype, head_dim)
    if requested not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise ValueError(f"attention {requested!r} is unknown; choose auto, {names}")
    backend = cast(Backend, requested)
    found = obstacle(backend, machine, dtype, head_dim)
    if found is not None:
        reason, remedy = found
        raise ValueError(f"attention {backend!r} {reason}: {remedy}")
    return backend, "asked for"


def _decide_automatically(
    machine: Machine, dtype: torch.dtype, head_dim: int
) -> tuple[Backend, str]:
    plainly = "scaled_dot_product_attention per document"
    if machine.device_type != "cuda":
        return "sdpa", f"no CUDA device: {plainly}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"flash attention takes no {_name(dtype)}: {plainly}"
    major, minor = machine.capability
    order: tuple[Backend, ...] = ("torch_varlen",)
    if major == 9:
        order = ("torch_varlen_fa3", "torch_varlen_cudnn", "torch_varlen_fa4", "torch_varlen")
    elif major >= 10:
        order = ("torch_varlen_fa4", "torch_varlen_cudnn", "torch_varlen")
    passed_over: list[str] = []
    for backend in order:
        found = obstacle(backend, machine, dtype, head_dim)
        if found is None:
            why = f"best for compute capability {major}.{minor} of what can run"
            return backend, "; ".join([why, *passed_over])
        passed_over.append(f"{backend} {found[0]}")
    return "sdpa", "; ".join([plainly, *passed_over])


def obstacle(
    backend: Backend, machine: Machine, dtype: torch.dtype, head_dim: int
) -> tuple[str, str] | None:
    """Why `backend` cannot run and what to do about it; None when it can."""
    if backend == "sdpa":
        return None
    major, minor = machine.capability
    if machine.device_type != "cuda":  # on a CPU FlexAttention has no backward pass
        return f"needs a CUDA device, not {machine.device_type}", "choose auto or sdpa"
    if backend == "flex":
        return None
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes no {_name(dtype)}", "set bfloat16, or choose sdpa or flex"
    majors = _MAJORS.get(backend)
    if major < 8 or (majors and major not in majors):
        needed = " or ".join(f"{m}.x" for m in majors) if majors else "8.0 or later"
        return f"needs compute capability {needed}, this is {major}.{minor}", "choose auto"
    is_small = backend == "torch_varlen_cudnn" or (backend == "torch_varlen_fa4" and major == 10)
    largest = 128 if is_small else 256
    if head_dim % 8 or head_dim > largest:
        sizes = f"takes head sizes that are multiples of 8 up to {largest}, not {head_dim}"
        return sizes, "choose auto, sdpa or flex"
    if backend == "torch_varlen_cudnn":
        return _cudnn_obstacle(machine)
    module = _MODULES.get(backend)
    if module is not None and module not in machine.modules:
        return f"needs the module {module}", f"{_REMEDIES[backend]}, or choose auto"
    return None


def _cudnn_obstacle(machine: Machine) -> tuple[str, str] | None:
    if machine.torch_version < (2, 15):
        version = ".".join(map(str, machine.torch_version))
        return f"needs torch 2.15 or later, this is {version}", "upgrade torch, or choose auto"
    if machine.cudnn_version < 92400:  # older ones fail on a pack of documents up to 128 tokens
        reason = f"needs cuDNN 9.24.0 (92400) or later, this is {machine.cudnn_version}"
        return reason, "upgrade nvidia-cudnn, or choose auto"
    return None


def _activate(implementation: str | None) -> None:
    from torch.nn.attention import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        restore_flash_attention_impl,
    )

    if implementation == current_flash_attention_impl():
        return
    if implementation is None:
        restore_flash_attention_impl()
        return
    try:  # loads a compiled library, built for one torch and one CUDA
        activate_flash_attention_impl(implementation)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"attention on {implementation} is installed but does not load ({error}): reinstall "
            "it for this torch, or choose torch_varlen"
        ) from error


def varlen_attention(
    q: Tensor,  # (T, H, K)
    k: Tensor,  # (T, G, K)
    v: Tensor,  # (T, G, K)
    cu_seqlens: Tensor,  # (S + 1,) int32, on the device of q
    max_seqlen: int,
    backend: Backend,
) -> Tensor:  # (T, H, K)
    """Softmax(q k^T / sqrt(K)) v over each token's own document up to itself.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, and, where they can be seen
            without waiting for a device, bounds that are not those of documents of q.
    """
    _check(q, k, v, cu_seqlens, max_seqlen)
    if backend == "sdpa":
        return _sdpa(q, k, v, cu_seqlens)
    if backend == "flex":
        return _flex(q, k, v, cu_seqlens)
    if backend == "flash_attn":
        return _flash_attn(q, k, v, cu_seqlens, max_seqlen)
    return _torch_varlen(q, k, v, cu_seqlens, max_seqlen, backend)


def varlen_attention_reference(
    q: Tensor,  # (T, H, K)
    k: Tensor,  # (T, G, K)
    v: Tensor,  # (T, G, K)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (T, H, K)
    """The formula, document by document and without a kernel, in the dtype of q."""
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        q_s = q[start:end].unflatten(1, (k.shape[1], -1))  # (t, G, H / G, K)
        scores = torch.einsum("tgrk,sgk->grts", q_s, k[start:end]) / q.shape[2] ** 0.5
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("grts,sgk->tgrk", weights, v[start:end]).flatten(1, 2))
    return torch.cat(outputs)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    is_matched = q.ndim == k.ndim == 3 and k.shape == v.shape
    if not is_matched or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q must be (T, H, K), k and v (T, G, K) of the same T and K; got {shapes}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads must be a multiple of {k.shape[1]} key heads; got {shapes}"
        )
    kinds = [(_name(x.dtype), str(x.device)) for x in (q, k, v)]
    if len(set(kinds)) > 1:
        raise ValueError(f"q, k and v must share one dtype and one device; got {kinds}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must be int32 of shape (S + 1,), at least one document; got "
            f"{_name(cu_seqlens.dtype)} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}: move one of them")
    if not 1 <= max_seqlen <= len(q):
        raise ValueError(f"max_seqlen {max_seqlen} must lie between 1 and the {len(q)} tokens of q")
    if cu_seqlens.device.type == "cpu":  # to see the values on a GPU the host would have to wait
        _check_bounds(cu_seqlens.tolist(), len(q), max_seqlen)


def _check_bounds(bounds: list[int], num_tokens: int, max_seqlen: int) -> None:
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at the {num_tokens} tokens of q; it starts at "
            f"{bounds[0]} and ends at {bounds[-1]}"
        )
    for document, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end <= start:
            raise ValueError(
                f"document {document} starts at {start} and ends at {end} in cu_seqlens: leave "
                "out documents without tokens"
            )
        if end - start > max_seqlen:
            raise ValueError(
                f"max_seqlen {max_seqlen} is below the {end - start} tokens of document {document}"
            )


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: Backend
) -> Tensor:
    from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    wanted, active = _IMPLEMENTATIONS[backend], current_flash_attention_impl()
    if wanted != active:  # else another kernel than the one named would run
        raise ValueError(
            f"attention {backend!r} runs on {wanted or 'FA2'}, but {active or 'FA2'} is active: "
            "call choose_backend first"
        )
    # From 2.15 varlen_attn picks by itself, cuDNN first; before, this context changes nothing.
    is_cudnn = backend == "torch_varlen_cudnn"
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if is_cudnn else SDPBackend.FLASH_ATTENTION):
        # cuDNN wants one and the same tensor twice, to know that queries and keys are aligned.
        output = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
            window_size=(-1, 0), **_grouped_query_arguments(),
        )  # fmt: skip
    assert isinstance(output, Tensor)  # a pair only where more is asked for
    return output


@functools.cache
def _grouped_query_arguments() -> dict[str, Any]:
    """From 2.12 varlen_attn wants to be told that G < H; 2.11 passes any G on to its kernel."""
    from torch.nn.attention.varlen import varlen_attn

    is_known = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if is_known else {}


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        causal=True, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _flex(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    num_tokens, is_cuda = len(q), q.is_cuda
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=q.device)
    document_T = torch.searchsorted(cu_seqlens, tokens, right=True)

    def is_seen(_b: Tensor, _h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return (k_index <= q_index) & (document_T[k_index] == document_T[q_index])

    # Uncompiled, FlexAttention is plain torch and holds all T x T scores: right for a CPU only.
    attend = _compiled_flex_attention() if is_cuda else flex_attention
    mask = create_block_mask(is_seen, None, None, num_tokens, num_tokens, device=str(q.device))
    q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q, k, v))
    output = attend(q_, k_, v_, block_mask=mask, enable_gqa=True)
    assert isinstance(output, Tensor)  # a pair only where more is asked for
    return output[0].transpose(0, 1)


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    bounds = cu_seqlens.tolist()  # on a GPU the host waits here
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
