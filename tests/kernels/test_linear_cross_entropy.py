"""The fused head and loss against float64: chunks, dropped rows, weights, memory, misuse."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcot.kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_with_statistics,
)
from longcot.kernels.softmax_gradient import one_read_obstacle

FORMS = ["one_read", "two_reads", "torch"]


def draw(num_tokens, vocab_size, hidden_size=24, seed=0, weighted=False, device="cpu") -> Any:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * 0.3
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    targets[torch.rand(num_tokens, generator=generator) < 0.3] = IGNORE_INDEX
    weights = torch.rand(num_tokens, generator=generator) * 2 if weighted else None
    return [None if x is None else x.to(device) for x in (hidden, weight, targets, weights)]


def gradients(function, hidden, weight, targets, weights, dtype=torch.float32, **options):
    """Loss, count and both gradients, in `dtype`; the head's unrounded where that is possible."""
    hidden, weight = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
    if function is not linear_cross_entropy_reference:
        weight.grad_dtype = torch.promote_types(dtype, torch.float32)
    loss, num_targets = function(hidden, weight, targets, weights, **options)
    (loss * 0.7).backward()  # an upstream gradient that is not one
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), num_targets, hidden.grad, weight.grad


def skip_what_cannot_run(form, vocab_size, device):
    if form == "one_read" and device.type == "cuda":
        obstacle = one_read_obstacle(vocab_size, torch.cuda.get_device_capability())
        if obstacle:
            pytest.skip(obstacle)


# One row; a prime vocabulary; a power of two; more rows than fit any chunk evenly, and a vocabulary
# above a power of two; rows and words beyond a tile of 128.
SIZES = [(1, 7), (37, 101), (64, 128), (129, 331), (300, 131)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_tokens", "vocab_size"), SIZES)
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 10_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_are_within_twice_torchs_own_error(
    form, num_tokens, vocab_size, rows_per_chunk, weighted, triton_device
):
    if rows_per_chunk == 1 and form != "torch" and num_tokens > 40:
        pytest.skip("hundreds of launches teach no more than tens")
    skip_what_cannot_run(form, vocab_size, triton_device)
    inputs = draw(num_tokens, vocab_size, weighted=weighted, device=triton_device)
    inputs[2][0] = vocab_size - 1  # at least one target, the last word
    inputs[2][-1] = 0
    for dtype in [torch.float32] + [torch.bfloat16] * (triton_device.type == "cuda"):
        case = inputs[0].to(dtype), inputs[1].to(dtype), inputs[2], inputs[3]
        plain = linear_cross_entropy_reference
        truth = gradients(plain, *case, dtype=torch.float64)
        torchs = gradients(plain, *case, dtype=dtype)
        chunk_bytes = rows_per_chunk * dtype.itemsize * vocab_size
        ours = gradients(
            linear_cross_entropy, *case, dtype=dtype, chunk_bytes=chunk_bytes,
            softmax=form,
        )  # fmt: skip
        assert ours[1] == truth[1] == int((inputs[2] != IGNORE_INDEX).sum())
        for mine, theirs, exact in zip(
            (ours[0], *ours[2:]), (torchs[0], *torchs[2:]), (truth[0], *truth[2:]), strict=True
        ):
            # In bf16 torch's own error may by luck be small where there are few values.
            rounding = torch.finfo(torch.bfloat16).eps / 2 if dtype == torch.bfloat16 else 1e-6
            slack = rounding * exact.abs().max()
            assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + slack


@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129, 8192, 16_384, 16_385, 50_000])
@pytest.mark.parametrize("budget_rows", [0, 1, 100, 128, 1000, 8227])
def test_chunks_are_few_even_and_within_the_budget(num_rows, budget_rows):
    row_bytes = 2 * 151_936
    most = max(1, budget_rows)
    rows = chunk_rows(num_rows, row_bytes, max(1, budget_rows * row_bytes))
    if num_rows <= most:
        assert rows == num_rows
        return
    multiple = 128 if most >= 128 else 1
    assert 1 <= rows <= most and rows % multiple == 0
    num_chunks = -(-num_rows // rows)
    assert num_chunks <= -(-num_rows // (most - most % multiple))  # no more than the largest make
    last = num_rows - rows * (num_chunks - 1)
    assert last > rows - multiple * num_chunks


def test_the_default_budget_halves_16k_rows_of_qwen():
    from longcot.kernels.linear_cross_entropy import DEFAULT_CHUNK_BYTES

    assert chunk_rows(16_384, 2 * 151_936, DEFAULT_CHUNK_BYTES) == 8192


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("form", FORMS)
def test_a_confident_right_prediction_keeps_its_small_gradient(probability, form, triton_device):
    # p - 1 cancels: the gradient is small, and its relative error is what must stay small.
    weight = torch.zeros(10, 1)
    weight[3] = torch.tensor(probability / (1 - probability) * 9).log()
    hidden, targets = torch.ones(1, 1, device=triton_device), torch.tensor([3]).to(triton_device)
    inputs = hidden, weight.to(triton_device), targets, None
    truth = gradients(linear_cross_entropy_reference, *inputs, dtype=torch.float64)
    ours = gradients(linear_cross_entropy, *inputs, softmax=form)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=3e-6, atol=0)
    torch.testing.assert_close(ours[3].double(), truth[3], rtol=3e-6, atol=0)


def test_large_logits_do_not_overflow():
    hidden, weight, targets, _ = draw(16, 50)
    loss, _, *grads = gradients(linear_cross_entropy, hidden * 1e4, weight, targets, None)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in grads)


