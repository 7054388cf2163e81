"""A run directory as training leaves it, with two tiny random checkpoints and one cut short."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from longcot.data.chat import load_tokenizer
from longcot.data.examples import Example, write_examples
from longcot.data.tokenizer import save_tokenizer, train_tokenizer

PROBLEMS = [([3, 5, 7], 26), ([2, 4, 9], 17), ([6, 4, 5], 29), ([1, 8, 6], 14)]


def build_model(folder: Path, seed: int) -> None:
    save_tokenizer(train_tokenizer(["Numbers: 3 5 7 Target: 26"]), folder)
    tokenizer = load_tokenizer(str(folder))
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)


def build_run(run: Path) -> Path:
    data = run.parent / "countdown"
    data.mkdir(parents=True)
    write_examples(
        data / "heldout.jsonl",
        [
            Example(
                id=f"p{i}",
                messages=[{"role": "user", "content": f"Numbers: {numbers} Target: {target}"}],
                response="",
                answer={"numbers": numbers, "target": target},
                source="test",
            )
            for i, (numbers, target) in enumerate(PROBLEMS)
        ],
    )
    (data / "manifest.json").write_text(json.dumps({"seconds": 1.5}))
    for step in (0, 10):
        checkpoint = run / "checkpoints" / f"step-{step:06d}"
        build_model(checkpoint / "model", seed=step)
        (checkpoint / "complete.json").write_text("{}")
    (run / "checkpoints" / "step-000020" / "model").mkdir(parents=True)
    manifest = {"config": {"data": {"path": str(data)}}, "device": "cpu", "recipe": "<demo>"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    rows = [{"step": step, "loss": 5.0 / step, "seconds": 0.1} for step in range(1, 11)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text + '{"step": 11, "lo')  # training is still writing
    (run / "finished.json").write_text(json.dumps({"seconds": 2.5, "steps": 10}))
    return run


@pytest.fixture(scope="session")
def make_run() -> Callable[[Path], Path]:
    """`build_run`, for fixtures that outlive one test."""
    return build_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A fresh run directory, nothing evaluated."""
    return build_run(tmp_path / "runs" / "demo")
