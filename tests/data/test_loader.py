"""The loader: the same packs wherever it starts, errors in the step they belong to, no thread left
behind.
"""

import threading

import numpy as np
import pytest
import torch

from longcot.data.loader import NUM_WORKERS, STEPS_AHEAD, StepLoader
from longcot.data.packing import CostModel, plan_step
from longcot.data.tokenized import TokenizedDataset

NUM_STEPS = 12


def rows(num_rows=50):
    draw = np.random.default_rng(3)
    lengths = draw.integers(5, 90, num_rows)
    is_target = np.concatenate([np.arange(n) >= n // 3 for n in lengths])
    return TokenizedDataset(
        tokens=draw.integers(0, 1000, lengths.sum()).astype(np.uint32),
        is_target=is_target,
        offsets=np.append(0, lengths.cumsum()),
        num_targets=lengths - lengths // 3,
        weights=np.ones(num_rows, dtype=np.float32),
        manifest={},
    )


def loader(plan=None, **changes):
    """Of rank 1 of 2; 50 rows and 16 a step, so that steps straddle epochs."""
    dataset = rows()

    def plan_of(step):
        return plan_step(
            step,
            lengths=dataset.lengths,
            num_targets=dataset.num_targets,
            sequences_per_step=16,
            tokens_per_pack=200,
            world_size=2,
            cost=CostModel(linear=1.0, quadratic=0.01),
            seed=5,
        )

    settings = {"rank": 1, "num_steps": NUM_STEPS, "pin_memory": False}
    return StepLoader(dataset, plan or plan_of, **(settings | changes))


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("longcot-loader")]


def assert_workers_end():
    for worker in workers():
        worker.join(timeout=20)
    assert not workers()


# Past the end too: resuming a finished run yields nothing.
@pytest.mark.parametrize("first_step", [0, 1, 5, NUM_STEPS - 1, NUM_STEPS])
def test_a_resumed_loader_yields_what_the_whole_one_does_from_there(first_step):
    whole, resumed = list(loader()), list(loader(first_step=first_step))
    assert len(whole) == NUM_STEPS and len(resumed) == NUM_STEPS - first_step
    for (plan, packs), (plan_again, packs_again) in zip(whole[first_step:], resumed, strict=True):
        assert plan == plan_again and len(packs) == len(packs_again) == len(plan.packs[1])
        for pack, again in zip(packs, packs_again, strict=True):
            assert torch.equal(pack.input_ids, again.input_ids)
            assert torch.equal(pack.targets, again.targets)
            assert torch.equal(pack.cu_seqlens, again.cu_seqlens)
    assert_workers_end()


def test_the_packs_are_those_of_the_plan():
    dataset = rows()
    for plan, packs in loader():
        for chosen, pack in zip(plan.packs[1], packs, strict=True):
            tokens = np.concatenate([dataset.row(i) for i in chosen])
            assert pack.input_ids.tolist() == tokens.tolist()
        assert plan.num_targets > sum(pack.num_targets for pack in packs) > 0


@pytest.mark.parametrize("error", [ValueError("no such row"), KeyboardInterrupt("stop")])
def test_a_failure_reaches_the_step_that_needs_the_result_and_no_earlier_one(error):
    sound = list(loader())
    failing = 6

    def plan(step):
        if step == failing:
            raise error
        return sound[step][0]

    seen = []
    with pytest.raises(type(error), match=str(error)):
        for step_plan, _ in loader(plan):
            seen.append(step_plan)
    assert seen == [plan for plan, _ in sound[:failing]]
    assert_workers_end()


def test_a_row_without_a_target_fails_its_step():
    dataset = rows()
    dataset.is_target[dataset.offsets[7] : dataset.offsets[8]] = False
    plans = [plan for plan, _ in loader()]
    failing = next(s for s, plan in enumerate(plans) if any(7 in pack for pack in plan.packs[1]))
    steps = iter(
        StepLoader(dataset, plans.__getitem__, rank=1, num_steps=NUM_STEPS, pin_memory=False)
    )
    for _ in range(failing):
        next(steps)
    with pytest.raises(ValueError, match="nothing to learn"):
        next(steps)
    assert_workers_end()


def test_leaving_early_stops_the_workers():
    for plan, _ in loader(num_steps=10**9):
        assert plan.num_tokens and 0 < len(workers()) <= NUM_WORKERS
        break
    assert_workers_end()


def test_an_exception_in_the_loop_stops_the_workers():
    with pytest.raises(FloatingPointError):
        for _ in loader(num_steps=10**9):
            raise FloatingPointError
    assert_workers_end()


def test_packs_are_made_ahead_but_not_without_end():
    sound = [plan for plan, _ in loader()]
    planned, enough = [], threading.Semaphore(0)

    def plan(step):
        planned.append(step)
        enough.release()
        return sound[step]

    steps = iter(loader(plan))
    next(steps)
    # The step in use and those ahead of it: each is planned without being asked for.
    for _ in range(1 + STEPS_AHEAD):
        assert enough.acquire(timeout=20)
    assert sorted(planned) == list(range(1 + STEPS_AHEAD))
    next(steps)
    assert enough.acquire(timeout=20)
    assert sorted(planned) == list(range(2 + STEPS_AHEAD))
    del steps  # as when the loop around it ends
    assert_workers_end()


def test_waiting_is_measured_and_asking_starts_anew():
    sound = [plan for plan, _ in loader()]
    gate = threading.Event()

    def plan(step):
        gate.wait(timeout=20)
        return sound[step]

    made = loader(plan)
    steps = iter(made)
    threading.Timer(0.2, gate.set).start()
    next(steps)
    assert 0.15 < made.take_waited_seconds() < 20
    assert made.take_waited_seconds() == 0
    del steps  # as when the loop around it ends
    assert_workers_end()
