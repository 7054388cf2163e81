"""The three reductions against independent statements of them, and of their gradients."""

import numpy as np
import pytest
import torch

from longcot.trainer.reduction import row_weights


def losses_of(num_rows, seed=0):
    """Token losses of each row, as functions of one parameter, to compare gradients."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 60, num_rows)
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    slopes = [torch.from_numpy(generator.normal(size=length)) for length in lengths]
    return lengths, theta, [(theta * slope).exp() for slope in slopes]


def weighted(lengths, losses, reduction, **options):
    weights = row_weights(reduction, lengths, **options)
    sums = [w * row.sum() for w, row in zip(weights.tolist(), losses, strict=True)]
    return torch.stack(sums).sum()


def test_token_and_sequence():
    lengths, _, losses = losses_of(12)
    torch.testing.assert_close(weighted(lengths, losses, "token"), torch.cat(losses).mean())
    means = torch.stack([row.mean() for row in losses])
    torch.testing.assert_close(weighted(lengths, losses, "sequence"), means.mean())


@pytest.mark.parametrize(("num_rows", "ranks", "micro_batch"), [(256, 8, 4), (24, 2, 3), (4, 4, 1)])
def test_paper_is_the_official_loop(num_rows, ranks, micro_batch):
    lengths, theta, losses = losses_of(num_rows)
    # As the official trainer does it: each rank takes every R-th row and cuts its share into
    # micro-batches; backward() on each one's token mean, undivided; FSDP averages over the ranks.
    gradients = []
    for rank in range(ranks):
        share = losses[rank::ranks]
        theta.grad = None
        for start in range(0, len(share), micro_batch):
            torch.cat(share[start : start + micro_batch]).mean().backward(retain_graph=True)
        gradients.append(theta.grad)
    official = sum(gradients) / ranks
    theta.grad = None
    weighted(lengths, losses, "paper", paper_ranks=ranks, paper_micro_batch=micro_batch).backward()
    torch.testing.assert_close(theta.grad, official)


def test_rows_that_make_no_whole_groups_are_refused():
    with pytest.raises(
        ValueError, match=r"30 rows a step must be a multiple of loss.paper_ranks 8"
    ):
        row_weights("paper", np.ones(30, dtype=int))
