"""Loading a checkpoint into shards: peak memory of each rank, and its rate against the disk's own.

A bf16 checkpoint of the size asked for is made in a temporary folder, of Qwen3's architecture. Each
rank then loads its shard of fp32 masters; what its resident memory rises to above the shard must be
small. The rate is compared with a plain sequential read of the same files in the same run, both
with the files dropped from the page cache first. Correctness comes first: what was loaded is
exported by all ranks and compared byte by byte.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .timing import commit

NUM_ROUNDS = 3


def measure(num_ranks: int, checkpoint_gb: float) -> dict[str, Any]:
    """Run the whole benchmark; the figures of the worst rank, medians over the rounds.

    Raises:
        RuntimeError: a process failed, or the round trip is not byte-identical.
        OSError: the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="longcot-weights-") as scratch:
        folder = Path(scratch)
        num_bytes = make_checkpoint(folder / "model", checkpoint_gb)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(num_ranks), "--module", "longcot.benchmarks.weights"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, scratch], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"a rank failed: {done.stderr.strip().splitlines()[0]}")
        compare(folder / "model", folder / "again")
        ranks = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(num_ranks)]
    load_seconds = [max(rank["load_seconds"][i] for rank in ranks) for i in range(NUM_ROUNDS)]
    read_seconds = ranks[0]["read_seconds"]
    fractions = [read / load for read, load in zip(read_seconds, load_seconds, strict=True)]
    return {
        "checkpoint_bytes": num_bytes,
        "num_ranks": num_ranks,
        "own_shard_bytes": max(rank["own_shard_bytes"] for rank in ranks),
        "peak_rise_bytes": max(rank["peak_rise_bytes"] for rank in ranks),
        "peak_extra_bytes": max(
            rank["peak_rise_bytes"] - rank["own_shard_bytes"] for rank in ranks
        ),
        "load_seconds": load_seconds,
        "plain_read_seconds": read_seconds,
        "read_gb_per_second": round(num_bytes / statistics.median(read_seconds) / 1e9, 3),
        "load_gb_per_second": round(num_bytes / statistics.median(load_seconds) / 1e9, 3),
        "read_fraction_of_disk": round(statistics.median(fractions), 3),
        "device": f"CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": ranks[0]["torch"]},
        "commit": commit(),
    }


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Random bf16 weights in the published layout, written by the library; returns the bytes."""
    import torch
    from safetensors.torch import save_file

    from ..data.tokenizer import save_tokenizer, train_tokenizer
    from ..trainer import weights
    from ..trainer.families import decoder_config, qwen3_config
    from ..trainer.model import Decoder

    layer = {"hidden_size": 2048, "intermediate_size": 6144, "num_heads": 16, "num_kv_heads": 8}
    raw = qwen3_config(
        vocab_size=32768,
        head_dim=128,
        # 2 bytes each of the embedding, the head, and some 50 million weights a layer
        num_layers=max(1, round((gigabytes * 1e9 / 2 - 2 * 32768 * 2048) / 50.3e6)),
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_embeddings=False,
        eos_token_id=0,
        **layer,
    )
    with torch.device("meta"):
        model = Decoder(decoder_config(raw), "sdpa")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_tokenizer(train_tokenizer(["Numbers: 3 5 7"]), folder)
    tensors = {
        name: torch.randn(shape, dtype=torch.float32).to(torch.bfloat16)
        for name, shape in weights.expected_shapes(model).items()
    }
    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    files = {f"model-{i + 1:05d}-of-00002.safetensors": half for i, half in enumerate(halves)}
    for file, half in files.items():
        save_file({name: tensors[name] for name in half}, folder / file)
    weight_map = {name: file for file, half in files.items() for name in half}
    (folder / weights.INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.nbytes for tensor in tensors.values())


def compare(first: Path, second: Path) -> None:
    """Every tensor of both directories, byte by byte, one at a time.

    Raises:
        RuntimeError: naming the first that differs.
    """
    import torch
    from safetensors import safe_open

    from ..trainer import weights

    places = [weights.stored_tensors(folder) for folder in (first, second)]
    if places[0].keys() != places[1].keys():
        raise RuntimeError("the round trip has other tensors than the checkpoint")
    for name in places[0]:
        tensors = []
        for place in places:
            with safe_open(place[name].file, framework="pt") as file:
                tensors.append(file.get_tensor(name))
        if not torch.equal(tensors[0].view(torch.int16), tensors[1].view(torch.int16)):
            raise RuntimeError(f"{name} is not what it was after loading and exporting")


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget the files, so that reading them reads the disk."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def plain_read_seconds(folder: Path) -> float:
    """One process, one file after the other, large blocks."""
    drop_from_cache(folder)
    block = bytearray(32 * 2**20)
    started = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(block):
                pass
    return time.perf_counter() - started


def memory_bytes(field: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def worker(scratch: Path) -> None:
    """One rank: load in rounds, with plain reads between, then export."""
    import torch
    import torch.distributed as dist

    from ..data.model_files import model_config
    from ..trainer import weights
    from ..trainer.families import decoder_config
    from ..trainer.model import Decoder
    from ..trainer.parallel import leave_world, shard, start_world

    folder = scratch / "model"
    world = start_world()
    raw = model_config(folder)
    with torch.device("meta"):
        model = Decoder(decoder_config(raw), "sdpa")
    shard(model, world.mesh, torch.float32)
    dist.barrier()
    baseline = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    load_seconds, read_seconds = [], []
    for _ in range(NUM_ROUNDS):
        # Memory that was never touched, as in a first load: the kernel's zeroing of it counts.
        model.to_empty(device=torch.device("meta"))
        model.to_empty(device=world.device)
        if world.rank == 0:
            read_seconds.append(plain_read_seconds(folder))
            drop_from_cache(folder)
        dist.barrier()
        started = time.perf_counter()
        weights.load(model, folder)
        load_seconds.append(time.perf_counter() - started)
        dist.barrier()
    figures = {
        "own_shard_bytes": weights.shard_bytes(model),
        "peak_rise_bytes": memory_bytes("VmHWM") - baseline,
        "load_seconds": load_seconds,
        "read_seconds": read_seconds,
        "torch": torch.__version__,
    }
    (scratch / f"rank-{world.rank}.json").write_text(json.dumps(figures))
    weights.export(
        model, scratch / "again", raw_config=raw, tokenizer_path=folder, dtype=torch.bfloat16
    )
    leave_world(0)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
