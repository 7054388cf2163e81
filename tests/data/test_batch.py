"""A pack as tensors: positions restart, targets stay in their document, weights where needed."""

import numpy as np
import pytest
import torch

from longcot.data.batch import IGNORE_INDEX, pack_documents, prompt_mask
from longcot.kernels import linear_cross_entropy

NO = IGNORE_INDEX


def masks(*rows):
    return [np.array([bit == "1" for bit in row]) for row in rows]


def documents(*lengths):
    return [np.arange(10 * i, 10 * i + length, dtype=np.uint32) for i, length in enumerate(lengths)]


def test_a_pack_restarts_positions_and_lets_no_target_cross_a_document():
    batch = pack_documents(
        [np.array([5, 6, 7, 8]), np.array([9, 4])], [prompt_mask(4, 2), prompt_mask(2, 1)]
    )
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.targets.tolist() == [NO, 7, 8, NO, 4, NO]
    assert batch.cu_seqlens.tolist() == [0, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.num_targets, batch.weights) == (4, 3, None)


def test_targets_are_where_the_masks_say_and_a_first_token_never_is_one():
    # Two turns learnt in the first; the second document's mask claims its first token too.
    batch = pack_documents(documents(6, 3), masks("010010", "110"))
    assert batch.targets.tolist() == [1, NO, NO, 4, NO, NO, 11, NO, NO]
    assert batch.num_targets == 3 == int((batch.targets != NO).sum())


@pytest.mark.parametrize(
    ("lengths", "given", "named"),
    [
        ([], [], "at least one document"),
        ([3, 2], ["011", "00"], "document 1 has 2 tokens and no target: nothing to learn"),
        ([2], ["10"], "document 0 has 2 tokens and no target"),  # its first token is no target
        ([1], ["1"], "document 0 has 1 tokens and no target"),
        ([3, 0, 2], ["011", "", "01"], "document 1 has no tokens"),
        ([3, 2], ["01", "011"], r"documents of \[3, 2\] tokens have masks of \[2, 3\]"),
        ([3], [], r"masks of \[\]"),
    ],
)
def test_documents_that_cannot_be_learnt_are_refused(lengths, given, named):
    with pytest.raises(ValueError, match=named):
        pack_documents(documents(*lengths), masks(*given))


def test_weights_are_there_only_where_a_row_weighs_other_than_one():
    rows = documents(2, 3), masks("01", "011")
    assert pack_documents(*rows, [1.0, 1.0]).weights is None
    weights = pack_documents(*rows, [1.0, 0.25]).weights
    assert weights is not None and weights.dtype == torch.float32
    assert weights.tolist() == [1.0, 1.0, 0.25, 0.25, 0.25]


def test_data_and_kernels_agree_on_what_no_target_is():
    assert IGNORE_INDEX == linear_cross_entropy.IGNORE_INDEX
