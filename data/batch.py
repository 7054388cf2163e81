"""A pack of whole documents as flat tensors: what the model is given for one micro-step.

T tokens in the pack, S documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target of a token that has none; the value `torch.nn.functional.cross_entropy` ignores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Documents one behind the other, without padding."""

    input_ids: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, the next token, IGNORE_INDEX where it is not to be learnt
    position_ids: Tensor  # (T,) int64, restarts at 0 with each document
    cu_seqlens: Tensor  # (S + 1,) int32, where each document starts, and T
    max_seqlen: int
    num_targets: int
    weights: Tensor | None  # (T,) fp32, multiplies each token's loss; None: all 1

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on `device`; from pinned memory the copies overlap with the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "PackedBatch":
        """The same batch in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def pack_documents(
    documents: Sequence[np.ndarray],  # token ids of each, prompt and response
    target_masks: Sequence[np.ndarray],  # bool, as long as each: the token is to be learnt
    weights: Sequence[float] | None = None,  # multiplies the loss of each document's tokens
) -> PackedBatch:
    """Lay whole documents one behind the other; token p's target is p + 1 where that is one.

    No target crosses a document's end: its last token predicts nothing, and nothing predicts its
    first.

    Raises:
        ValueError: no documents, an empty one, one without a target, or a mask of another length.
    """
    if not documents:
        raise ValueError("a pack needs at least one document")
    lengths = np.array([len(document) for document in documents])
    mask_lengths = np.array([len(mask) for mask in target_masks])
    if not np.array_equal(lengths, mask_lengths):
        raise ValueError(
            f"documents of {lengths.tolist()} tokens have masks of {mask_lengths.tolist()}: they "
            "must be as long"
        )
    if not lengths.all():
        raise ValueError(f"document {int(lengths.argmin())} has no tokens")
    ends = lengths.cumsum()
    starts = ends - lengths
    is_target = np.concatenate(target_masks).astype(np.bool_)
    is_target[starts] = False  # nothing stands before it to predict it
    num_targets = np.add.reduceat(is_target, starts, dtype=np.int64)
    if not num_targets.all():
        bad = int(num_targets.argmin())
        raise ValueError(
            f"document {bad} has {lengths[bad]} tokens and no target: nothing to learn"
        )
    input_ids = np.concatenate(documents).astype(np.int64)
    targets = np.where(np.append(is_target[1:], False), np.append(input_ids[1:], 0), IGNORE_INDEX)
    token_weights = None
    if weights is not None and any(weight != 1 for weight in weights):
        token_weights = torch.from_numpy(np.array(weights, dtype=np.float32).repeat(lengths))
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(np.arange(ends[-1]) - starts.repeat(lengths)),
        cu_seqlens=torch.from_numpy(np.append(0, ends).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        num_targets=int(num_targets.sum()),
        weights=token_weights,
    )


def prompt_mask(length: int, prompt_length: int) -> np.ndarray:
    """(length,) bool: every token behind a prompt is a target."""
    return np.arange(length) >= prompt_length
