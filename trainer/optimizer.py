"""AdamW and its learning-rate schedule."""

import math
from collections.abc import Iterable

import torch


def build_adamw(
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """Fused AdamW over all parameters; epsilon is torch's 1e-8, as in the paper."""
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True
    )


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
