"""The softmax-gradient kernels, every form of them, against float64 and beside plain torch."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from longcot.kernels import softmax_gradient
from longcot.kernels.softmax_gradient import (
    choose_form,
    one_read_obstacle,
    one_read_options,
    prove_form,
    softmax_gradient_,
    softmax_gradient_reference_,
    two_reads_options,
)


def draw(num_rows, vocab_size, device, spread=3.0):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * spread
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator) * 2
    return [x.to(device) for x in (logits, targets, weights)]


def by_autograd(logits, targets, weights, dtype):
    """Losses and gradient as torch computes them from the same logits in `dtype`."""
    leaf = logits.detach().to(dtype, copy=True).requires_grad_()
    losses = functional.cross_entropy(leaf, targets, reduction="none")
    (losses * weights).sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def within_budget(ours, torchs, exact, slack):
    error = (ours.double() - exact).abs().max()
    return error <= 2 * (torchs.double() - exact).abs().max() + slack * exact.abs().max()


# One word; fewer than a warp; powers of two, one tile; a prime and one above a power of two, two
# tiles of the one-read kernel; one more and one less than a block of the two-read kernel; the
# smallest that a single thread block cannot hold.
SIZES = [1, 7, 64, 101, 129, 1024, 8191, 8193, 20481]
# The bases' own: 151,936 = 131,072 + 20,864, and so on.
BASE_SIZES = [32_768, 92_544, 128_256, 151_936, 152_064]


@pytest.mark.parametrize("form", ["one_read", "two_reads", "torch"])
@pytest.mark.parametrize("vocab_size", SIZES + BASE_SIZES)
def test_losses_and_gradients_are_within_twice_torchs_own_error(form, vocab_size, triton_device):
    if form == "one_read" and triton_device.type == "cuda":
        obstacle = one_read_obstacle(vocab_size, torch.cuda.get_device_capability())
        if obstacle:
            pytest.skip(obstacle)
    num_rows = 5
    logits, targets, weights = draw(num_rows, vocab_size, triton_device)
    # first and last word, both sides of the one-read kernel's seam and of a two-read block's edge
    options = one_read_options(vocab_size)
    assert options is not None
    edges = [0, vocab_size - 1, options["FIRST"] - 1, options["FIRST"], 8191]
    targets[:] = torch.tensor(edges).clamp(max=vocab_size - 1)
    dtypes = [torch.float32] + [torch.bfloat16] * (triton_device.type == "cuda")
    for dtype in dtypes:
        rounded = logits.to(dtype)
        losses, gradient = by_autograd(rounded, targets, weights.double(), torch.float64)
        torch_losses, torch_gradient = by_autograd(rounded, targets, weights, torch.float32)
        ours = rounded.clone()
        results = softmax_gradient_(ours, targets, weights, form, with_statistics=True)
        assert within_budget(results.losses, torch_losses, losses, 1e-6)
        assert within_budget(ours, torch_gradient.to(dtype), gradient, 1e-6)

        exact = functional.softmax(rounded.double(), 1)
        assert results.entropies is not None and results.correct is not None
        entropies = torch.special.entr(exact).sum(1)
        torch.testing.assert_close(results.entropies.double(), entropies, rtol=1e-5, atol=2e-6)
        is_best = rounded.gather(1, targets[:, None])[:, 0] == rounded.amax(1)
        assert torch.equal(results.correct, is_best)


@pytest.mark.parametrize("form", ["one_read", "two_reads", "torch"])
@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 1 - 1e-7])
def test_a_confident_right_prediction_keeps_loss_and_gradient(form, probability, triton_device):
    # p - 1 cancels, so the relative error is what must stay small, even where p rounds to 1.
    vocab_size = 1000
    others = torch.log(torch.tensor((1 - probability) / probability / (vocab_size - 1)))
    logits = others.repeat(1, vocab_size)
    logits[0, 700] = 0.0
    logits = logits.to(triton_device)
    targets, weights = (torch.tensor(x, device=triton_device) for x in ([700], [1.0]))
    losses, gradient = by_autograd(logits, targets, weights.double(), torch.float64)
    results = softmax_gradient_(logits, targets, weights, form)
    torch.testing.assert_close(results.losses.double(), losses, rtol=3e-6, atol=0)
    torch.testing.assert_close(logits.double(), gradient, rtol=3e-6, atol=0)


@pytest.mark.parametrize("form", ["one_read", "two_reads", "torch"])
@pytest.mark.parametrize("offset", [2.0**24, -(2.0**24)])
def test_a_common_offset_costs_nothing(form, offset, triton_device):
    # Multiples of 2: exact in fp32 beside 2^24.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-8, 9, (4, 150), generator=generator).to(triton_device) * 2.0
    targets = torch.tensor([0, 149, 77, 128], device=triton_device)
    weights = torch.ones(4, device=triton_device)
    plain, shifted = logits.clone(), logits + offset
    results = [softmax_gradient_(x, targets, weights, form) for x in (plain, shifted)]
    assert torch.equal(results[0].losses, results[1].losses)
    assert torch.equal(plain, shifted)


@pytest.mark.parametrize("form", ["one_read", "two_reads", "torch"])
def test_words_ruled_out_by_minus_infinity_get_no_gradient(form, triton_device):
    logits, targets, weights = draw(3, 300, triton_device)
    targets[:] = torch.tensor([0, 150, 299])
    logits[:, 100:140] = float("-inf")
    expected = softmax_gradient_reference_(
        logits.double(), targets, weights.double(), with_statistics=True
    )
    results = softmax_gradient_(logits, targets, weights, form, with_statistics=True)
    assert not logits[:, 100:140].any() and logits.isfinite().all()
    for ours, exact in zip(results, expected, strict=True):
        assert ours is not None and exact is not None
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["one_read", "two_reads", "torch"])
def test_a_logit_that_is_not_finite_reaches_the_loss(form, triton_device):
    for bad in (float("nan"), float("inf")):
        logits, targets, weights = draw(2, 70, triton_device)
        logits[1, 65] = bad
        targets[1] = 3
        losses = softmax_gradient_(logits, targets, weights, form).losses
        assert losses[0].isfinite() and not losses[1].isfinite()


@pytest.mark.parametrize("form", ["one_read", "two_reads", "torch"])
def test_a_strided_slab_is_worked_on_in_place_and_beyond_its_rows_nothing(form, triton_device):
    logits, targets, weights = draw(3, 101, triton_device)
    slab = torch.full((5, 128), 7.0, device=triton_device)
    slab[1:4, :101] = logits
    softmax_gradient_(slab[1:4, :101], targets, weights, form)
    softmax_gradient_reference_(logits, targets, weights)
    torch.testing.assert_close(slab[1:4, :101], logits, rtol=1e-5, atol=1e-6)
    slab[1:4, :101] = 7.0
    assert (slab == 7.0).all()


@pytest.mark.parametrize("form", ["one_read", "two_reads", "torch"])
def test_without_gradient_the_logits_stay(form, triton_device):
    logits, targets, weights = draw(4, 130, triton_device)
    before = logits.clone()
    results = softmax_gradient_(logits, targets, weights, form, with_gradient=False)
    assert torch.equal(logits, before)
    assert torch.equal(results.losses, softmax_gradient_(logits, targets, weights, form).losses)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["one_read", "two_reads"])
def test_repeated_runs_give_the_same_bits_at_full_size(form):
    vocab_size = 151_936
    obstacle = one_read_obstacle(vocab_size, torch.cuda.get_device_capability())
    if form == "one_read" and obstacle:
        pytest.skip(obstacle)
    logits, targets, weights = draw(2048, vocab_size, "cuda")
    runs = []
    for _ in range(3):
        slab = logits.bfloat16()
        runs.append((softmax_gradient_(slab, targets, weights, form).losses, slab))
    exact = by_autograd(logits.bfloat16()[:64], targets[:64], weights[:64].double(), torch.float64)
    torch.testing.assert_close(runs[0][0][:64].double(), exact[0], rtol=1e-5, atol=1e-5)
    for losses, slab in runs[1:]:
        assert torch.equal(losses, runs[0][0]) and torch.equal(slab, runs[0][1])


@pytest.mark.gpu
def test_rows_beyond_32_bits_of_offset_are_reached():
    vocab_size, num_rows = 151_936, 14_200  # 2.16e9 logits, above 2^31
    slab = torch.zeros(num_rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    targets = torch.arange(num_rows, device="cuda")
    for form in ("one_read", "two_reads"):
        if form == "one_read" and one_read_obstacle(vocab_size, torch.cuda.get_device_capability()):
            continue
        slab.zero_()
        losses = softmax_gradient_(slab, targets, torch.ones_like(targets).float(), form).losses
        torch.testing.assert_close(losses, torch.full_like(losses, vocab_size).log())
        assert (slab[-1] > 0).sum() == vocab_size - 1 and slab[-1, num_rows - 1] < -0.99


@pytest.mark.parametrize("form", ["one_read", "two_reads", "torch"])
def test_a_form_is_proven_before_it_trains(form, triton_device, monkeypatch):
    prove_form(form, 101, triton_device, torch.float32)
    if form != "torch":
        # As a miscompiled kernel would be: another one, which leaves out the last words.
        def options(vocab_size):
            return {"FIRST": 64, "SECOND": 32, "num_warps": 1, "num_ctas": 1}

        monkeypatch.setattr(softmax_gradient, "one_read_options", options)
        monkeypatch.setattr(
            softmax_gradient, "_two_reads_kernel", softmax_gradient._one_read_kernel
        )
        monkeypatch.setattr(softmax_gradient, "two_reads_options", options)
        with pytest.raises(ValueError, match=f"{form!r} is wrong on this device with Triton"):
            prove_form(form, 101, triton_device, torch.float32)


def test_every_tile_is_a_power_of_two_and_covers_the_row():
    for vocab_size in range(1, 3000):
        options = one_read_options(vocab_size)
        assert options is not None
        first, second = options["FIRST"], options["SECOND"]
        assert first & (first - 1) == 0 and second & (second - 1) == 0
        assert first <= vocab_size <= first + second
        block = two_reads_options(vocab_size)["BLOCK"]
        assert block & (block - 1) == 0


def test_the_form_is_chosen_by_what_can_run():
    hopper, ampere = (9, 0), (8, 0)
    assert one_read_obstacle(151_936, hopper, "3.9.0") is None
    assert "3.8 can" in (one_read_obstacle(151_936, hopper, "3.7.1") or "")
    assert "8.0" in (one_read_obstacle(151_936, ampere, "3.9.0") or "")
    assert "500000" in (one_read_obstacle(500_000, hopper, "3.9.0") or "")
    assert one_read_obstacle(20_000, ampere, "3.6.0") is None  # one thread block holds a row


def test_a_form_that_cannot_run_is_an_error_not_a_fallback():
    cpu = torch.device("cpu")
    assert choose_form("auto", 100, cpu) == ("torch", "no CUDA device: plain torch")
    with pytest.raises(ValueError, match="'fast' is unknown; choose auto, one_read, two_reads"):
        choose_form("fast", 100, cpu)
    with pytest.raises(ValueError, match=r"holds a row of 500000 logits; choose two_reads or auto"):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        choose_form("one_read", 500_000, device)
    # In a process of its own: in this one Triton may be interpreting, which does take CPU tensors.
    code = "import torch; from longcot.kernels.softmax_gradient import choose_form\n"
    code += "choose_form('two_reads', 100, torch.device('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'two_reads' is a Triton kernel and needs a CUDA device, not cpu" in done.stderr
