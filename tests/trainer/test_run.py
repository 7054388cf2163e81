"""Whole runs by real processes: the same twice, trusted only when whole, and bad input in one
sentence.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "trainer" / "main.py")


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "countdown"
    command = [sys.executable, "-m", "longcot.data", "countdown", "--out", str(path)]
    subprocess.run([*command, "--num-train", "400", "--num-heldout", "10"], check=True)
    return path


def start(data_path, folder, *flags, ranks: int | None = 2, limit_kilobytes: int | None = None):
    """`demo-smoke` under torchrun, or as one plain process where `ranks` is None."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks else []), SCRIPT, "demo-smoke"]
    command += ["--data.path", str(data_path), "--run.folder", str(folder), *map(str, flags)]
    if limit_kilobytes:  # a full disk, as far as a process can tell
        command = ["bash", "-c", f'ulimit -f {limit_kilobytes}; exec "$@"', "bash", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder.parent
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(data_path, tmp_path_factory):
    """A finished 2-rank run."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = start(data_path, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_identical_runs_have_identical_losses_and_checkpoints(data_path, finished):
    second = finished.parent / "second"
    done = start(data_path, second)
    assert done.returncode == 0, done.stderr
    for first_row, second_row in zip(rows(finished), rows(second), strict=True):
        for field in ("step", "loss", "grad_norm", "learning_rate", "tokens", "target_tokens"):
            assert first_row[field] == second_row[field]
    for step in (0, 6, 12):
        name = f"checkpoints/step-{step:06d}/model/model.safetensors"
        assert (finished / name).read_bytes() == (second / name).read_bytes()


def test_one_plain_process_follows_the_same_losses(data_path, finished):
    alone = finished.parent / "alone"
    done = start(data_path, alone, ranks=None)
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in rows(folder)] for folder in (finished, alone)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_bfloat16_matmuls_follow_the_float32_losses_within_their_rounding(data_path, finished):
    folder = finished.parent / "bfloat16"
    done = start(data_path, folder, "--model.dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in rows(f)] for f in (finished, folder)]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("precision", ["bf16_stochastic", "paper"])
def test_weights_in_bfloat16_follow_the_losses_of_fp32_masters(precision, data_path, finished):
    folder = finished.parent / precision
    flags = ("--model.dtype", "bfloat16", "--optimizer.precision", precision)
    done = start(data_path, folder, *flags)
    assert done.returncode == 0, done.stderr
    assert f"optimizer {precision}" in done.stdout
    losses = [[row["loss"] for row in rows(f)] for f in (finished, folder)]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_recomputing_and_offloading_change_no_loss(data_path, finished):
    for activations in ("selective", "offload"):
        folder = finished.parent / activations
        done = start(data_path, folder, "--model.activations", activations)
        assert done.returncode == 0, done.stderr
        for ours, theirs in zip(rows(folder), rows(finished), strict=True):
            assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])


def test_a_run_directory_tells_what_ran(data_path, finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["recipe"] == "demo-smoke" and manifest["device"].startswith("2 x CPU")
    assert manifest["config"]["data"]["path"] == str(data_path)
    assert manifest["data"] == json.loads((data_path / "manifest.json").read_text())["sha256"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert [row["step"] for row in rows(finished)] == list(range(1, 13))
    assert rows(finished)[-1]["loss"] < rows(finished)[0]["loss"]
    for step in (0, 6, 12):
        checkpoint = finished / "checkpoints" / f"step-{step:06d}"
        marker = json.loads((checkpoint / "complete.json").read_text())
        sizes = {name: (checkpoint / name).stat().st_size for name in marker["files"]}
        assert marker == {"step": step, "files": sizes}
    tensors = load_file(finished / "checkpoints/step-000012/model/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_base_is_fine_tuned_from_its_directory(data_path, finished):
    base = finished / "checkpoints/step-000012/model"
    folder = finished.parent / "tuned"
    done = start(data_path, folder, "--model.path", base, "--optimizer.learning-rate", 1e-4)
    assert done.returncode == 0, done.stderr
    assert str(base) in done.stdout and "is padded" in done.stdout
    # It goes on from the base, not from random weights, and saves what it was given at step 0.
    assert rows(folder)[0]["loss"] < rows(finished)[0]["loss"] - 0.5
    given = load_file(base / "model.safetensors")
    kept = load_file(folder / "checkpoints/step-000000/model/model.safetensors")
    assert all(torch.equal(given[name], kept[name]) for name in given)


def test_a_base_that_cannot_be_trained_is_refused_before_anything_is_made(
    data_path, finished, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(finished / "checkpoints/step-000012/model", base)
    config = json.loads((base / "config.json").read_text())
    for change, named in [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"num_experts": 8}, "num_experts"),
        ({"eos_token_id": 3}, "end-of-sequence"),
    ]:
        (base / "config.json").write_text(json.dumps(config | change))
        done = start(data_path, tmp_path / "run", "--model.path", base, ranks=None)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert named in done.stderr
        assert not (tmp_path / "run").exists()
    missing = start(data_path, tmp_path / "run", "--model.path", tmp_path / "no", ranks=None)
    assert missing.returncode == 1 and f"{tmp_path}/no" in missing.stderr


def test_a_finished_run_is_kept_and_other_settings_never_overwrite_it(data_path, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    again = start(data_path, finished, ranks=None)
    assert again.returncode == 0 and "kept" in again.stdout
    other = start(data_path, finished, "--optimizer.learning-rate", "1e-4", ranks=None)
    assert other.returncode == 1
    assert "optimizer.learning_rate: 0.002 there, 0.0001 now" in other.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_an_interrupted_run_starts_afresh(data_path, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "finished.json").unlink()
    (folder / "checkpoints" / "step-000012").rename(folder / "checkpoints" / ".step-000012.partial")
    (folder / "metrics.jsonl").write_text('{"step": 1, "lo')
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["run"]["folder"] = str(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = start(data_path, folder, ranks=None)
    assert done.returncode == 0 and "interrupted" in done.stdout
    assert [row["step"] for row in rows(folder)] == list(range(1, 13))
    found = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert found == ["step-000000", "step-000006", "step-000012"]


def test_a_full_disk_ends_the_run_in_one_sentence_and_leaves_no_half_checkpoint(
    data_path, tmp_path
):
    folder = tmp_path / "run"
    done = start(data_path, folder, limit_kilobytes=1024)  # tokens fit, 2.8 MB of weights do not
    assert done.returncode != 0
    said = re.split(r"^[WE]\d{4} ", done.stderr, flags=re.MULTILINE)[0]  # torchrun follows
    assert "Traceback" not in said
    assert "rank 0: [Errno 27] File too large" in said and "model.safetensors" in said
    assert "free some space" in said
    assert list((folder / "checkpoints").iterdir()) == []
    assert not (folder / "finished.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([], 2, "Recipes: demo"),
        (["--help"], 0, "Recipes: demo"),
        (["demos"], 2, "no recipe 'demos': choose one of demo,"),
        (["demo", "--run.steps", "5"], 2, "run.steps"),
        (["demo", "--run.num-steps", "five"], 2, "num-steps"),
        (["demo", "--run.num-steps", "0"], 2, "run.num_steps is 0"),
        (["demo", "--run.num-steps", "5"], 2, "run.checkpoint_steps names"),
        (["demo", "--optimizer.learning-rate", "0"], 2, "optimizer.learning_rate is 0"),
        (["demo", "--optimizer.warmup-ratio", "1.5"], 2, "optimizer.warmup_ratio is 1.5"),
        (["demo", "--data.path", "/nowhere"], 1, "/nowhere does not exist"),
        (["demo-smoke", "--data.sequences-per-step", "0"], 2, "sequences_per_step is 0"),
    ],
)
def test_bad_usage_is_one_sentence(arguments, code, named, tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    assert named in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "is not finished"),
        (lambda folder: (folder / "train.jsonl").unlink(), "train.jsonl is missing"),
        (
            lambda folder: os.truncate(folder / "train.jsonl", 5000),
            "train.jsonl is not the file that was built",
        ),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
    ],
)
def test_half_a_dataset_is_refused_with_the_remedy(damage, named, data_path, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data_path, copy)
    damage(copy)
    done = start(copy, tmp_path / "run", ranks=None)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert named in done.stderr and "python -m longcot.data" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_named_with_the_remedy(data_path, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = os.environ | {
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, SCRIPT, "demo-smoke", "--data.path", str(data_path)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(port) in done.stderr and "--standalone" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_fit_are_dropped_and_listed(data_path, tmp_path):
    folder = tmp_path / "run"
    done = start(data_path, folder, "--data.tokens-per-pack", 256, ranks=None)
    assert done.returncode == 0, done.stderr
    lines = (folder / "tokenized" / "ledger.jsonl").read_text().splitlines()
    ledger = [json.loads(line) for line in lines]
    assert ledger and all(
        row["tokens"] > 256 and "longer than 256" in row["reason"] for row in ledger
    )
    assert f"{len(ledger)} rows dropped" in done.stdout and ledger[0]["id"] in done.stdout


def test_rows_of_other_columns_are_trained_on_and_too_few_are_refused(data_path, tmp_path):
    """The paper's columns in Parquet, weights included; a step takes no row twice."""
    lines = (data_path / "train.jsonl").read_text().splitlines()[:20]
    examples = [
        {"message": row["messages"], "response": row["response"], "advantage": 0.5}
        for row in map(json.loads, lines)
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(examples), path)
    flags = ["--data.tokenizer", data_path / "tokenizer", "--run.num-steps", 1,
             "--run.checkpoint-steps", 1, "--data.tokenized", tmp_path / "shared"]  # fmt: skip
    done = start(path, tmp_path / "few", *flags, "--data.sequences-per-step", 21, ranks=2)
    assert done.returncode == 1
    assert "the data has 20 usable rows, data.sequences_per_step is 21" in done.stderr
    steps = ["--data.sequences-per-step", 20]
    done = start(path, tmp_path / "half", *flags, *steps, ranks=2)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row | {"advantage": 1.0} for row in examples]), whole
    )
    done = start(whole, tmp_path / "whole", *flags[:-2], *steps, ranks=1)
    assert done.returncode == 0, done.stderr
    half, full = (rows(tmp_path / name)[0]["loss"] for name in ("half", "whole"))
    assert half == pytest.approx(full / 2, rel=1e-5)
