"""What a block keeps of its forward pass for the backward pass: the rungs below sharding.

    keep        everything: fastest, about 34 D + 6 F values a token and block
    selective   outputs of matmuls and attention; norms, RoPE and SwiGLU are computed again
    recompute   the block's input only, D values a token; all of it is computed again
    offload     nothing: the block's input waits in page-locked host memory

Each gives the same gradients, bit for bit where the kernels are deterministic. The last two keep
the input themselves instead of leaving it to `torch.utils.checkpoint`, whose non-reentrant form
holds it in a closure that saved-tensor hooks, and so the usual offloaders, never see.

Copies run on a stream of their own in each direction. A block's input is needed one block's forward
and backward later, and the next one is fetched while a block works: D values a token have the time
of a whole block's arithmetic, whatever the length of the pack.

T packed tokens, D hidden size, F feed-forward size.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .model import Block, Decoder

Activations = Literal["keep", "selective", "recompute", "offload"]

# Recomputing one of these costs as much as it did; everything else is bound by memory traffic.
_EXPENSIVE_OPS = ("mm", "addmm", "bmm", "linear")
_ATTENTION_WORDS = ("attention", "attn", "flash", "flex")


def keep_activations(model: Decoder, activations: Activations) -> None:
    """Let every block of `model` run so; call it before sharding."""
    inputs = HostInputs() if activations == "offload" else DeviceInputs()
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if activations == "selective":
            block.run = _run_selectively
        elif activations != "keep":
            # The last block's input is wanted back at once: it stays where it is.
            is_last = number == len(model.blocks) - 1
            block.run = functools.partial(_run_again, DeviceInputs() if is_last else inputs, number)


def _run_again(store: Any, number: int, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return compute(*arguments)  # no backward pass will come and take the input
    return _Recomputed.apply(store, number, compute, *arguments)


def _run_selectively(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    def is_kept(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op._schema.name.split("::")[1]
        is_expensive = name in _EXPENSIVE_OPS or any(word in name for word in _ATTENTION_WORDS)
        if is_expensive and "backward" not in name:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    output = checkpoint(
        compute,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing here draws numbers
        context_fn=functools.partial(create_selective_checkpoint_contexts, is_kept),
    )
    assert isinstance(output, Tensor)
    return output


class _Recomputed(torch.autograd.Function):
    """A block that is run twice: its input is kept by `store`, and by nothing else."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, store: Any, number: int, compute: Callable[..., Tensor], x: Tensor, *rest: Any
    ) -> Tensor:
        ctx.store, ctx.number, ctx.compute, ctx.rest = store, number, compute, rest
        store.put(number, x.detach())
        return compute(x, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        x = ctx.store.take(ctx.number).requires_grad_()
        with torch.enable_grad():
            output = ctx.compute(x, *ctx.rest)
        torch.autograd.backward(output, upstream)
        return None, None, None, x.grad, *[None] * len(ctx.rest)


class DeviceInputs:
    """Keeps the inputs of blocks where they are."""

    def __init__(self) -> None:
        self._inputs: dict[int, Tensor] = {}

    def put(self, number: int, x: Tensor) -> None:
        self._inputs[number] = x

    def take(self, number: int) -> Tensor:
        return self._inputs.pop(number)


class HostInputs:
    """Keeps the inputs of blocks in host memory, and fetches each while the block above it works.

    Page-locking is slow, so the host buffers stay for the next pack and grow with the longest.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}  # flat
        self._waiting: dict[int, Tensor] = {}  # host views of what was put and not yet fetched
        self._fetched: dict[int, tuple[Tensor, Any]] = {}  # with the event that ends the copy
        self._events: dict[int, Any] = {}  # the end of each buffer's last copy
        self._streams: tuple[Any, Any] = (None, None)  # outward, inward
        self._device = torch.device("cpu")

    def put(self, number: int, x: Tensor) -> None:
        buffer = self._buffers.get(number)
        if buffer is None or buffer.numel() < x.numel() or buffer.dtype != x.dtype:
            buffer = torch.empty(x.numel(), dtype=x.dtype, pin_memory=x.is_cuda)
            self._buffers[number] = buffer
        host = self._waiting[number] = buffer[: x.numel()].view(x.shape)
        self._device = x.device
        if not x.is_cuda:
            host.copy_(x)
            return
        if self._streams[0] is None:
            self._streams = (torch.cuda.Stream(x.device), torch.cuda.Stream(x.device))
        outward = self._streams[0]
        outward.wait_stream(torch.cuda.current_stream(x.device))  # x must have been computed
        if number in self._events:
            outward.wait_event(self._events[number])  # the last pack's must have been fetched
        with torch.cuda.stream(outward):
            host.copy_(x, non_blocking=True)
            self._events[number] = outward.record_event()
        x.record_stream(outward)  # its memory is not to be given away before it is copied

    def take(self, number: int) -> Tensor:
        x, event = self._fetched.pop(number, None) or self._fetch(number)
        if number - 1 in self._waiting:
            self._fetched[number - 1] = self._fetch(number - 1)
        if event is not None:
            stream = torch.cuda.current_stream(x.device)
            stream.wait_event(event)
            x.record_stream(stream)
        return x

    def _fetch(self, number: int) -> tuple[Tensor, Any]:
        host = self._waiting.pop(number)
        if self._device.type != "cuda":
            return host.clone(), None
        inward = self._streams[1]
        inward.wait_event(self._events[number])
        with torch.cuda.stream(inward):
            x = host.to(self._device, non_blocking=True)
            self._events[number] = inward.record_event()
        return x, self._events[number]
