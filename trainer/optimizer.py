"""AdamW in three precisions, and its learning-rate schedule.

fp32_master       fp32 weights and states, 12 bytes a parameter; matmuls may be bf16
bf16_stochastic   bf16 weights, fp32 states, 10 bytes; updates are rounded up or down at random,
                  in proportion, so that on average none is lost
paper             bf16 weights and states, 6 bytes, rounded to nearest: an update below half of a
                  bf16 step, 2^-9 of the weight, is lost; at a rate of 1e-5 that is most of them
"""

import math
import zlib
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Precision = Literal["fp32_master", "bf16_stochastic", "paper"]


def weight_dtype(precision: Precision) -> torch.dtype:
    """Dtype in which weights are kept between steps."""
    return torch.float32 if precision == "fp32_master" else torch.bfloat16


def build_adamw(
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    precision: Precision = "fp32_master",
    seed: int = 0,
    rank: int = 0,
) -> torch.optim.Optimizer:
    """AdamW over all parameters, norms and embeddings too; epsilon 1e-8, as in the paper."""
    settings: dict[str, Any] = {
        "lr": learning_rate, "betas": (beta1, beta2), "weight_decay": weight_decay
    }  # fmt: skip
    if precision == "bf16_stochastic":
        return StochasticAdamW(parameters, **settings, seed=seed, rank=rank)
    return torch.optim.AdamW(parameters, **settings, fused=True)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) on bf16 weights with stochastic rounding.

    The random bits are a function of seed, rank, parameter and step: a resumed run draws the same.
    A dozen small kernels a parameter, where a fused one would be faster: in long-CoT fine-tuning a
    step sees millions of tokens, beside which reading the weights a few times is nothing.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
        seed: int,
        rank: int,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(parameters, defaults)
        self._name = f"{seed}/{rank}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, number)

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        weight, gradient = _local(parameter), _local(parameter.grad).float()
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"]
        mean, square = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        updated = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
        root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        updated.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
        generator = torch.Generator(weight.device)
        generator.manual_seed(zlib.crc32(f"{self._name}/{number}/{step}".encode()))
        weight.copy_(round_stochastically(updated, generator))


def round_stochastically(
    values: Tensor,  # any shape, fp32, finite
    generator: torch.Generator,
) -> Tensor:  # bf16
    """To one of the two neighbours in bf16, each as likely as the value is near to it.

    bf16 is the upper half of fp32: a random number added to the lower half carries into the upper
    one with just that probability.
    """
    assert values.dtype == torch.float32
    noise = torch.randint(
        0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    bits = values.view(torch.int32).add(noise).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).bfloat16()  # exact: the lower half is zero


def learning_rate_at(
    step: int, *, num_steps: int, peak: float, warmup_ratio: float, schedule: str, min_ratio: float
) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warm-up, then `schedule`."""
    warmup_steps = int(warmup_ratio * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
