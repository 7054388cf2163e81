"""The training step and the loop around it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
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
    is_skipped: bool = False
    """Loss or gradient was not finite, and the update was left out, as asked for."""


class NotFiniteError(FloatingPointError):
    """Loss or gradient of a step is not finite; the weights are as they were before it."""

    def __init__(self, loss: float, gradient_norm: float, packs: list[tuple[int, int]]) -> None:
        self.loss, self.gradient_norm, self.packs = loss, gradient_norm, packs
        """(rank, micro-step) of each pack whose own loss is not finite, of all ranks."""
        super().__init__(f"loss {loss}, gradient norm {gradient_norm}: the update was not made")


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
        NotFiniteError: loss or gradient is not finite; on every rank alike.
    """
    world_size = dist.get_world_size()
    scale = world_size / num_targets
    pack_losses = []
    for micro_step, batch in enumerate(batches):
        # Ranks exchange gradients once a step: the earlier micro-steps add up locally.
        model.set_requires_gradient_sync(micro_step == len(batches) - 1)  # type: ignore[operator]
        pack_loss = model(batch.to(device), scale)
        pack_loss.backward()
        pack_losses.append(pack_loss.detach())
    scaled_loss_sum = torch.stack(pack_losses).sum()
    dist.all_reduce(scaled_loss_sum)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_gradient_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    figures = torch.stack([scaled_loss_sum / world_size, norm])
    loss, gradient_norm = figures.tolist()  # the step's one host sync
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        optimizer.zero_grad()
        raise NotFiniteError(loss, gradient_norm, _not_finite(pack_losses))
    optimizer.step()
    optimizer.zero_grad()
    return loss, gradient_norm


def _not_finite(pack_losses: list[Tensor]) -> list[tuple[int, int]]:
    """(rank, micro-step) of the packs to blame, of all ranks; called by all of them or by none."""
    own = [i for i, loss in enumerate(pack_losses) if not math.isfinite(loss.item())]
    of_ranks: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, own)
    return [(rank, i) for rank, packs in enumerate(of_ranks) for i in packs]


def train(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[tuple[StepPlan, list[PackedBatch]]],
    *,
    learning_rate: Callable[[int], float],
    max_gradient_norm: float,
    device: torch.device,
    after_step: Callable[[StepResult], None],
    skips_not_finite: bool = False,
) -> None:
    """Run the given steps; `after_step` logs and saves.

    Args:
        skips_not_finite: leave out the update of a step that is not finite, and go on.

    Raises:
        FloatingPointError: a step is not finite; names it and the rows of the packs to blame.
    """
    for step, (plan, batches) in enumerate(steps):
        rate = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        is_skipped = False
        try:
            loss, gradient_norm = train_step(
                model,
                optimizer,
                batches,
                num_targets=plan.num_targets,
                max_gradient_norm=max_gradient_norm,
                device=device,
            )
        except NotFiniteError as error:
            if not skips_not_finite:
                raise FloatingPointError(
                    f"step {step + 1}: {error}; {_blame(plan, error)}"
                ) from error
            loss, gradient_norm, is_skipped = error.loss, error.gradient_norm, True
        after_step(
            StepResult(
                step=step + 1,
                loss=loss,
                gradient_norm=gradient_norm,
                learning_rate=rate,
                num_tokens=plan.num_tokens,
                num_targets=plan.num_targets,
                is_skipped=is_skipped,
            )
        )


def _blame(plan: StepPlan, error: NotFiniteError) -> str:
    if not error.packs:
        return "the loss of every pack is finite, the gradient is not"
    rows = [
        f"{', '.join(map(str, plan.packs[rank][i]))} (rank {rank}, pack {i})"
        for rank, i in error.packs
    ]
    return f"not finite is the loss of rows {'; '.join(rows)}"
