"""The ways to compute a head's cross-entropy and its gradients that are timed against each other.

Each takes the same problem and returns the summed loss, the gradient of the hidden rows and that of
the head, from fresh leaves on every call. Other people's packages are imported when their variant
is made, so that an absent one costs only its own row.

T rows (tokens), D hidden size, V vocabulary, C rows of a chunk.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from ..kernels.softmax_gradient import Form
from .timing import free_bytes

Answer = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Summed loss () (None: not computed), gradient of hidden (T, D), gradient of the head (V, D)."""

PACKAGES = (
    "torch",
    "triton",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "nvidia-cutlass-dsl",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One head and one batch."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,) int64
    num_targets: int

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden and head as fresh leaves without a gradient, sharing the memory."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way; `make` may allocate buffers that outlive the calls, and raise if it cannot run."""

    name: str
    make: Callable[[Problem], Callable[[], Answer]]
    is_ours: bool = False
    is_exact: bool = True  # as opposed to an approximation by design
    has_own_buffers: bool = False  # made beforehand, so that the peak of a call says nothing
    note: str = ""


def draw(
    *,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    masked: float,
    seed: int = 0,
) -> Problem:
    """A batch as late in fine-tuning: most targets nearly certain, some missed, ids as frequent.

    Logits are N(0, 2), and the target's is raised so that its probability runs from 0.001 to
    0.9999. On uniform noise an implementation that skips small gradients would look faster, and an
    error in (p - 1) smaller, than they are.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    weight = torch.randn(vocab_size, hidden_size, device=device, generator=generator)
    weight *= 2 / math.sqrt(hidden_size)
    targets = (uniform(num_tokens) ** 3 * vocab_size).long().clamp_(max=vocab_size - 1)
    targets[0], targets[-1] = 0, vocab_size - 1  # the edges of every tiling
    rows = weight[targets]
    raised = (math.log(vocab_size) + 2) * (0.5 + 1.25 * uniform(num_tokens, 1))
    hidden = torch.randn(num_tokens, hidden_size, device=device, generator=generator)
    hidden += rows * (raised / rows.square().sum(1, keepdim=True))
    is_masked = uniform(num_tokens) < masked
    is_masked[-1] = False  # a batch has at least one target
    targets[is_masked] = IGNORE_INDEX
    return Problem(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        targets=targets,
        num_targets=int((targets != IGNORE_INDEX).sum()),
    )


def row_gradients(problem: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """Sum of the losses of some rows, and the gradient of their logits (C, V), as torch does it.

    In the dtype of the hidden rows, with the softmax in fp32 at least: what transformers computes.
    """
    logits = (problem.hidden[rows] @ problem.weight.T).requires_grad_()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(wide, problem.targets[rows], ignore_index=IGNORE_INDEX, reduction="sum")
    (grad_logits,) = torch.autograd.grad(loss, logits)
    return loss.detach(), grad_logits


def _ours(*, into_grad_weight: bool = False, **options: Any) -> Callable[..., Callable[[], Answer]]:
    def make(problem: Problem) -> Callable[[], Answer]:
        kept = _zero_gradient(problem) if into_grad_weight else None

        def call() -> Answer:
            hidden, weight = problem.leaves
            grad_weight = kept
            if hasattr(weight, "grad_dtype"):
                weight.grad_dtype = torch.float32
            elif grad_weight is None:
                # Autograd of an older torch would round to bf16; zeroing this one is in the time.
                grad_weight = _zero_gradient(problem)
            loss, _ = linear_cross_entropy(
                hidden,
                weight,
                problem.targets,
                num_targets=problem.num_targets,
                grad_weight=grad_weight,
                **options,
            )
            loss.backward()
            return loss.detach(), hidden.grad, weight.grad if grad_weight is None else grad_weight

        return call

    return make


def _ours_in_chunks(num_chunks: int) -> Callable[[Problem], Callable[[], Answer]]:
    def make(problem: Problem) -> Callable[[], Answer]:
        # Ours rounds a chunk down to a multiple of 128 rows: ask for one rounded up.
        rows = math.ceil(problem.num_targets / num_chunks / 128) * 128
        row_bytes = problem.weight.shape[0] * problem.hidden.element_size()
        return _ours(chunk_bytes=rows * row_bytes)(problem)

    return make


def _zero_gradient(problem: Problem) -> Tensor:
    return torch.zeros_like(problem.weight, dtype=torch.float32)


def _three_matmuls(problem: Problem) -> Callable[[], Answer]:
    """The floor: its second and third matmul read the true gradient of the logits.

    Random data of the right spread matters, since a GPU's power and so its clock depend on it.
    Where two (T, V) buffers do not fit, row chunks share smaller ones, and the result is no
    gradient.
    """
    hidden, weight = problem.hidden, problem.weight
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    rows = num_tokens
    while 2 * rows * vocab_size * hidden.element_size() > free_bytes(hidden.device) // 3:
        rows = math.ceil(rows / 2)
    logits, grad_logits = (hidden.new_empty(rows, vocab_size) for _ in range(2))
    for start in range(0, rows, 1024):
        part = slice(start, min(start + 1024, rows))
        grad_logits[part] = row_gradients(problem, part)[1]
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> Answer:
        for start in range(0, num_tokens, rows):
            chunk = slice(start, min(start + rows, num_tokens))
            size = chunk.stop - chunk.start
            torch.mm(hidden[chunk], weight.T, out=logits[:size])
            torch.mm(grad_logits[:size], weight, out=grad_hidden[chunk])
            if start == 0:
                torch.mm(grad_logits[:size].T, hidden[chunk], out=grad_weight)
            else:
                torch.addmm(grad_weight, grad_logits[:size].T, hidden[chunk], out=grad_weight)
        return (None, grad_hidden, grad_weight) if rows == num_tokens else (None, None, None)

    return call


def _plain_torch(problem: Problem) -> Callable[[], Answer]:
    num_logits = problem.hidden.shape[0] * problem.weight.shape[0]
    # The logits and their gradient, and in fp32 the logits, their softmax and its gradient.
    needed = num_logits * (2 * problem.hidden.element_size() + 3 * 4)
    free = free_bytes(problem.hidden.device)
    if needed > free:
        raise MemoryError(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")

    def call() -> Answer:
        hidden, weight = problem.leaves
        logits = (hidden @ weight.T).float()
        loss = F.cross_entropy(logits, problem.targets, ignore_index=IGNORE_INDEX, reduction="sum")
        del logits
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad

    return call


def _peer(load: Callable[[], Callable[[Tensor, Tensor, Tensor], Any]]):
    """A variant from a function of hidden, weight and targets that returns the summed loss."""

    def make(problem: Problem) -> Callable[[], Answer]:
        function = load()

        def call() -> Answer:
            hidden, weight = problem.leaves
            loss = function(hidden, weight, problem.targets)
            loss.backward()
            return loss.detach(), hidden.grad, weight.grad

        return call

    return make


def _torch_options(**settings: str):
    def load():
        options_class: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        function: Any = getattr(F, "linear_cross_entropy", None)
        if options_class is None or function is None:
            raise ImportError(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
        options = options_class(**settings)
        return lambda h, w, y: function(h, w, y, reduction="sum", options=options)

    return _peer(load)


def _liger(accum_dtype: torch.dtype | None):
    def load():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as f

        return lambda h, w, y: f(h, w, y, reduction="sum", accum_dtype=accum_dtype)

    return _peer(load)


def _cut_cross_entropy(impl: str):
    def load():
        from cut_cross_entropy import linear_cross_entropy as f  # type: ignore[import-not-found]

        return lambda h, w, y: f(h, w, y, reduction="sum", impl=impl)

    return _peer(load)


def _quack(**settings: bool):
    def load():
        from quack.linear_cross_entropy import (  # type: ignore[import-not-found]
            chunked_linear_cross_entropy as f,
        )

        return lambda h, w, y: f(h, w, y, reduction="sum", **settings)

    return _peer(load)


FLOOR, OURS = "three_matmuls", "ours"


def all_variants() -> list[Variant]:
    """The floor, ours, torch's, then the packages, those likeliest to end the process last."""
    return [
        Variant(name=FLOOR, make=_three_matmuls, has_own_buffers=True, note="the floor"),
        Variant(name=OURS, make=_ours(), is_ours=True, note="as training calls it"),
        *(
            Variant(name=f"ours:{form}", make=_ours(softmax=form), is_ours=True)
            for form in get_args(Form)
        ),
        *(
            Variant(
                name=f"ours:chunks={num_chunks}",
                make=_ours_in_chunks(num_chunks),
                is_ours=True,
                note="memory against time",
            )
            for num_chunks in (1, 4, 16)
        ),
        Variant(
            name="ours:grad_weight",
            make=_ours(into_grad_weight=True),
            is_ours=True,
            note="added to an fp32 buffer made beforehand",
        ),
        Variant(
            name="ours:filter",
            make=_ours(filter_gradients=True),
            is_ours=True,
            is_exact=False,
            note="approximate",
        ),
        Variant(name="torch", make=_plain_torch, note="full logits, fp32 cross_entropy, autograd"),
        Variant(name="torch:options", make=_torch_options()),
        Variant(name="torch:accurate", make=_torch_options(acc_policy="accurate")),
        Variant(name="liger", make=_liger(None)),
        Variant(name="liger:fp32", make=_liger(torch.float32)),
        Variant(name="cce", make=_cut_cross_entropy("cce"), is_exact=False, note="approximate"),
        Variant(name="cce:exact", make=_cut_cross_entropy("cce_exact")),
        Variant(name="quack", make=_quack()),
        Variant(name="quack:base", make=_quack(use_scaled_exp=False, tuned=False), note="untuned"),
    ]


def chosen(variants: Sequence[Variant], patterns: Sequence[str]) -> list[Variant]:
    """Those whose names match, and the floor, which the others are measured against.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(variant.name, pattern) for variant in variants):
            raise ValueError(
                f"--variants {pattern}: no variant is called so; there are "
                f"{', '.join(variant.name for variant in variants)}, and * stands for anything"
            )
    return [
        variant
        for variant in variants
        if variant.name == FLOOR or any(fnmatchcase(variant.name, p) for p in patterns)
    ]
