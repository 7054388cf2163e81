"""Run by torchrun from test_step.py: gradients of one step under FSDP2, gathered and saved by rank
0.

step_worker.py OUT PACKING TIE    PACKING: packed (many documents a pack) or single (one document a
pack)
"""

import sys
from pathlib import Path

import numpy as np
import torch

from longcot.data.batch import pack_documents, prompt_mask
from longcot.data.packing import CostModel, plan_step
from longcot.trainer import weights
from longcot.trainer.loop import train_step
from longcot.trainer.model import Decoder, DecoderConfig
from longcot.trainer.parallel import leave_world, shard, start_world

SHAPE = DecoderConfig(
    vocab_size=131, hidden_size=40, intermediate_size=72, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=10,
    max_position_embeddings=256, tie_embeddings=sys.argv[3] == "tied",
)  # fmt: skip


class KeepGradients(torch.optim.SGD):
    """Does not step: the test compares what the optimizer would have been given."""

    def step(self, closure=None):
        self.gradients = [
            group_parameter.grad.full_tensor().clone()
            for group in self.param_groups
            for group_parameter in group["params"]
        ]


def main(out: Path, packing: str) -> None:
    world = start_world()
    model = Decoder(SHAPE, "sdpa")
    names = [name for name, _ in model.named_parameters()]
    shard(model, world.mesh, torch.float32)
    weights.initialize(model, 7)
    generator = np.random.default_rng(0)
    lengths = np.array([3, 60, 17, 120, 41, 8, 77, 30])
    documents = [generator.integers(0, 131, length) for length in lengths]
    prompts = [1, 50, 4, 2, 30, 7, 11, 3]  # target counts differ by a hundredfold
    plan = plan_step(
        0,
        lengths=lengths,
        num_targets=lengths - prompts,
        sequences_per_step=8,
        tokens_per_pack=200,
        world_size=world.size,
        cost=CostModel(linear=1.0, quadratic=0.0),
        seed=None,
    )
    packs = plan.packs[world.rank]
    if packing == "single":
        packs = tuple((i,) for i in range(world.rank, len(lengths), world.size))
    batches = [
        pack_documents(
            [documents[i] for i in pack], [prompt_mask(lengths[i], prompts[i]) for i in pack]
        )
        for pack in packs
    ]
    optimizer = KeepGradients(model.parameters(), lr=1.0)
    loss, norm = train_step(
        model,
        optimizer,
        batches,
        num_targets=plan.num_targets,
        max_gradient_norm=1e9,
        device=world.device,
    )
    if world.rank == 0:
        gradients = dict(zip(names, optimizer.gradients, strict=True))
        torch.save(
            {"loss": loss, "norm": norm, "micro_steps": len(batches), "gradients": gradients}, out
        )
    leave_world(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
