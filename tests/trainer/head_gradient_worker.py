"""Run by torchrun from test_head_gradient.py: what FSDP2 hands the optimizer for the head, in bf16.

head_gradient_worker.py OUT TIE

Two micro-steps. The head's gradient under FSDP2 is saved beside two others, gathered from the same
hidden states and the same embedding gradients: summed in fp32 throughout, as it should be, and with
each micro-step's rounded to bf16, as autograd would.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from longcot.data.batch import pack_documents, prompt_mask
from longcot.kernels.linear_cross_entropy import linear_cross_entropy
from longcot.trainer import weights
from longcot.trainer.model import Decoder, DecoderConfig
from longcot.trainer.parallel import leave_world, shard, start_world

IS_TIED = sys.argv[2] == "tied"
SHAPE = DecoderConfig(
    vocab_size=131, hidden_size=40, intermediate_size=72, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=10, max_position_embeddings=256, tie_embeddings=IS_TIED,
)  # fmt: skip
SCALE = 0.37


def main(out: Path) -> None:
    world = start_world()
    model = Decoder(SHAPE, "sdpa")
    shard(model, world.mesh, torch.bfloat16)
    weights.initialize(model, 7)
    generator = np.random.default_rng(world.rank)
    batches = [
        pack_documents(
            [generator.integers(0, 131, length) for length in lengths],
            [prompt_mask(length, prompt) for length, prompt in zip(lengths, (1, 4), strict=True)],
        )
        for lengths in ((30, 47), (61, 9))
    ]
    head_weight = model.embedding.weight if model.head is None else model.head.weight
    assert isinstance(head_weight, DTensor)
    rounded = head_weight.full_tensor().bfloat16()
    hidden_states: list[torch.Tensor] = []
    embedded: list[torch.Tensor] = []

    def keep_hidden(module, inputs, output):
        hidden_states.append(output.detach().bfloat16())

    def keep_embedding_gradient(module, inputs, output):
        output.register_hook(embedded.append)

    model.norm.register_forward_hook(keep_hidden)
    model.embedding.register_forward_hook(keep_embedding_gradient)
    exact, by_autograd = torch.zeros(2, *rounded.shape)
    for micro_step, batch in enumerate(batches):
        model.set_requires_gradient_sync(micro_step == 1)  # type: ignore[operator]
        model(batch, SCALE).backward()
        alone = torch.zeros(rounded.shape)
        row_weights = torch.full(batch.targets.shape, SCALE)
        linear_cross_entropy(
            hidden_states[-1], rounded.detach().requires_grad_(), batch.targets, row_weights,
            grad_weight=alone,
        )  # fmt: skip
        rest = torch.zeros_like(alone)
        if IS_TIED:
            rest = torch.ops.aten.embedding_dense_backward(
                embedded[-1], batch.input_ids, len(rounded), -1, False
            ).float()
        exact += alone + rest
        by_autograd += alone.bfloat16() + rest
    for expected in (exact, by_autograd):
        dist.all_reduce(expected)
        expected /= world.size
    gradient = head_weight.grad
    assert isinstance(gradient, DTensor)
    gathered = gradient.full_tensor()
    if world.rank == 0:
        torch.save({"fsdp": gathered, "exact": exact, "by_autograd": by_autograd}, out)
    leave_world(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
