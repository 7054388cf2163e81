"""The fused head and loss against float64: chunk edges, rows without a target, weights, hard
cancellations.
"""

import pytest
import torch

from longcot.kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)


def draw(num_tokens, vocab_size, hidden_size=24, seed=0, weighted=False):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * 0.3
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    targets[torch.rand(num_tokens, generator=generator) < 0.3] = IGNORE_INDEX
    weights = torch.rand(num_tokens, generator=generator) * 2 if weighted else None
    return hidden, weight, targets, weights


def gradients(function, hidden, weight, targets, weights, dtype=torch.float32, **options):
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
    loss, num_targets = function(
        hidden, weight, targets, None if weights is None else weights.to(dtype), **options
    )
    (loss * 0.7).backward()  # an upstream gradient that is not one
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), num_targets, hidden.grad, weight.grad


# One row; a prime vocabulary; a vocabulary of one chunk's width; more rows than fit any chunk
# evenly.
@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 7), (37, 101), (64, 128), (129, 331)])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 10_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_are_within_twice_torchs_own_error(
    num_tokens, vocab_size, rows_per_chunk, weighted
):
    inputs = draw(num_tokens, vocab_size, weighted=weighted)
    inputs[2][0] = vocab_size - 1  # at least one target, the last class
    truth = gradients(linear_cross_entropy_reference, *inputs, dtype=torch.float64)
    torchs = gradients(linear_cross_entropy_reference, *inputs)
    ours = gradients(linear_cross_entropy, *inputs, chunk_bytes=rows_per_chunk * 4 * vocab_size)
    assert ours[1] == truth[1] == int((inputs[2] != IGNORE_INDEX).sum())
    for mine, theirs, exact in zip(
        (ours[0], *ours[2:]), (torchs[0], *torchs[2:]), (truth[0], *truth[2:]), strict=True
    ):
        slack = 1e-6 * exact.abs().max()
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + slack


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999])
def test_a_confident_right_prediction_keeps_its_small_gradient(probability):
    # p - 1 cancels: the gradient is small, and its relative error is what must stay small.
    logit = torch.tensor(probability / (1 - probability) * 9).log()
    weight = torch.zeros(10, 1)
    weight[3] = logit
    inputs = (torch.ones(1, 1), weight, torch.tensor([3]), None)
    truth = gradients(linear_cross_entropy_reference, *inputs, dtype=torch.float64)
    ours = gradients(linear_cross_entropy, *inputs)
    torch.testing.assert_close(ours[3].double(), truth[3], rtol=2e-4, atol=0)


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


def test_bf16_head_gradient_is_summed_in_fp32_over_chunks():
    hidden, weight, targets, _ = draw(512, 64)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    truth = gradients(
        linear_cross_entropy_reference, hidden, weight, targets, None, dtype=torch.float64
    )
    errors = [
        (gradients(linear_cross_entropy, hidden, weight, targets, None, dtype=torch.bfloat16,
                   chunk_bytes=rows * 4 * 64)[3] - truth[3]).norm()
        for rows in (512, 4)
    ]  # fmt: skip
    assert errors[1] < 1.2 * errors[0]  # 128 chunks lose no more than one


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden": torch.zeros(4, 5)}, r"\(4, 5\)"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets"),
        ({"weights": torch.zeros(3)}, "weights"),
        ({"targets": torch.full((4,), 11)}, "vocabulary of 11"),
        ({"targets": torch.full((4,), -1)}, "vocabulary of 11"),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused(change, named):
    inputs = {
        "hidden": torch.zeros(4, 6),
        "weight": torch.zeros(11, 6),
        "targets": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=named):
        linear_cross_entropy(**(inputs | change))
