"""A run explains itself before its first step: config, data, commit, diff, versions, devices.

The manifest also decides what a second start may trust: a finished run with the same settings is
kept, an interrupted one starts afresh, and a run with other settings is never overwritten.
"""

import datetime
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ..data.files import write_json_atomic, write_text_atomic
from .config import Config

PACKAGES = ("longcot", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


def plain_config(config: Config) -> dict[str, Any]:
    """The config as JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


def prepare_run_folder(
    folder: Path, config: Config, data_identity: dict[str, Any]
) -> Literal["new", "finished"]:
    """Make the folder ready for a run from step 0, or find that it holds this very run, finished.

    Raises:
        ValueError: the folder holds a run with other settings or other data.
        OSError: it cannot be written.
    """
    manifest_path = folder / "manifest.json"
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_text())
        found = {"config": manifest["config"], "data": manifest["data"]}
        wanted = {"config": plain_config(config), "data": data_identity}
        differing = _differences(found, wanted)
        if differing:
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(differing)}): choose "
                "another --run.folder, or remove it"
            )
        if (folder / "finished.json").exists():
            return "finished"
        print(
            f"{folder} holds an interrupted run: its checkpoints are removed, training starts "
            "from step 0"
        )
        for name in ("checkpoints", "eval"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return "new"


def write_manifest(
    folder: Path, *, recipe: str, config: Config, data_identity: dict[str, Any], device: str
) -> None:
    """Write `manifest.json`, and `diff.patch` where the code differs from its commit."""
    root = Path(__file__).resolve().parents[1]
    diff = _git(root, "diff", "HEAD")
    if diff:
        write_text_atomic(folder / "diff.patch", diff)
    write_json_atomic(
        folder / "manifest.json",
        {
            "recipe": recipe,
            "command": sys.argv,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device,
            "commit": _git(root, "rev-parse", "HEAD").strip() or None,
            "commit_is_dirty": bool(diff),
            "versions": {"python": platform.python_version(), **_versions()},
            "data": data_identity,
            "config": plain_config(config),
        },
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional on this platform
    return found


def _git(root: Path, *arguments: str) -> str:
    """What git prints; empty where there is no git or no repository: an installed copy has none."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """`field: found -> wanted` for each leaf that differs."""
    lines = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} there, {new} now")
    return lines
