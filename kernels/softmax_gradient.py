"""Softmax cross-entropy of a chunk of logits, and its gradient written over them.

For a row z with target y and weight w, m = max z, e_j = exp(z_j - m), r = sum of e_j over j != y:

    loss = log(r + e_y) - (z_y - m) = log1p(r / e_y)           p_j = e_j / (r + e_y)
    gradient_j = w p_j  (j != y)        gradient_y = w (p_y - 1) = -w r / (r + e_y)

The right-hand forms do not cancel where p_y is near 1, and everything is relative to m, so a common
offset of the logits costs nothing. All arithmetic is fp32; the gradient is rounded once, when it is
stored.

One kernel reads each logit once: a row stays in the registers of a cluster of thread blocks that
reduce across the cluster. Where the row does not fit, or Triton cannot compile the reduction, the
other reads it twice, hoping to find it in the L2 cache the second time.

C rows of a chunk, V vocabulary.
"""

# Triton's own types are known to its compiler only.
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import functools
from typing import Literal, NamedTuple, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch, run

Form = Literal["one_read", "two_reads", "torch"]

CLUSTER_TRITON = (3, 8)
"""First Triton whose reductions span a cluster of thread blocks: 3.6 and 3.7 fail to compile it."""
CLUSTER_CAPABILITIES = ((9, 0), (12, 0))
"""From Hopper on; consumer Blackwell, 12.x, has clusters of one block."""
MAX_COLUMNS_PER_BLOCK = 20480
"""What 8 warps hold in registers without spilling, statistics and all: 80 fp32 values a thread."""
MAX_CLUSTER = 8
"""Largest portable cluster size on sm_90 and sm_100."""


class RowResults(NamedTuple):
    """What the kernel knows of each row; the last two only where asked for."""

    losses: Tensor  # (C,) fp32: minus the log-probability of the target, unweighted
    entropies: Tensor | None  # (C,) fp32, in nats
    correct: Tensor | None  # (C,) bool: no logit is above the target's


