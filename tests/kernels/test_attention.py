"""Packed attention: documents do not see each other; every backend gives the plain formula."""

import itertools
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcot.kernels import attention
from longcot.kernels.attention import (
    Backend,
    Machine,
    choose_backend,
    decide,
    this_machine,
    varlen_attention,
    varlen_attention_reference,
)
from longcot.trainer.config import ModelSection

BACKENDS = get_args(Backend)
VARLEN_BACKENDS = [name for name in BACKENDS if name not in ("flex", "sdpa")]


def fused_qkv(num_tokens, num_heads, num_kv_heads, head_dim, dtype=torch.float32, device="cpu"):
    """One tensor whose slices are q, k and v, as a fused projection leaves them."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    return torch.randn(shape, generator=generator).to(device, dtype)


def split(qkv, num_kv_heads):
    return qkv.split([qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)


def output_and_gradient(function, qkv, num_kv_heads):
    """What `function` of (q, k, v) gives, and d(output . upstream) / d(qkv)."""
    leaf = qkv.detach().clone().requires_grad_()
    output = function(*split(leaf, num_kv_heads))
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator).to(output)
    (gradient,) = torch.autograd.grad(output, leaf, upstream)
    return output.detach(), gradient


def max_length(bounds):
    return max(end - start for start, end in itertools.pairwise(bounds))


def int32(bounds, device="cpu"):
    return torch.tensor(bounds, dtype=torch.int32, device=device)


# One token; documents of one token; a prime length; one past the 128 rows of FlexAttention's tile.
ALL_BOUNDS = [[0, 1], [0, 1, 2, 40], [0, 17, 19, 60], [0, 129, 131]]
# As many key heads as query heads; grouped; an odd number of heads on one key head.
ALL_HEADS = [(4, 4), (4, 2), (3, 1)]


@pytest.mark.parametrize("bounds", ALL_BOUNDS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), ALL_HEADS)
def test_the_reference_is_the_formula_written_out_token_by_token(bounds, num_heads, num_kv_heads):
    qkv = fused_qkv(bounds[-1], num_heads, num_kv_heads, 8, torch.float64)
    q, k, v = split(qkv, num_kv_heads)
    ours = varlen_attention_reference(q, k, v, int32(bounds))
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k, v))
    for start, end in itertools.pairwise(bounds):
        for t in range(start, end):
            scores = torch.einsum("hk,shk->hs", q[t], k[start : t + 1]) / 8**0.5
            row = torch.einsum("hs,shk->hk", scores.softmax(1), v[start : t + 1])
            torch.testing.assert_close(ours[t], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bounds", ALL_BOUNDS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), ALL_HEADS)
def test_sdpa_is_within_the_error_budget(bounds, num_heads, num_kv_heads, assert_within_budget):
    qkv, cu_seqlens = fused_qkv(bounds[-1], num_heads, num_kv_heads, 8), int32(bounds)

    def reference(q, k, v):
        return varlen_attention_reference(q, k, v, cu_seqlens)

    def attend(q, k, v):
        return varlen_attention(q, k, v, cu_seqlens, max_length(bounds), "sdpa")

    ours, torchs = (output_and_gradient(f, qkv, num_kv_heads) for f in (attend, reference))
    exact = output_and_gradient(reference, qkv.double(), num_kv_heads)
    for triple in zip(ours, torchs, exact, strict=True):
        assert_within_budget(*triple)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("bounds", ALL_BOUNDS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), ALL_HEADS)
def test_flex_is_within_the_error_budget(bounds, num_heads, num_kv_heads, assert_within_budget):
    # Forward only: FlexAttention has no backward pass on a CPU.
    qkv, cu_seqlens = fused_qkv(bounds[-1], num_heads, num_kv_heads, 16), int32(bounds)
    q, k, v = split(qkv, num_kv_heads)
    ours = varlen_attention(q, k, v, cu_seqlens, max_length(bounds), "flex")
    torchs = varlen_attention_reference(q, k, v, cu_seqlens)
    exact = varlen_attention_reference(q.double(), k.double(), v.double(), cu_seqlens)
    assert_within_budget(ours, torchs, exact)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_packed_is_each_document_alone(backend, lengths):
    bounds = [0, *itertools.accumulate(lengths)]
    q, k, v = split(fused_qkv(bounds[-1], 4, 2, 16), 2)
    packed = varlen_attention(q, k, v, int32(bounds), max(lengths), backend)
    for start, end in itertools.pairwise(bounds):
        one, length = slice(start, end), end - start
        alone = varlen_attention(q[one], k[one], v[one], int32([0, length]), length, backend)
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": torch.zeros(7, 3, 8), "v": torch.zeros(7, 3, 8)}, "4 query heads .* 3 key heads"),
        ({"v": torch.zeros(7, 1, 8)}, r"k \(7, 2, 8\), v \(7, 1, 8\)"),
        ({"q": torch.zeros(6, 4, 8)}, r"q \(6, 4, 8\), k \(7, 2, 8\)"),
        ({"q": torch.zeros(7, 4, 16)}, r"q \(7, 4, 16\)"),
        ({"q": torch.zeros(1, 7, 4, 8)}, r"q \(1, 7, 4, 8\)"),
        ({"q": torch.zeros(7, 4, 8, dtype=torch.float64)}, "float64.*float32"),
        ({"q": torch.zeros(7, 4, 8, device="meta")}, "meta.*cpu"),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, "int64 of shape"),
        ({"cu_seqlens": int32([7])}, r"int32 of shape \(1,\)"),
        ({"cu_seqlens": int32([0, 3, 7], "meta")}, "on meta, q on cpu"),
        ({"cu_seqlens": int32([1, 3, 7])}, "starts at 1 and ends at 7"),
        ({"cu_seqlens": int32([0, 3, 6])}, "the 7 tokens of q; it starts at 0 and ends at 6"),
        ({"cu_seqlens": int32([0, 3, 3, 7])}, "document 1 starts at 3 and ends at 3"),
        ({"cu_seqlens": int32([0, 5, 3, 7]), "max_seqlen": 5}, "document 1 starts at 5 and ends"),
        ({"max_seqlen": 3}, "max_seqlen 3 is below the 4 tokens of document 1"),
        ({"max_seqlen": 0}, "max_seqlen 0 must lie between 1 and the 7"),
        ({"max_seqlen": 8}, "max_seqlen 8 must lie between 1 and the 7"),
    ],
)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "torch_varlen"])
def test_bad_input_is_refused_with_its_numbers(backend, change, named):
    sound = {
        "q": torch.zeros(7, 4, 8), "k": torch.zeros(7, 2, 8), "v": torch.zeros(7, 2, 8),
        "cu_seqlens": int32([0, 3, 7]), "max_seqlen": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=named):
        varlen_attention(**sound | change, backend=backend)


H200 = Machine(
    device_type="cuda", capability=(9, 0), torch_version=(2, 15), cudnn_version=92600,
    modules=frozenset(attention._MODULES.values()),
)  # fmt: skip


def machine(**change):
    fields = {name: getattr(H200, name) for name in Machine.__dataclass_fields__}
    return Machine(**fields | change)


FA4_ONLY, NOTHING = frozenset({"flash_attn.cute.interface"}), frozenset()
CPU = machine(device_type="cpu", capability=(0, 0))


@pytest.mark.parametrize(
    ("on", "dtype", "head_dim", "picked", "said"),
    [
        (H200, torch.bfloat16, 128, "torch_varlen_fa3", "capability 9.0"),
        (machine(modules=FA4_ONLY), torch.bfloat16, 128, "torch_varlen_cudnn", "needs the module"),
        (machine(modules=FA4_ONLY), torch.bfloat16, 256, "torch_varlen_fa4", "up to 128, not 256"),
        (
            machine(modules=FA4_ONLY, torch_version=(2, 14)), torch.bfloat16, 128,
            "torch_varlen_fa4", "needs torch 2.15 or later, this is 2.14",
        ),
        (
            machine(modules=NOTHING, torch_version=(2, 11)), torch.bfloat16, 64,
            "torch_varlen", "torch_varlen_fa3 needs the module flash_attn_interface",
        ),
        (
            machine(modules=NOTHING, cudnn_version=91900), torch.bfloat16, 64,
            "torch_varlen", "cuDNN 9.24.0 (92400) or later, this is 91900",
        ),
        (machine(capability=(8, 0)), torch.bfloat16, 128, "torch_varlen", "8.0"),
        (machine(capability=(8, 9)), torch.float16, 256, "torch_varlen", "8.9"),
        (machine(capability=(10, 3)), torch.bfloat16, 128, "torch_varlen_fa4", "10.3"),
        (
            machine(capability=(10, 0), modules=NOTHING), torch.bfloat16, 128,
            "torch_varlen_cudnn", "torch_varlen_fa4 needs the module",
        ),
        (
            machine(capability=(12, 0)), torch.bfloat16, 128,
            "torch_varlen", "torch_varlen_fa4 needs compute capability 9.x or 10.x, this is 12.0",
        ),
        (machine(capability=(7, 5)), torch.float16, 128, "sdpa", "8.0 or later, this is 7.5"),
        (H200, torch.bfloat16, 20, "sdpa", "multiples of 8 up to 256, not 20"),
        (H200, torch.float32, 128, "sdpa", "takes no float32"),
        (CPU, torch.bfloat16, 128, "sdpa", "no CUDA device"),
    ],
)  # fmt: skip
def test_auto_says_what_it_picked_and_why(on, dtype, head_dim, picked, said):
    backend, why = decide("auto", on, dtype, head_dim)
    assert backend == picked
    assert said in why


@pytest.mark.parametrize(
    ("requested", "on", "dtype", "head_dim", "named"),
    [
        ("flash", H200, torch.bfloat16, 64, "'flash' is unknown; choose auto, flash_attn"),
        ("torch_varlen", CPU, torch.bfloat16, 64, "needs a CUDA device, not cpu: choose auto"),
        ("flex", CPU, torch.float32, 64, "needs a CUDA device, not cpu: choose auto or sdpa"),
        ("torch_varlen", H200, torch.float32, 64, "takes no float32: set bfloat16"),
        ("torch_varlen", H200, torch.bfloat16, 264, "up to 256, not 264: choose"),
        ("torch_varlen_fa3", machine(capability=(8, 0)), torch.bfloat16, 64, "9.x, this is 8.0"),
        ("torch_varlen_fa3", machine(modules=NOTHING), torch.bfloat16, 64, "install FlashAtt"),
        ("torch_varlen_fa4", machine(modules=NOTHING), torch.bfloat16, 64, "flash-attn-4"),
        ("flash_attn", machine(modules=FA4_ONLY), torch.bfloat16, 64, "flash_attn_2_cuda: pip"),
        ("torch_varlen_cudnn", machine(torch_version=(2, 14)), torch.bfloat16, 64, "is 2.14: upg"),
        ("torch_varlen_cudnn", H200, torch.bfloat16, 136, "up to 128, not 136"),
    ],
)
def test_a_backend_that_cannot_run_is_an_error_not_a_fallback(
    requested, on, dtype, head_dim, named
):
    with pytest.raises(ValueError, match=named):
        decide(requested, on, dtype, head_dim)


@pytest.mark.parametrize("requested", BACKENDS)
def test_a_backend_is_run_where_it_can(requested):
    assert decide(requested, H200, torch.bfloat16, 128) == (requested, "asked for")


def test_the_choice_on_this_machine():
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 20)[0] == "sdpa"
    here = this_machine(torch.device("cpu"))
    assert torch.__version__.startswith("{}.{}.".format(*here.torch_version))
    assert attention._is_installed("torch.nn.attention.varlen")
    assert not attention._is_installed("torch.nn.attention.absent")
    assert not attention._is_installed("absent.interface")


def test_the_settings_name_every_backend():
    names = get_args(get_type_hints(ModelSection)["attention"])
    assert names == ("auto", *BACKENDS)


def test_grouped_query_heads_are_announced_to_torch_from_2_12():
    is_announced = this_machine(torch.device("cpu")).torch_version >= (2, 12)
    assert attention._grouped_query_arguments() == ({"enable_gqa": True} if is_announced else {})


@pytest.mark.parametrize("backend", ["torch_varlen", "torch_varlen_cudnn"])
def test_the_call_of_torch_fits_and_repeats_no_head(backend):
    # Without a GPU, torch's own shape function of the operator stands for it, forward and backward.
    qkv = torch.empty(60, 8, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    q, k, v = split(qkv, 2)
    output = varlen_attention(q, k, v, int32([0, 17, 60], "meta"), 43, backend)
    assert output.shape == (60, 4, 16)
    shapes = [x.shape for x in torch.autograd.grad(output.sum(), (q, k, v))]
    assert shapes == [(60, 4, 16), (60, 2, 16), (60, 2, 16)]


def test_a_flash_attention_that_is_not_active_does_not_run_as_another():
    q = torch.empty(60, 4, 16, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="runs on FA3, but FA2 is active: call choose_backend"):
        varlen_attention(q, q, q, int32([0, 60], "meta"), 60, "torch_varlen_fa3")


@pytest.mark.skipif(attention._is_installed("flash_attn_interface"), reason="FA3 is installed")
def test_a_flash_attention_that_does_not_load_is_named():
    with pytest.raises(ValueError, match=r"FA3 .* does not load .*flash_attn_interface.*reinstall"):
        attention._activate("FA3")


@pytest.fixture
def on_gpu():
    """Chooses a backend for the GPU, or skips; afterwards torch's own flash attention is back."""
    device = torch.device("cuda")

    def choose(backend, dtype, head_dim):
        try:
            return choose_backend(backend, device, dtype, head_dim)[0]
        except ValueError as error:
            pytest.skip(str(error))

    yield choose
    attention._activate(None)
    torch.compiler.reset()  # FlexAttention compiles per head count and dtype, up to a limit
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


