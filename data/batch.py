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
    prompt_lengths: Sequence[int],
) -> PackedBatch:
    """Lay whole documents one behind the other; targets are the tokens behind each prompt.

    No target crosses a document's end: its last token predicts nothing.

    Raises:
        ValueError: no documents, or one whose prompt leaves no target.
    """
    if not documents:
        raise ValueError("a pack needs at least one document")
    lengths = np.array([len(document) for document in documents])
    prompts = np.array(prompt_lengths)
    if (prompts < 1).any() or (prompts >= lengths).any():
        bad = int(np.argmax((prompts < 1) | (prompts >= lengths)))
        raise ValueError(
            f"document {bad} has {lengths[bad]} tokens and a prompt of {prompts[bad]}: nothing to "
            "learn"
        )
    ends = lengths.cumsum()
    starts = ends - lengths
    input_ids = np.concatenate(documents).astype(np.int64)
    positions = np.arange(ends[-1]) - starts.repeat(lengths)
    targets = np.append(input_ids[1:], IGNORE_INDEX)
    # Token p predicts token p + 1, so the first to predict a response token is the prompt's last.
    predicts = (positions >= (prompts - 1).repeat(lengths)) & (
        positions < (lengths - 1).repeat(lengths)
    )
    targets[~predicts] = IGNORE_INDEX
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(np.append(0, ends).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        num_targets=int((lengths - prompts).sum()),
        weights=None,
    )
