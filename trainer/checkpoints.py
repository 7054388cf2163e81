"""Checkpoints, whole or absent: written beside, synced, marked complete with sizes, renamed.

checkpoints/step-000080/model/         a Hugging Face directory
checkpoints/step-000080/complete.json  {"step": 80, "files": {"model/config.json": bytes, ...}}
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..data.files import PARTIAL_SUFFIX, finish_directory, write_json_atomic
from . import weights
from .model import Decoder


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Where the model after optimizer step `step` lives."""
    return run_folder / "checkpoints" / f"step-{step:06d}"


def save_model(
    model: Decoder,
    run_folder: Path,
    step: int,
    *,
    raw_config: dict[str, Any],
    tokenizer_path: Path,
    dtype: torch.dtype,
) -> None:
    """Export the model after optimizer step `step`. A collective: every rank writes its part.

    Raises:
        OSError: the disk is full or read-only; nothing half-written stays behind under the final
            name.
    """
    is_first = dist.get_rank() == 0
    final = checkpoint_folder(run_folder, step)
    partial = final.with_name(f".{final.name}{PARTIAL_SUFFIX}")
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        weights.export(
            model,
            partial / "model",
            raw_config=raw_config,
            tokenizer_path=tokenizer_path,
            dtype=dtype,
        )
        if is_first:
            files = {
                str(file.relative_to(partial)): file.stat().st_size
                for file in sorted(partial.rglob("*"))
                if file.is_file()
            }
            write_json_atomic(partial / "complete.json", {"step": step, "files": files})
            finish_directory(partial, final)
    except BaseException:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    dist.barrier()  # no rank runs ahead of a checkpoint that the others believe written
