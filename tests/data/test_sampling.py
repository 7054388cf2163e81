"""The real vLLM engine on a tiny random model: one start for all of this file."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from longcot.data.chat import encode_prompt, load_tokenizer
from longcot.data.model_files import model_signature
from longcot.data.sampling import (
    Completion,
    Engine,
    Request,
    Sampling,
    response_limit,
    sample_seed,
)
from longcot.data.tokenizer import save_tokenizer, train_tokenizer

CONTEXT_TOKENS = 128
GREEDY = Sampling(temperature=0.0, top_p=1.0)
WARM = Sampling(temperature=0.8, top_p=0.95)


def build_model(folder: Path, seed: int, context_tokens: int = CONTEXT_TOKENS) -> Path:
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
        max_position_embeddings=context_tokens,
        tie_word_embeddings=True,
        initializer_range=0.2,  # logits far enough apart that rounding does not choose the token
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [build_model(folder / f"seed-{seed}", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def engine(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log_path = tmp_path_factory.mktemp("engine") / "vllm.log"
    with Engine(models[0], log_path=log_path) as engine:
        yield engine
    assert not torch.distributed.is_initialized(), "vLLM left its process group behind"


def requests(model: Path, num: int, max_tokens: int = 40) -> list[Request]:
    tokenizer = load_tokenizer(str(model))
    made = []
    for i in range(num):
        # Of different lengths, so that a batch holds rows at different positions.
        message = {"role": "user", "content": "Numbers: " + " ".join("35726"[: 1 + i % 5])}
        tokens = encode_prompt(tokenizer, [message])
        made.append(
            Request(
                key=(f"q{i}", 0),
                prompt_tokens=tokens,
                max_tokens=max_tokens,
                seed=sample_seed("test", f"q{i}", 0),
            )
        )
    return made


def draw(engine: Engine, asked: list[Request], sampling: Sampling) -> dict[str, Completion]:
    groups = engine.generate(asked, sampling, label="test")
    drawn = [sample for group in groups for sample in group]
    assert len(drawn) == len(asked)
    return {sample.key[0]: sample for sample in drawn}


def greedy_by_transformers(model: Path, request: Request) -> tuple[str, int]:
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = load_tokenizer(str(model))
    tokens = reference.generate(
        torch.tensor([list(request.prompt_tokens)]),
        max_new_tokens=request.max_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[0, len(request.prompt_tokens) :]
    text = tokenizer.decode(tokens).removesuffix(tokenizer.eos_token)
    return text, len(tokens)


def test_swapped_weights_sample_as_the_model_itself(models: list[Path], engine: Engine) -> None:
    asked = requests(models[0], 5)
    first = draw(engine, asked, GREEDY)
    assert engine.load(models[1]) < 5.0, "a swap must not be a restart"
    second = draw(engine, asked, GREEDY)
    engine.load(models[0])
    assert draw(engine, asked, GREEDY) == first
    for model, drawn in zip(models, (first, second), strict=True):
        for request in asked:
            sample = drawn[request.key[0]]
            text, num_tokens = greedy_by_transformers(model, request)
            # vLLM holds back the last bytes of a text while they are no whole character.
            assert sample.text.rstrip("\ufffd") == text.rstrip("\ufffd")
            assert sample.num_tokens == num_tokens


def test_samples_do_not_depend_on_the_batch(models: list[Path], engine: Engine) -> None:
    asked = requests(models[0], 24)
    engine.load(models[0])
    together = draw(engine, asked, WARM)
    assert len({sample.text for sample in together.values()}) > 12, "samples should differ"
    assert draw(engine, asked, WARM) == together
    assert draw(engine, asked[::-1], WARM) == together
    alone = draw(engine, asked[5:6], WARM)
    assert alone == {"q5": together["q5"]}


def test_more_requests_than_run_at_once_and_long_prompts(
    models: list[Path], engine: Engine
) -> None:
    # 300 prompts do not fit one step of the scheduler. Processed in parts, seeded prompts stop
    # vLLM 0.32 on a CPU.
    engine.load(models[0])
    asked = requests(models[0], 300, max_tokens=2)
    asked = [
        Request(
            key=request.key,
            prompt_tokens=list(request.prompt_tokens) * (100 // len(request.prompt_tokens)),
            max_tokens=2,
            seed=request.seed,
        )
        for request in asked
    ]
    assert all(sample.num_tokens <= 2 for sample in draw(engine, asked, WARM).values())


def test_limit_reached_is_length_and_closing_early_aborts(
    models: list[Path], engine: Engine
) -> None:
    engine.load(models[0])
    asked = requests(models[0], 8, max_tokens=3)
    reasons = {sample.finish_reason for sample in draw(engine, asked, GREEDY).values()}
    assert "length" in reasons
    groups = engine.generate(requests(models[0], 8, max_tokens=60), WARM, label="test")
    next(groups)
    groups.close()
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert len(draw(engine, asked, GREEDY)) == 8


def test_unusable_weights_leave_the_engine_as_it_was(
    models: list[Path], engine: Engine, tmp_path: Path
) -> None:
    engine.load(models[0])
    before = draw(engine, requests(models[0], 3), GREEDY)
    torn = build_model(tmp_path / "torn", seed=2)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt"):
        engine.load(torn)
    assert draw(engine, requests(models[0], 3), GREEDY) == before


def test_signature_tells_configuration_tokenizer_and_tensors_apart(
    models: list[Path], tmp_path: Path
) -> None:
    assert model_signature(models[0]) == model_signature(models[1])
    longer = build_model(tmp_path / "longer", seed=0, context_tokens=256)
    assert model_signature(longer) != model_signature(models[0])
    other = build_model(tmp_path / "other", seed=0)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    assert model_signature(other) != model_signature(models[0])


@pytest.mark.slow  # a second engine start
def test_another_configuration_restarts_the_engine(
    models: list[Path], engine: Engine, tmp_path: Path
) -> None:
    engine.load(models[1])
    swapped = draw(engine, requests(models[1], 4), GREEDY)
    # The same weights in a longer context: a fresh engine for what the old one held after a swap.
    engine.load(build_model(tmp_path / "longer", seed=1, context_tokens=256))
    assert engine.context_tokens == 256
    assert draw(engine, requests(models[1], 4), GREEDY) == swapped
    engine.load(models[0])


def test_seeds_are_stable_and_differ() -> None:
    assert sample_seed("countdown", "a", 0) == 109851017020632
    seeds = {sample_seed(t, q, s) for t in "ab" for q in ("1", "11") for s in range(9)}
    assert len(seeds) == 36
    assert all(0 <= seed < 2**53 for seed in seeds)


@pytest.mark.parametrize(
    ("prompt", "limit", "room"), [(10, None, 22), (10, 22, 22), (10, 5, 5), (31, None, 1)]
)
def test_response_limit_fits_the_context(prompt: int, limit: int | None, room: int) -> None:
    assert response_limit(prompt, limit, 32, "x") == room


@pytest.mark.parametrize(
    ("prompt", "limit", "message"),
    [
        (32, None, "32 tokens and the model's context 32"),
        (10, 23, "exceed the model's context of 32 by 1"),
    ],
)
def test_response_limit_names_the_numbers(prompt: int, limit: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        response_limit(prompt, limit, 32, "step 0")


def test_importing_the_module_is_light() -> None:
    code = (
        "import sys, longcot.data.sampling; "
        "print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout == "[]\n", done.stderr
