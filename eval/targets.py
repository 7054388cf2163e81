"""What is evaluated: the checkpoints of a run directory, or one model directory.

A checkpoint counts only with its marker `complete.json`, which is written last: one without it was
cut short while being written, and is named and left alone.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.model_files import TOKENIZER_FILES, model_config, tensor_shapes

CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")
_BLOCK_BYTES = 1 << 16
_NUM_BLOCKS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A model to sample from, and the folder for its results."""

    label: str
    step: int | None
    """Optimizer steps taken; None for a model that is no checkpoint of a run."""
    model: Path
    results: Path
    """Holds one folder per task."""


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory rather than a model directory."""
    return (path / "checkpoints").is_dir()


def model_target(model: Path, out: Path) -> Target:
    """A model directory as a target, its results under `out`."""
    return Target(label=model.name, step=None, model=model, results=out)


def run_targets(run: Path, steps: list[int] | None) -> tuple[list[Target], list[str]]:
    """The complete checkpoints of a run in step order, and the names of incomplete ones.

    Args:
        run: a run directory.
        steps: those wanted; None: all.

    Raises:
        ValueError: a wanted step is missing or incomplete, or nothing is complete.
    """
    complete: dict[int, Target] = {}
    incomplete: dict[int, str] = {}
    for folder in sorted((run / "checkpoints").iterdir()):
        match = CHECKPOINT_NAME.fullmatch(folder.name)
        if match is None or not folder.is_dir():
            continue
        step = int(match[1])
        if not (folder / "complete.json").exists():
            incomplete[step] = folder.name
            continue
        complete[step] = Target(
            label=f"step {step}",
            step=step,
            model=folder / "model",
            results=run / "eval" / folder.name,
        )
    for step in steps or []:
        if step in incomplete:
            raise ValueError(
                f"{run}/checkpoints/{incomplete[step]} is incomplete (it has no complete.json): "
                "it was cut short while being written; resume the training, or leave it out"
            )
        if step not in complete:
            known = ", ".join(str(known) for known in sorted(complete)) or "none"
            raise ValueError(f"{run} has no checkpoint of step {step}; complete are: {known}")
    if not complete:
        cut = f" (incomplete: {', '.join(incomplete.values())})" if incomplete else ""
        raise ValueError(f"{run} has no complete checkpoint yet{cut}; train first")
    wanted = sorted(set(complete if steps is None else steps))
    return [complete[step] for step in wanted], [incomplete[step] for step in sorted(incomplete)]


def read_json(path: Path) -> Any:
    """A JSON file's value, None where there is no such file.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove or repair it") from error


def problems_of(run: Path, manifest: dict[str, Any]) -> Path:
    """The held-out problems of the data set a run was trained on.

    Raises:
        ValueError: the run does not say, or the data set is gone or incomplete.
    """
    try:
        data = Path(manifest["config"]["data"]["path"])
    except (KeyError, TypeError):
        raise ValueError(
            f"{run}/manifest.json does not name its data (config.data.path): give --problems PATH"
        ) from None
    if not (data / "manifest.json").exists():
        raise ValueError(
            f"{data}, the data of {run}, is missing or incomplete (no manifest.json): build it "
            "again, or give --problems PATH"
        )
    return data / "heldout.jsonl"


def num_parameters(model: Path) -> int:
    """Parameters of a model, a tied head counted once."""
    return sum(math.prod(shape) for _, shape in tensor_shapes(model).values())


def fingerprint(model: Path) -> str:
    """A checksum of a model directory: equal for a copy, different after any training step.

    Of the weights it reads sizes and blocks spread evenly over each file, 4 MiB per file, so that
    it takes no longer for a large model than for a small one.

    Raises:
        ValueError: the directory is not a whole model.
    """
    model_config(model)
    tensor_shapes(model)
    digest = hashlib.sha256()
    for name in ("config.json", *TOKENIZER_FILES):
        content = (model / name).read_bytes() if (model / name).exists() else b""
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    for path in sorted(model.glob("*.safetensors")):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name}\0{num_bytes}\0".encode())
        last = max(0, num_bytes - _BLOCK_BYTES)
        with path.open("rb") as file:
            for block in range(_NUM_BLOCKS):
                file.seek(last * block // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