def test_no_targets_at_all_is_a_zero_loss_with_zero_gradients():
    hidden, weight, targets, _ = draw(5, 11)
    loss, count, grad_hidden, grad_weight = gradients(
        linear_cross_entropy, hidden, weight, torch.full_like(targets, IGNORE_INDEX), None
    )
    assert (float(loss), count) == (0.0, 0)
    assert not grad_hidden.any() and not grad_weight.any()


def test_the_head_gradient_of_128_chunks_is_as_good_as_that_of_one():
    hidden, weight, targets, _ = draw(512, 64)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    truth = gradients(
        linear_cross_entropy_reference, hidden, weight, targets, None, dtype=torch.float64
    )
    errors = [
        (gradients(linear_cross_entropy, hidden, weight, targets, None, dtype=torch.bfloat16,
                   chunk_bytes=rows * 2 * 64)[3] - truth[3]).norm()
        for rows in (512, 4)
    ]  # fmt: skip
    assert errors[1] < 1.01 * errors[0]
    assert errors[1] < 0.004 * truth[3].norm()


def test_without_grad_dtype_autograd_rounds_the_head_gradient_once():
    hidden, weight, targets, _ = draw(40, 30)
    exact = gradients(linear_cross_entropy, hidden, weight, targets, None, torch.bfloat16)[3]
    leaf = weight.bfloat16().requires_grad_()
    (linear_cross_entropy(hidden.bfloat16(), leaf, targets)[0] * 0.7).backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
    assert torch.equal(leaf.grad, exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_micro_steps_add_up_in_one_fp32_buffer(dtype):
    batches = [draw(33, 50, seed=0, weighted=True), draw(20, 50, seed=1, weighted=True)]
    weight = batches[0][1].to(dtype).requires_grad_()
    total = torch.zeros(50, 24)
    expected = torch.zeros(50, 24)
    for hidden, _, targets, weights in batches:
        leaf = hidden.to(dtype).requires_grad_()
        loss, _ = linear_cross_entropy(leaf, weight, targets, weights, grad_weight=total)
        loss.backward()
        alone = weight.detach().requires_grad_()
        alone.grad_dtype = torch.float32
        again = hidden.to(dtype).requires_grad_()
        linear_cross_entropy(again, alone, targets, weights)[0].backward()
        assert leaf.grad is not None and alone.grad is not None
        assert torch.equal(leaf.grad, again.grad)
        expected += alone.grad
    assert weight.grad is None
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_statistics_are_those_of_the_full_logits(form, triton_device):
    skip_what_cannot_run(form, 101, triton_device)
    hidden, weight, targets, weights = draw(61, 101, weighted=True, device=triton_device)
    loss, _, statistics = linear_cross_entropy_with_statistics(
        hidden, weight, targets, weights, chunk_bytes=4 * 101 * 7, softmax=form
    )
    assert loss == linear_cross_entropy(
        hidden, weight, targets, weights, chunk_bytes=4 * 101 * 7, softmax=form
    )[0]  # fmt: skip
    log_probabilities = (hidden.double() @ weight.double().T).log_softmax(1)
    rows = targets != IGNORE_INDEX
    expected = log_probabilities[rows].gather(1, targets[rows, None])[:, 0]
    entropies = torch.special.entr(log_probabilities[rows].exp()).sum(1)
    torch.testing.assert_close(
        statistics.log_probabilities[rows].double(), expected, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(statistics.entropies[rows].double(), entropies, rtol=1e-5, atol=1e-6)
    is_best = log_probabilities[rows].argmax(1) == targets[rows]
    assert torch.equal(statistics.correct[rows], is_best)
    assert not any(x[~rows].any() for x in statistics)
    assert not any(x.requires_grad for x in statistics)


def test_float64_stays_float64():
    inputs = draw(29, 31, weighted=True)
    inputs[3] = inputs[3].double()
    truth = gradients(linear_cross_entropy_reference, *inputs, dtype=torch.float64)
    ours = gradients(linear_cross_entropy, *inputs, dtype=torch.float64, chunk_bytes=2000)
    for mine, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-13)


def test_only_what_is_asked_for_is_made():
    hidden, weight, targets, _ = draw(20, 30)
    frozen = weight.clone()
    hidden.requires_grad_()
    linear_cross_entropy(hidden, frozen, targets)[0].backward()
    assert frozen.grad is None and hidden.grad is not None
    full = gradients(linear_cross_entropy, hidden, weight, targets, None)
    torch.testing.assert_close(hidden.grad * 0.7, full[2])
    leaf = weight.clone().requires_grad_()
    linear_cross_entropy(hidden.detach(), leaf, targets)[0].backward()
    torch.testing.assert_close(leaf.grad * 0.7, full[3])
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert loss == full[0] and not loss.requires_grad


def test_inputs_may_be_strided_and_are_left_as_they_were():
    hidden, weight, targets, weights = draw(40, 50, weighted=True)
    wide = torch.randn(40, 48)
    wide[:, ::2] = hidden
    tall = torch.randn(24, 50)
    tall.copy_(weight.T)
    before = wide.clone(), tall.clone()
    leaf_hidden, leaf_weight = wide.requires_grad_(), tall.requires_grad_()
    loss, _ = linear_cross_entropy(
        leaf_hidden[:, ::2], leaf_weight.T, targets.repeat(2, 1).T[:, 0], weights
    )
    (loss * 0.7).backward()
    expected = gradients(linear_cross_entropy, hidden, weight, targets, weights)
    assert leaf_hidden.grad is not None and leaf_weight.grad is not None
    torch.testing.assert_close(leaf_hidden.grad[:, ::2], expected[2])
    torch.testing.assert_close(leaf_weight.grad.T, expected[3])
    assert torch.equal(wide, before[0]) and torch.equal(tall, before[1])


@given(
    num_tokens=st.integers(1, 40),
    vocab_size=st.integers(1, 40),
    rows_per_chunk=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_any_chunking_gives_the_same(num_tokens, vocab_size, rows_per_chunk, seed):
    inputs = draw(num_tokens, vocab_size, hidden_size=6, seed=seed, weighted=True)
    whole = gradients(linear_cross_entropy, *inputs)
    chunked = gradients(linear_cross_entropy, *inputs, chunk_bytes=rows_per_chunk * 4 * vocab_size)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_same_inputs_give_the_same_bits():
    inputs = draw(100, 130, weighted=True)
    first, second = (gradients(linear_cross_entropy, *inputs, chunk_bytes=9000) for _ in range(2))
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_transient_memory_on_a_cpu(masked):
    # What the CPU's allocator is asked for, as the profiler records it; plain torch would take
    # four times the full logits, 33 MB.
    num_tokens, vocab_size, hidden_size = 1024, 2048, 64
    hidden, weight, targets, weights = draw(
        num_tokens, vocab_size, hidden_size=hidden_size, weighted=True
    )
    if not masked:
        targets = targets.clamp(min=0)
    hidden.requires_grad_()
    weight.requires_grad_()
    num_targets = int((targets != IGNORE_INDEX).sum())
    chunk = chunk_rows(num_targets, 4 * vocab_size, 256 * 4 * vocab_size)
    profile: Any = torch.profiler.profile(profile_memory=True)
    with profile:
        loss, _ = linear_cross_entropy(
            hidden, weight, targets, weights, num_targets=num_targets,
            chunk_bytes=256 * 4 * vocab_size,
        )  # fmt: skip
        loss.backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    budget = 4 * (chunk * vocab_size + vocab_size * hidden_size + num_tokens * hidden_size)
    assert held > 0.9 * 4 * (vocab_size + num_tokens) * hidden_size  # the gradients: it did record
    assert peak <= 1.01 * budget + 40 * num_tokens


def test_under_torch_compile_it_is_one_op_with_the_same_result():
    hidden, weight, targets, weights = draw(37, 101, weighted=True)
    num_targets = int((targets != IGNORE_INDEX).sum())
    plain = gradients(linear_cross_entropy, hidden, weight, targets, weights)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for compile_backend in (backend, "aot_eager"):
        compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=compile_backend)
        options: Any = {"num_targets": num_targets, "chunk_bytes": 4000}
        ours = gradients(compiled, hidden, weight, targets, weights, **options)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu_transient_memory_is_chunk_logits_and_the_two_gradients(masked):
    num_tokens, vocab_size, hidden_size = 4096, 151_936, 1024
    hidden, weight = (
        torch.randn(rows, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for rows in (num_tokens, vocab_size)
    )
    weight.grad_dtype = torch.float32
    targets = torch.randint(0, vocab_size, (num_tokens,), device="cuda")
    if masked:
        targets[::3] = IGNORE_INDEX
    num_targets = int((targets != IGNORE_INDEX).sum())
    chunk_bytes = 1024 * 2 * vocab_size
    chunk = chunk_rows(num_targets, 2 * vocab_size, chunk_bytes)

    def step():
        hidden.grad = weight.grad = None
        loss, _ = linear_cross_entropy(
            hidden, weight, targets, num_targets=num_targets, chunk_bytes=chunk_bytes
        )
        loss.backward()

    step()
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    transient = torch.cuda.max_memory_allocated() - before
    allowed = 2 * chunk * vocab_size + 4 * vocab_size * hidden_size + 2 * num_tokens * hidden_size
    assert transient <= 1.01 * allowed
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait_and_the_results_repeat():
    hidden, weight, targets, weights = draw(700, 5003, 256, weighted=True, device="cuda")
    num_targets = int((targets != IGNORE_INDEX).sum())

    def step():
        return gradients(
            linear_cross_entropy, hidden, weight, targets, weights, torch.bfloat16,
            num_targets=num_targets, chunk_bytes=128 * 2 * 5003,
        )  # fmt: skip

    first = step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
