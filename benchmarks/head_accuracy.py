"""Whether a head's loss and gradients are right: against float64, by an error budget.

Errors are relative: of the loss, and in the Frobenius norm of the two gradients. The budget is a
multiple of plain torch's own error at the same dtype, plus a slack. Ours must be about as exact as
torch; a peer that adds up in bf16 is less so, which its row reports, and only a wrong answer fails.

T rows (tokens), D hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .head_providers import Answer, Problem, row_gradients

Errors = dict[str, float | None]
"""Of `loss`, `grad_hidden` and `grad_weight`; None for what a variant does not compute."""

CHUNK_ROWS = 1024
TORCH_MULTIPLE = {True: 2.0, False: 8.0}
"""By whether it is ours and meant to be exact."""
SLACK = {
    # The loss's error averages out over rows and may be nearly zero by luck: a wider slack.
    torch.bfloat16: {"loss": 2e-3, "ours": 1e-4, "others": 1e-2},
    torch.float32: {"loss": 1e-5, "ours": 1e-6, "others": 1e-3},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """Loss and gradients in float64 of the problem's own, already rounded, inputs."""

    loss: float
    grad_hidden: Tensor  # (T, D) float64
    grad_weight: Tensor  # (V, D) float64


def truth(problem: Problem) -> Truth:
    """By float64 matmuls over row chunks, every element of both gradients."""
    hidden, weight = problem.hidden.double(), problem.weight.double()
    exact = Problem(
        hidden=hidden, weight=weight, targets=problem.targets, num_targets=problem.num_targets
    )
    loss_sum = torch.zeros((), dtype=torch.float64, device=hidden.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        loss, grad_logits = row_gradients(exact, rows)
        loss_sum += loss
        torch.mm(grad_logits, weight, out=grad_hidden[rows])
        grad_weight.addmm_(grad_logits.T, hidden[rows])
    # The host waits: nothing is timed here.
    return Truth(loss=loss_sum.item(), grad_hidden=grad_hidden, grad_weight=grad_weight)


def torch_answer(problem: Problem) -> Answer:
    """Plain torch's answer by row chunks, so that it exists where its full logits do not fit.

    The head gradient is added up in fp32 and rounded once, as one matmul over all rows does.
    """
    hidden, weight = problem.hidden, problem.weight
    loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        loss, grad_logits = row_gradients(problem, rows)
        loss_sum += loss
        torch.mm(grad_logits, weight, out=grad_hidden[rows])
        grad_weight += grad_logits.T @ hidden[rows]
    return loss_sum, grad_hidden, grad_weight.to(weight.dtype)


def errors(answer: Answer, exact: Truth) -> Errors:
    """Relative errors against the truth.

    Raises:
        ValueError: a gradient of another shape, or none at all where there is a loss.
    """
    loss, grad_hidden, grad_weight = answer
    if loss is not None and (grad_hidden is None or grad_weight is None):
        raise ValueError("it left no gradient for the hidden rows or for the head")
    return {
        # The host waits: nothing is timed here.
        "loss": None if loss is None else abs(loss.item() - exact.loss) / abs(exact.loss),
        "grad_hidden": _relative_error(grad_hidden, exact.grad_hidden),
        "grad_weight": _relative_error(grad_weight, exact.grad_weight),
    }


def limits(torchs: Errors, dtype: torch.dtype, *, is_ours: bool) -> dict[str, float]:
    """The largest error allowed; `is_ours` for ours that are meant to be exact."""
    slack = SLACK[dtype]
    allowed = {}
    for name, error in torchs.items():
        assert error is not None
        extra = slack["loss"] if name == "loss" else slack["ours" if is_ours else "others"]
        allowed[name] = TORCH_MULTIPLE[is_ours] * error + extra
    return allowed


def complaint(found: Errors, allowed: dict[str, float]) -> str:
    """By how much it is off, or nothing; an error that is not a number is off."""
    wrong = [
        f"{name} is off by {error:.1e}, allowed {allowed[name]:.1e}"
        for name, error in found.items()
        if error is not None and not error <= allowed[name]
    ]
    return "; ".join(wrong)


def _relative_error(found: Tensor | None, exact: Tensor) -> float | None:
    """Frobenius norm of the difference over that of the truth, in parts that fit anywhere."""
    if found is None:
        return None
    if found.shape != exact.shape:
        raise ValueError(f"a gradient is {tuple(found.shape)} and must be {tuple(exact.shape)}")
    squares = torch.zeros(2, dtype=torch.float64, device=exact.device)
    for start in range(0, exact.shape[0], 8192):
        part = exact[start : start + 8192]
        squares[0] += (found[start : start + 8192].double() - part).square().sum()
        squares[1] += part.square().sum()
    off, whole = squares.tolist()  # the host waits: nothing is timed here
    return math.sqrt(off / whole) if math.isfinite(off) else math.inf
