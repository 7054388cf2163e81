"""The training step and the loop around it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..data.batch import PackedBatch
from ..data.packing import StepPlan
from .model import Decoder


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    step: int
    """Optimizer steps done, this one included."""
    loss: float
    """Mean loss of a target token over the whole global batch, before the update."""
    gradient_norm: float
    """Global norm before clipping."""
    learning_rate: float
    num_tokens: int
    num_targets: int


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batches: list[PackedBatch],  # this rank's micro-steps
    *,
    num_targets: int,
    max_gradient_norm: float,
    device: torch.device,
) -> tuple[float, float]:
    """One update by the exact mean over the global batch's targets; (loss, unclipped norm).

    The count is known beforehand from the step plan, so every micro-step's losses are divided by
    the global total: packing, micro-steps and ranks cannot change the result. FSDP averages
    gradients over the ranks, hence the factor.

    Raises:
        FloatingPointError: loss or gradient is not finite; the weights are left as they were.
    """
    world_size = dist.get_world_size()
    scale = world_size / num_targets
    scaled_loss_sum = torch.zeros((), device=device)
    for micro_step, batch in enumerate(batches):
        # Ranks exchange gradients once a step: the earlier micro-steps add up locally.
        model.set_requires_gradient_sync(micro_step == len(batches) - 1)  # type: ignore[operator]
        pack_loss = model(batch.to(device), scale)
        pack_loss.backward()
        scaled_loss_sum += pack_loss.detach()
    dist.all_reduce(scaled_loss_sum)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_gradient_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    figures = torch.stack([scaled_loss_sum / world_size, norm])
    loss, gradient_norm = figures.tolist()  # the step's one host sync
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise FloatingPointError(
            f"loss {loss}, gradient norm {gradient_norm}: the update was not made"
        )
    optimizer.step()
    optimizer.zero_grad()
    return loss, gradient_norm


def train(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[tuple[StepPlan, list[PackedBatch]]],
    *,
    learning_rate: Callable[[int], float],
    max_gradient_norm: float,
    device: torch.device,
    after_step: Callable[[StepResult], None],
) -> None:
    """Run the given steps; `after_step` logs and saves.

    Raises:
        FloatingPointError: as `train_step`, with the step's number.
    """
    for step, (plan, batches) in enumerate(steps):
        rate = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            loss, gradient_norm = train_step(
                model,
                optimizer,
                batches,
                num_targets=plan.num_targets,
                max_gradient_norm=max_gradient_norm,
                device=device,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step + 1}: {error}") from error
        after_step(
            StepResult(
                step=step + 1,
                loss=loss,
                gradient_norm=gradient_norm,
                learning_rate=rate,
                num_tokens=plan.num_tokens,
                num_targets=plan.num_targets,
            )
        )
