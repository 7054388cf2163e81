"""The step plan: every example once, no pack over its budget, all ranks in step; the pack as
tensors.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcot.data.batch import IGNORE_INDEX, pack_documents
from longcot.data.packing import plan_step, step_examples
from longcot.kernels import linear_cross_entropy


def plan(lengths, **changes):
    settings = {"sequences_per_step": 8, "tokens_per_pack": 1000, "world_size": 2, "seed": 0}
    lengths = np.array(lengths)
    return plan_step(
        changes.pop("step", 0), lengths=lengths, num_targets=lengths - 1, **(settings | changes)
    )


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(2, 500), min_size=1, max_size=60),
    sequences_per_step=st.integers(4, 40),
    world_size=st.integers(1, 4),
    seed=st.one_of(st.none(), st.integers(0, 5)),
    step=st.integers(0, 20),
)
def test_every_example_of_the_step_is_in_one_pack_and_no_pack_overflows(
    lengths, sequences_per_step, world_size, seed, step
):
    # Packs with room for the whole step: a plan always exists.
    made = plan(
        lengths, step=step, sequences_per_step=sequences_per_step, tokens_per_pack=20_000,
        world_size=world_size, seed=seed,
    )  # fmt: skip
    wanted = step_examples(step, len(lengths), sequences_per_step, seed).tolist()
    packs = [pack for rank in made.packs for pack in rank]
    assert sorted(i for pack in packs for i in pack) == sorted(wanted)
    assert len({len(rank) for rank in made.packs}) == 1 and len(made.packs) == world_size
    assert all(packs) and all(sum(lengths[i] for i in pack) <= 20_000 for pack in packs)
    assert made.num_tokens == sum(lengths[i] for i in wanted)
    assert made.num_targets == made.num_tokens - len(wanted)


def test_a_tight_budget_takes_more_micro_steps_not_larger_packs():
    made = plan([400] * 8, sequences_per_step=8, tokens_per_pack=1000, world_size=2)
    assert [len(rank) for rank in made.packs] == [2, 2]
    assert all(len(pack) == 2 for rank in made.packs for pack in rank)


def test_an_epoch_shows_every_row_once_and_shuffles_anew():
    epochs = [
        np.concatenate([step_examples(s, 24, 8, 7) for s in range(e * 3, e * 3 + 3)])
        for e in (0, 1)
    ]
    assert all(sorted(epoch.tolist()) == list(range(24)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert step_examples(1, 10, 8, None).tolist() == [8, 9, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("lengths", "changes", "named"),
    [
        ([10] * 8, {"sequences_per_step": 1}, "sequences_per_step 1 leaves"),
        ([10, 2000], {}, "2000 tokens does not fit tokens_per_pack 1000"),
        ([900] * 3, {"sequences_per_step": 3}, "3 sequences cannot fill 4 packs"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_its_numbers(lengths, changes, named):
    with pytest.raises(ValueError, match=named):
        plan(lengths, **changes)


def test_a_pack_restarts_positions_and_lets_no_target_cross_a_document():
    batch = pack_documents([np.array([5, 6, 7, 8]), np.array([9, 4])], [2, 1])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    no = IGNORE_INDEX
    assert batch.targets.tolist() == [no, 7, 8, no, 4, no]
    assert batch.cu_seqlens.tolist() == [0, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.num_targets) == (4, 3)


@pytest.mark.parametrize(
    ("documents", "prompts"), [([], []), ([np.array([1, 2])], [2]), ([np.array([1, 2])], [0])]
)
def test_documents_without_a_target_are_refused(documents, prompts):
    with pytest.raises(ValueError, match=r"at least one document|nothing to learn"):
        pack_documents(documents, prompts)


def test_data_and_kernels_agree_on_what_no_target_is():
    assert IGNORE_INDEX == linear_cross_entropy.IGNORE_INDEX
