"""How the losses of a step's tokens become one number: a weight for each row's tokens.

    token      1 / N            the mean over all target tokens of the global batch
    sequence   1 / (n N_i)      the mean over rows of their own means
    paper      1 / (R N_group)  the official code of the paper: the mean over the tokens of each
                                group of `micro_batch` rows, summed over a rank's groups and
                                averaged over R ranks

N target tokens of the step, N_i of row i, n rows. The paper's gradient is as many times that of a
mean as a rank has micro-steps, 8 for 256 rows on 8 ranks by 4, which matters to clipping; and each
group weighs the same however many tokens it has. Row j of a step, in epoch order, is on rank
j mod R, in that rank's group (j div R) div micro_batch. None of this depends on how rows are packed
or on how many ranks there are now: the official R is a setting.
"""

from typing import Literal

import numpy as np

Reduction = Literal["token", "sequence", "paper"]


def row_weights(
    reduction: Reduction,
    num_targets: np.ndarray,  # (n,) target tokens of the step's rows, in epoch order
    *,
    paper_ranks: int = 8,
    paper_micro_batch: int = 4,
) -> np.ndarray:  # (n,) float64
    """What the loss of each of a row's target tokens is multiplied by; the step's loss is the sum.

    Raises:
        ValueError: `paper`, and the rows do not divide into whole groups.
    """
    num_rows = len(num_targets)
    if reduction == "token":
        return np.full(num_rows, 1 / num_targets.sum())
    if reduction == "sequence":
        return 1 / (num_rows * num_targets)
    assert reduction == "paper"
    check_groups(num_rows, paper_ranks, paper_micro_batch)
    # (micro-step, place in the group, rank): the order in which the official sampler deals rows
    groups = num_targets.reshape(-1, paper_micro_batch, paper_ranks)
    weights = 1 / (paper_ranks * groups.sum(1, keepdims=True))
    return np.broadcast_to(weights, groups.shape).reshape(-1)


def check_groups(num_rows: int, paper_ranks: int, paper_micro_batch: int) -> None:
    """Refuse steps that the paper's reduction cannot divide.

    Raises:
        ValueError: naming the numbers.
    """
    if num_rows % (paper_ranks * paper_micro_batch):
        raise ValueError(
            f"loss.reduction is paper: {num_rows} rows a step must be a multiple of "
            f"loss.paper_ranks {paper_ranks} times loss.paper_micro_batch {paper_micro_batch}"
        )
