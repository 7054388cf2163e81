"""vLLM, which samples our checkpoints, computes what we trained: the check of an export."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longcot.data.batch import pack_documents, prompt_mask
from longcot.data.model_files import model_config
from longcot.trainer import weights
from longcot.trainer.families import decoder_config
from longcot.trainer.model import Decoder

WORKER = Path(__file__).with_name("vllm_worker.py")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# What two bf16 computations differ by grows with the spread of the logits: measured 0.016 at a
# standard deviation of 0.45 (weights twice the initial ones), 0.047 at 0.95 (four times).
SCALE = {torch.float32: 4.0, torch.bfloat16: 2.0}


def ours(folder: Path, prompts: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Log-probabilities of a directory by our own model, packed, matmuls in `dtype`."""
    model = Decoder(decoder_config(model_config(folder)), "sdpa")
    weights.load(model, folder)
    model.to(dtype)
    batch = pack_documents(
        [np.array(prompt) for prompt in prompts],
        [prompt_mask(len(prompt), 1) for prompt in prompts],
    )
    logprobs = model.logits(batch).float().log_softmax(-1)
    chosen = logprobs.gather(1, batch.targets.clamp(min=0)[:, None]).squeeze(1)
    lengths = [len(prompt) for prompt in prompts]
    return [document[:-1] for document in chosen.split(lengths)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_vllm_parity_of_every_family(dtype, every_raw, build, export, tmp_path):
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 320, length).tolist() for length in (5, 40, 120)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    folders = {
        name: export(build(raw, SCALE[dtype]), raw, tmp_path / name, dtype)
        for name, raw in every_raw.items()
    }
    command = [sys.executable, str(WORKER), str(tmp_path / "prompts.json")]
    done = subprocess.run([*command, *map(str, folders.values())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    differences = {}
    for name, folder in folders.items():
        pairs = zip(found[str(folder)], ours(folder, prompts, dtype), strict=True)
        differences[name] = max((torch.tensor(a) - b).abs().max().item() for a, b in pairs)
    assert max(differences.values()) < TOLERANCE[dtype], differences
