"""Processes, devices and sharding: the same code with NCCL on GPUs and gloo on CPUs.

FSDP2 shards each block, the embedding and the head apart, so that no more than one block's weights
are gathered at a time and the two large matrices are reduced on their own.
"""

import atexit
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from .model import Decoder


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process's place among all of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    def describe(self) -> str:
        """`2 x NVIDIA H200`, or `2 x CPU (2 cores)`."""
        if self.device.type == "cuda":
            return f"{self.size} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.size} x CPU ({os.cpu_count()} cores)"


def start_world() -> World:
    """Join the processes that torchrun started, or be the only one.

    Raises:
        ValueError: more processes on this machine than it has GPUs, or the port to meet on cannot
            be used.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    num_gpus = torch.cuda.device_count()
    if num_gpus and local_rank >= num_gpus:
        raise ValueError(
            f"process {local_rank} of this machine has no GPU, there are {num_gpus}: lower "
            "--nproc-per-node"
        )
    device = torch.device("cuda", local_rank) if num_gpus else torch.device("cpu")
    if num_gpus:
        torch.cuda.set_device(device)
    backend = "nccl" if num_gpus else "gloo"
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend)
        except dist.DistNetworkError as error:
            meeting_point = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(
                f"the processes cannot meet at {meeting_point} ({str(error).splitlines()[0]}): "
                "start with torchrun --standalone, which finds a free port, or give another "
                "--master-port"
            ) from error
    else:  # without torchrun: no port, no other process
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return World(rank=rank, size=size, device=device, mesh=init_device_mesh(device.type, (size,)))


def shard(model: Decoder, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard `model` in place, its weights in their own dtype: `dtype` matmuls, fp32 reduction."""
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    inner = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner)
    # What the head reads is gathered once: the forward pass needs it last and the backward pass
    # first.
    fully_shard(
        model.embedding, mesh=mesh, mp_policy=inner, reshard_after_forward=model.head is not None
    )
    if model.head is not None:
        fully_shard(model.head, mesh=mesh, mp_policy=inner, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert isinstance(model, FSDPModule)


def leave_world(code: int) -> NoReturn:
    """End this process: exit handlers run and output is flushed, but Python is not finalized.

    gloo's threads outlive their process group (torch 2.13), and one that frees a tensor while the
    interpreter is being finalized aborts the process: seen in one of 25 runs with two ranks.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