# Documents of one token; lengths around the tiles of 64 and 128 rows; a prime; T no multiple of 8.
GPU_BOUNDS = [0, 1, 64, 129, 130, 258, 1067, 1069]


def gpu_attention(backend, cu_seqlens):
    def attend(q, k, v):
        return varlen_attention(q, k, v, cu_seqlens, max_length(GPU_BOUNDS), backend)

    return attend


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_backend_is_within_the_error_budget(
    backend, dtype, num_heads, num_kv_heads, head_dim, on_gpu, assert_within_budget
):
    backend = on_gpu(backend, dtype, head_dim)
    qkv = fused_qkv(GPU_BOUNDS[-1], num_heads, num_kv_heads, head_dim, dtype, "cuda")
    cu_seqlens = int32(GPU_BOUNDS, "cuda")

    def reference(q, k, v):
        return varlen_attention_reference(q, k, v, cu_seqlens)

    ours = output_and_gradient(gpu_attention(backend, cu_seqlens), qkv, num_kv_heads)
    torchs = output_and_gradient(reference, qkv, num_kv_heads)
    exact = output_and_gradient(reference, qkv.double(), num_kv_heads)
    for triple in zip(ours, torchs, exact, strict=True):
        assert_within_budget(*triple)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_repeats_itself_where_torch_is_told_to(backend, on_gpu):
    # Without the switch, FlashAttention 2 and 3 add up dq in whatever order blocks finish.
    attend = gpu_attention(on_gpu(backend, torch.bfloat16, 128), int32(GPU_BOUNDS, "cuda"))
    qkv = fused_qkv(GPU_BOUNDS[-1], 8, 2, 128, torch.bfloat16, "cuda")
    torch.use_deterministic_algorithms(True)
    first = output_and_gradient(attend, qkv, 2)
    for _ in range(3):
        for once, again in zip(first, output_and_gradient(attend, qkv, 2), strict=True):
            assert torch.equal(once, again)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", VARLEN_BACKENDS)
def test_the_host_does_not_wait_for_the_gpu(backend, on_gpu):
    attend = gpu_attention(on_gpu(backend, torch.bfloat16, 128), int32(GPU_BOUNDS, "cuda"))
    qkv = fused_qkv(GPU_BOUNDS[-1], 8, 2, 128, torch.bfloat16, "cuda").requires_grad_()
    upstream = torch.ones(GPU_BOUNDS[-1], 8, 128, dtype=torch.bfloat16, device="cuda")
    for mode in ("default", "error"):  # once to load and to compile, once to watch
        torch.cuda.set_sync_debug_mode(mode)
        torch.autograd.grad(attend(*split(qkv, 2)), qkv, upstream)


@pytest.mark.gpu
def test_auto_picks_something_that_runs(on_gpu):
    backend = on_gpu("auto", torch.bfloat16, 128)
    assert backend in VARLEN_BACKENDS
    qkv = fused_qkv(GPU_BOUNDS[-1], 8, 2, 128, torch.bfloat16, "cuda")
    output, gradient = output_and_gradient(
        gpu_attention(backend, int32(GPU_BOUNDS, "cuda")), qkv, 2
    )
    assert output.isfinite().all() and gradient.isfinite().all()