def one_read_options(vocab_size: int) -> dict[str, int] | None:
    """Constants and options of the one-read kernel, or None where no cluster holds a row.

    A row is held as two tiles, the largest power of two and one for the rest, because Triton's
    tiles are powers of two and one of 262,144 for 151,936 words would idle three blocks of eight.
    """
    first = 1 << (vocab_size.bit_length() - 1)
    rest = vocab_size - first
    second = triton.next_power_of_2(rest) if rest else 0
    for num_ctas in (1, 2, 4, MAX_CLUSTER):
        if (first + second) // num_ctas <= MAX_COLUMNS_PER_BLOCK:
            # At least 32 values a thread, where the row has as many.
            num_warps = min(8, max(1, first // num_ctas // 1024))
            return {
                "FIRST": first, "SECOND": second, "num_warps": num_warps, "num_ctas": num_ctas
            }  # fmt: skip
    return None


def two_reads_options(vocab_size: int) -> dict[str, int]:
    """Constants and options of the two-read kernel."""
    block = min(8192, triton.next_power_of_2(vocab_size))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def choose_form(requested: str, vocab_size: int, device: torch.device) -> tuple[Form, str]:
    """The form to run, and why; logged at start-up.

    Raises:
        ValueError: an unknown name, or one that cannot run there; nothing falls back in silence.
    """
    names = get_args(Form)
    if requested != "auto" and requested not in names:
        raise ValueError(f"softmax form {requested!r} is unknown; choose auto, {', '.join(names)}")
    if requested == "torch":
        return "torch", "asked for"
    if device.type != "cuda":
        if requested == "auto":
            return "torch", "no CUDA device: plain torch"
        if isinstance(_one_read_kernel, triton.JITFunction):  # else Triton interprets, on the CPU
            raise ValueError(
                f"softmax form {requested!r} is a Triton kernel and needs a CUDA device, not "
                f"{device.type}: choose auto or torch"
            )
    is_cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if is_cuda else CLUSTER_CAPABILITIES[0]
    obstacle = one_read_obstacle(vocab_size, capability)
    if requested == "two_reads":
        return "two_reads", "asked for"
    if not obstacle:
        return "one_read", "a row fits the registers of a cluster of thread blocks"
    if requested == "one_read":
        raise ValueError(
            f"softmax form 'one_read' cannot run: {obstacle}; choose two_reads or auto"
        )
    return "two_reads", obstacle


cached_form = functools.cache(choose_form)
"""For each call's use; the arguments name all that the choice depends on."""


def one_read_obstacle(
    vocab_size: int,
    capability: tuple[int, int],
    triton_version: str = triton.__version__,
) -> str | None:
    """Why the one-read kernel cannot run on a GPU of this compute capability, or None."""
    options = one_read_options(vocab_size)
    if options is None:
        return f"no cluster of {MAX_CLUSTER} thread blocks holds a row of {vocab_size} logits"
    if options["num_ctas"] == 1:
        return None
    if not CLUSTER_CAPABILITIES[0] <= capability < CLUSTER_CAPABILITIES[1]:
        return (
            f"a row of {vocab_size} logits needs a cluster of thread blocks, which compute "
            f"capability {capability[0]}.{capability[1]} has not"
        )
    version = tuple(int(part) for part in triton_version.split(".")[:2])
    if version < CLUSTER_TRITON:
        return f"Triton {triton_version} cannot compile reductions over a cluster, 3.8 can"
    return None


def prove_form(form: Form, vocab_size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Run the form once beside plain torch: compilers differ by version and chip; at start-up.

    Raises:
        ValueError: it is off by more than rounding, so nothing should be trained with it.
    """
    if form == "torch":
        return  # what the others are compared with
    generator = torch.Generator(device).manual_seed(0)
    # More rows than any GPU works on at a time, so that thread blocks and clusters are reused.
    shape = (512, vocab_size)
    logits = torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype)
    targets = torch.arange(shape[0], device=device) * (vocab_size - 1) // (shape[0] - 1)
    weights = torch.rand(shape[0], generator=generator, device=device)
    expected = logits.clone()
    exact = softmax_gradient_reference_(expected, targets, weights)
    found = softmax_gradient_(logits, targets, weights, form)
    loss_error = (found.losses - exact.losses).abs().max()
    gradient_error = (logits.float() - expected.float()).abs().max()
    # The host waits for both. A gradient is at most its weight, which is at most 1: its rounding
    # to the dtype may differ by a unit in the last place.
    if not (loss_error <= 1e-4 and gradient_error <= 2 * torch.finfo(dtype).eps + 1e-6):
        raise ValueError(
            f"softmax form {form!r} is wrong on this device with Triton {triton.__version__}: a "
            f"loss is off by {float(loss_error):.1e}, a gradient by {float(gradient_error):.1e}; "
            "choose another form and report this"
        )


def softmax_gradient_(
    logits: Tensor,  # (C, V), rows contiguous; overwritten by the gradient if `with_gradient`
    targets: Tensor,  # (C,) int64, each in [0, V)
    weights: Tensor,  # (C,) fp32
    form: Form,
    *,
    with_gradient: bool = True,
    with_statistics: bool = False,
) -> RowResults:
    """Losses of the rows; the gradient of their weighted sum replaces the logits."""
    if form == "torch":
        return softmax_gradient_reference_(
            logits,
            targets,
            weights,
            with_gradient=with_gradient,
            with_statistics=with_statistics,
        )
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    entropies = torch.empty_like(losses) if with_statistics else None
    correct = torch.empty_like(losses, dtype=torch.bool) if with_statistics else None
    results = RowResults(losses, entropies, correct)
    if len(logits):
        run(softmax_launch(logits, targets, weights, results, form, with_gradient))
    return results


def softmax_launch(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    results: RowResults,
    form: Form,
    with_gradient: bool,
) -> Launch:
    """What `softmax_gradient_` launches in one of the Triton forms."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    if form == "one_read":
        kernel, options = _one_read_kernel, one_read_options(vocab_size)
        assert options is not None  # `choose_form` has refused it
    else:
        kernel, options = _two_reads_kernel, two_reads_options(vocab_size)
    flags = {
        "WITH_GRADIENT": with_gradient,
        "WITH_STATISTICS": results.entropies is not None,
    }
    arguments = (logits, targets, weights, *results, logits.stride(0), vocab_size)
    return Launch(kernel, (num_rows,), arguments, options | flags)


def softmax_gradient_reference_(
    logits: Tensor,  # (C, V)
    targets: Tensor,  # (C,)
    weights: Tensor,  # (C,)
    *,
    with_gradient: bool = True,
    with_statistics: bool = False,
) -> RowResults:
    """The same in plain torch: the truth in tests, and what runs on a CPU.

    In fp32, or in float64 where the logits are.
    """
    column = targets[:, None]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # In place where the logits are as wide themselves, unless they must stay.
    is_copy = wide is not logits
    maxima = wide.amax(1, keepdim=True)
    shifted = wide.sub_(maxima) if is_copy or with_gradient else wide - maxima
    target_shifted = shifted.gather(1, column)
    exponentials = shifted.exp_()
    exp_target = exponentials.gather(1, column)
    moments = correct = None
    if with_statistics:
        # sum of e_j log e_j, 0 where e_j is; a few rows at a time, to hold no second chunk
        moments = torch.cat([-torch.special.entr(rows).sum(1) for rows in exponentials.split(64)])
        correct = (target_shifted >= 0).squeeze(1)
    rest = exponentials.scatter_(1, column, 0.0).sum(1, keepdim=True)
    total = rest + exp_target
    ratio = rest / exp_target
    losses = torch.where(ratio < 1, ratio.log1p(), total.log() - target_shifted).squeeze(1)
    entropies = None if moments is None else (total.log().squeeze(1) - moments / total.squeeze(1))
    if with_gradient:
        scale = weights[:, None] / total
        exponentials.mul_(scale).scatter_(1, column, -rest * scale)
        if is_copy:
            logits.copy_(exponentials)
    return RowResults(losses, entropies, correct)


@triton.jit
def _log1p(x):
    """log(1 + x) to full precision for small x (Kahan); libdevice is not in the interpreter."""
    one_more = 1.0 + x
    is_lost = one_more == 1.0
    return tl.where(is_lost, x, tl.log(one_more) * (x / tl.where(is_lost, 1.0, one_more - 1.0)))


@triton.jit
def _exponential(shifted):
    return tl.exp2(shifted * 1.4426950408889634)


@triton.jit
def _finish_row(row, target_shifted, exp_target, rest, moment, losses_ptr, entropies_ptr,
                correct_ptr, WITH_STATISTICS: tl.constexpr):  # fmt: skip
    """Store what is one number per row; `moment` is the sum of e_j (z_j - m), target and all."""
    total = rest + exp_target
    # exp_target may underflow to zero; then the ratio is not used.
    ratio = rest / tl.maximum(exp_target, 1e-37)
    log_total = tl.log(total)
    tl.store(losses_ptr + row, tl.where(ratio < 1.0, _log1p(ratio), log_total - target_shifted))
    if WITH_STATISTICS:
        tl.store(entropies_ptr + row, log_total - moment / total)
        tl.store(correct_ptr + row, target_shifted >= 0.0)


@triton.jit
def _one_read_kernel(
    logits_ptr, targets_ptr, weights_ptr, losses_ptr, entropies_ptr, correct_ptr,
    row_stride, V,
    FIRST: tl.constexpr, SECOND: tl.constexpr,
    WITH_GRADIENT: tl.constexpr, WITH_STATISTICS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * row_stride exceeds 32 bits
    target = tl.load(targets_ptr + row)
    logits_ptr += row * row_stride
    columns_1 = tl.arange(0, FIRST)
    z_1 = tl.load(logits_ptr + columns_1).to(tl.float32)
    # Before the reductions: after them another block of the cluster may have overwritten it.
    z_target = tl.load(logits_ptr + target).to(tl.float32)
    maximum = tl.max(z_1, 0)
    if SECOND > 0:
        columns_2 = FIRST + tl.arange(0, SECOND)
        z_2 = tl.load(logits_ptr + columns_2, mask=columns_2 < V, other=float("-inf"))
        z_2 = z_2.to(tl.float32)
        maximum = tl.maximum(maximum, tl.max(z_2, 0))

    e_1 = _exponential(z_1 - maximum)
    rest = tl.sum(tl.where(columns_1 == target, 0.0, e_1), 0)
    if SECOND > 0:
        e_2 = _exponential(z_2 - maximum)
        rest += tl.sum(tl.where(columns_2 == target, 0.0, e_2), 0)
    target_shifted = z_target - maximum
    exp_target = _exponential(target_shifted)
    moment = 0.0
    if WITH_STATISTICS:
        moment = tl.sum(e_1 * tl.where(e_1 > 0.0, z_1 - maximum, 0.0), 0)
        if SECOND > 0:
            moment += tl.sum(e_2 * tl.where(e_2 > 0.0, z_2 - maximum, 0.0), 0)
    _finish_row(row, target_shifted, exp_target, rest, moment, losses_ptr, entropies_ptr,
                correct_ptr, WITH_STATISTICS)  # fmt: skip

    if WITH_GRADIENT:
        scale = tl.load(weights_ptr + row) / (rest + exp_target)
        at_target = -rest * scale
        type_ = logits_ptr.dtype.element_ty
        tl.store(
            logits_ptr + columns_1,
            tl.where(columns_1 == target, at_target, e_1 * scale).to(type_),
        )
        if SECOND > 0:
            tl.store(
                logits_ptr + columns_2,
                tl.where(columns_2 == target, at_target, e_2 * scale).to(type_),
                mask=columns_2 < V,
            )


@triton.jit
def _two_reads_kernel(
    logits_ptr, targets_ptr, weights_ptr, losses_ptr, entropies_ptr, correct_ptr,
    row_stride, V,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr, WITH_STATISTICS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * row_stride exceeds 32 bits
    target = tl.load(targets_ptr + row)
    logits_ptr += row * row_stride
    columns = tl.arange(0, BLOCK)
    z_target = tl.load(logits_ptr + target).to(tl.float32)

    # The sums are kept per lane, relative to the maximum so far; a logit of the row to start with
    # instead of minus infinity leaves no inf - inf.
    maximum = z_target
    rests = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        mask = start + columns < V
        z = tl.load(
            logits_ptr + start + columns,
            mask=mask,
            other=float("-inf"),
            eviction_policy="evict_last",
        ).to(tl.float32)
        new_maximum = tl.maximum(maximum, tl.max(z, 0))
        e = tl.where(start + columns == target, 0.0, _exponential(z - new_maximum))
        rescale = _exponential(maximum - new_maximum)
        if WITH_STATISTICS:
            moments = rescale * (moments + rests * (maximum - new_maximum))
            moments += e * tl.where(e > 0.0, z - new_maximum, 0.0)
        rests = rests * rescale + e
        maximum = new_maximum
    rest = tl.sum(rests, 0)
    target_shifted = z_target - maximum
    exp_target = _exponential(target_shifted)
    moment = 0.0
    if WITH_STATISTICS:
        at_target = exp_target * tl.where(exp_target > 0.0, target_shifted, 0.0)
        moment = tl.sum(moments, 0) + at_target
    _finish_row(row, target_shifted, exp_target, rest, moment, losses_ptr, entropies_ptr,
                correct_ptr, WITH_STATISTICS)  # fmt: skip

    if WITH_GRADIENT:
        scale = tl.load(weights_ptr + row) / (rest + exp_target)
        for start in range(0, V, BLOCK):
            mask = start + columns < V
            z = tl.load(
                logits_ptr + start + columns, mask=mask, other=0.0, eviction_policy="evict_first"
            ).to(tl.float32)
            g = tl.where(
                start + columns == target, -rest * scale, _exponential(z - maximum) * scale
            )
            tl.store(logits_ptr + start + columns, g.to(logits_ptr.dtype.element_ty), mask=mask)
