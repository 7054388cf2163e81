"""AdamW's precisions: what each does with updates smaller than a bf16 step."""

import math
from typing import Any

import pytest
import torch

from longcot.trainer.optimizer import (
    StochasticAdamW,
    build_adamw,
    learning_rate_at,
    round_stochastically,
    weight_dtype,
)

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-5,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.01,
}


def train(precision, num_steps=60, seed=0):
    """Weights before and after steps with gradients that mostly agree in sign."""
    generator = torch.Generator().manual_seed(1)
    before = (torch.randn(4000, generator=generator) * 0.02).bfloat16().float()
    parameter = torch.nn.Parameter(before.to(weight_dtype(precision), copy=True))
    optimizer = build_adamw([parameter], **SETTINGS, precision=precision, seed=seed)
    drift = torch.randn(4000, generator=generator)
    for _ in range(num_steps):
        parameter.grad = (drift + 0.3 * torch.randn(4000, generator=generator)).to(parameter.dtype)
        optimizer.step()
    return before, parameter.detach().float(), optimizer


def test_a_small_rate_moves_fp32_and_stochastic_weights_but_few_of_the_papers():
    before, exact, _ = train("fp32_master")
    _, stochastic, _ = train("bf16_stochastic")
    _, paper, _ = train("paper")
    assert (exact != before).float().mean() > 0.99
    assert (paper != before).float().mean() < 0.2
    # On average over weights nothing is lost: the mean displacement along the exact one.
    along = (exact - before).sign()
    displacement = float(((exact - before) * along).mean())
    assert float(((stochastic - before) * along).mean()) == pytest.approx(displacement, rel=0.1)
    assert ((paper - before) * along).mean() < 0.5 * displacement


def test_in_full_precision_it_is_torchs_adamw():
    # Gradients as in `train`; weights so coarse that rounding them is no difference.
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(37, 5, generator=generator)
    ours = torch.nn.Parameter(start.bfloat16())
    theirs = torch.nn.Parameter(start.bfloat16().float())
    settings = {"lr": 0.5, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizer = StochasticAdamW([ours], **settings, seed=0, rank=0)
    reference = torch.optim.AdamW([theirs], **settings)
    for _ in range(3):
        gradient = torch.randn(37, 5, generator=generator).bfloat16()
        ours.grad, theirs.grad = gradient, gradient.float()
        with torch.no_grad():
            theirs.copy_(ours)  # so that one step's rounding is all that differs
        optimizer.step()
        reference.step()
        step_bf16 = theirs.detach().abs() * 2**-7
        assert ((ours.detach().float() - theirs.detach()).abs() <= step_bf16).all()
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[ours][name], reference.state[theirs][name])


def test_rounding_hits_a_neighbour_with_the_right_probability():
    low, high = torch.tensor([1.0, 1.0 + 2**-7])
    for share in (0.0, 0.25, 0.9):
        values = (low + share * (high - low)).repeat(40_000)
        rounded = round_stochastically(values, torch.Generator().manual_seed(0)).float()
        assert set(rounded.tolist()) <= {float(low), float(high)}
        spread = 4 * math.sqrt(share * (1 - share) / 40_000)
        assert (rounded == high).float().mean() == pytest.approx(share, abs=spread)
    negative = round_stochastically(-values, torch.Generator().manual_seed(0)).float()
    assert torch.equal(negative, -rounded)


def test_the_same_seed_gives_the_same_bits_and_another_rank_others():
    _, first, _ = train("bf16_stochastic", num_steps=5)
    _, second, _ = train("bf16_stochastic", num_steps=5)
    _, other, _ = train("bf16_stochastic", num_steps=5, seed=1)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_states_take_the_bytes_that_are_stated():
    for precision, num_bytes in (("fp32_master", 12), ("bf16_stochastic", 10), ("paper", 6)):
        _, _, optimizer = train(precision, num_steps=1)
        (parameter,) = optimizer.param_groups[0]["params"]
        state = optimizer.state[parameter]
        held = parameter.nbytes + state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
        assert held == num_bytes * parameter.numel()


def test_the_rate_rises_and_falls():
    def rates(schedule):
        return [
            learning_rate_at(
                step, num_steps=20, peak=2.0, warmup_ratio=0.2, schedule=schedule, min_ratio=0.1
            )
            for step in range(20)
        ]

    assert rates("cosine")[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates("cosine")[12] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates("constant")[4:] == [2.0] * 16
