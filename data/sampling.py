"""Sampling from a model directory with vLLM: the only module that talks to it.

One engine serves many checkpoints. Starting vLLM takes tens of seconds, loading other weights of
the same architecture into it a fraction of one, so `Engine.load` swaps weights in place wherever
configuration, tokenizer and tensors agree, and starts anew where they do not. Everything heavy is
imported inside the functions that use it.

Prompts go in as token ids, so nothing is added to what the chat template wrote. Every sample has
a seed of its own (`sample_seed`), so what is drawn for a question does not hang on which other
questions are asked. What remains is rounding: a matrix product over more rows may round
differently, and a token whose draw lies exactly there may come out as another.
"""

import hashlib
import importlib.util
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat import load_tokenizer
from .model_files import model_config, model_signature
from .progress import Progress

MAX_CONCURRENT = 256
"""Samples in flight at once; more are queued."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float
    """0 is greedy."""
    top_p: float
    max_tokens: int | None = None
    """Longest response in tokens; None: as long as the context allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sample to draw; `key` comes back with it."""

    key: tuple[str, int]
    """Question id, index of the sample."""
    prompt_tokens: Sequence[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What was drawn for a request."""

    key: tuple[str, int]
    text: str
    num_tokens: int
    """Tokens drawn, the end-of-sequence token included."""
    finish_reason: str
    """`stop` (the model ended it) or `length` (cut off)."""


def prepare_process() -> None:
    """Set what must be set before torch is first imported; call it first thing in a process.

    Threads that wait sleep instead of spinning. With two threads on two cores that others use as
    well, spinning made sampling on a CPU up to ten times slower; alone it gained nothing.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def sample_seed(task: str, question: str, sample: int) -> int:
    """A seed for one sample: a hash of its names, the same on every machine and in every order."""
    digest = hashlib.sha256(f"{task}\0{question}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:6], "big")  # 48 bits: exact in any reader of JSON


def response_limit(
    num_prompt_tokens: int, max_tokens: int | None, context_tokens: int, where: str
) -> int:
    """The most tokens a response may take behind a prompt.

    Raises:
        ValueError: the context does not hold the prompt and one token, or not the limit asked for.
    """
    room = context_tokens - num_prompt_tokens
    if room < 1:
        raise ValueError(
            f"{where}: the prompt has {num_prompt_tokens} tokens and the model's context "
            f"{context_tokens}, which leaves no room for a response; shorten the prompt or "
            "use a model with a longer context"
        )
    if max_tokens is not None and max_tokens > room:
        raise ValueError(
            f"{where}: a prompt of {num_prompt_tokens} tokens and a response of up to {max_tokens} "
            f"exceed the model's context of {context_tokens} by {max_tokens - room}; "
            f"lower --max-tokens to at most {room}, or leave it out"
        )
    return room if max_tokens is None else max_tokens


class Engine:
    """vLLM with one model in it; a context manager, so that no process outlives its use."""

    def __init__(
        self,
        model: Path,
        *,
        log_path: Path | None = None,
        dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        """Start vLLM; takes tens of seconds.

        Args:
            model: a Hugging Face directory.
            log_path: file for vLLM's own log, appended to; default a temporary one. Not used
                where VLLM_LOGGING_LEVEL is set: then the log goes to the terminal.
            dtype: of weights and activations; default the one the model was saved in (on a GPU
                bfloat16 in place of float32, as vLLM chooses).
            seed: of the engine; samples have their own.

        Raises:
            ValueError: the model directory cannot be used.
            RuntimeError: vLLM is not installed or does not start.
        """
        self._dtype, self._seed = dtype, seed
        self._log_path = log_path or Path(tempfile.gettempdir()) / f"vllm-{os.getpid()}.log"
        self._llm: Any = None
        self._num_generations = 0
        self.start_seconds = 0.0
        """Time spent starting vLLM, all starts together."""
        self._start(model)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def load(self, model: Path) -> float:
        """Hold the weights of `model`; a swap in place where possible. Returns seconds.

        Raises:
            ValueError: the model directory cannot be used; the engine still holds the old weights.
            RuntimeError: vLLM failed.
        """
        started = time.perf_counter()
        signature = model_signature(model)
        if signature != self._model_signature:
            print(f"{model}: other configuration, tokenizer or tensors; restarting vLLM",
                  file=sys.stderr)  # fmt: skip
            self.close()
            self._start(model)
        elif model.resolve() != self._model:
            path = str(model.resolve())
            with (
                self._explained(f"vLLM could not load the weights of {model}"),
                _output_to(self._quiet_log()),
            ):
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
                if self.device.startswith("cpu"):
                    self._llm.apply_model(_repack_tied_head)
                self._llm.reset_prefix_cache()  # its keys and values are the old model's
            self._model = model.resolve()
        return time.perf_counter() - started

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, label: str
    ) -> Generator[list[Completion], None, None]:
        """Draw all samples, handing them back in groups as they finish, with a progress bar.

        Closing the generator early aborts what is still being drawn.

        Raises:
            RuntimeError: vLLM failed; its log is named.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        self._num_generations += 1
        prefix = f"{self._num_generations}/"
        waiting: set[str] = set()
        try:
            with (
                self._explained(f"vLLM failed while sampling ({label})"),
                Progress(label, len(requests), rate_unit="tokens") as progress,
            ):
                for index, request in enumerate(requests):
                    params = SamplingParams(
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        max_tokens=request.max_tokens,
                        seed=request.seed,
                        stop_token_ids=self._stop_tokens,
                        skip_special_tokens=False,  # a reader must see what the model wrote
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    )
                    prompt = {"prompt_token_ids": list(request.prompt_tokens)}
                    engine.add_request(f"{prefix}{index}", prompt, params)
                    waiting.add(f"{prefix}{index}")
                while waiting:
                    done = []
                    for output in engine.step():
                        if output.finished and output.request_id in waiting:
                            waiting.remove(output.request_id)
                            index = int(output.request_id.removeprefix(prefix))
                            done.append(_completion(requests[index], output.outputs[0]))
                    progress.advance(len(done), sum(sample.num_tokens for sample in done))
                    if done:
                        yield done
        finally:
            if waiting and self._llm is not None:
                engine.abort_request(sorted(waiting))

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability, in nats, of each token of each prompt but the first.

        Raises:
            RuntimeError: vLLM failed; its log is named.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        with self._explained("vLLM failed while scoring prompts"):
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
            )
        return [
            [found[token].logprob for token, found in zip(prompt[1:], ranks[1:], strict=True)]
            for prompt, ranks in zip(
                prompts, (output.prompt_logprobs for output in outputs), strict=True
            )
        ]

    def close(self) -> None:
        """Stop vLLM and its processes; does nothing the second time."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            with _output_to(self._quiet_log()):
                llm.llm_engine.engine_core.shutdown()

    def _start(self, model: Path) -> None:
        started = time.perf_counter()
        self._model_signature = model_signature(model)
        self._stop_tokens = [load_tokenizer(str(model)).eos_token_id]
        if importlib.util.find_spec("vllm") is None:
            raise RuntimeError(
                "vLLM is not installed: run `make install`, or `pip install -e .[cpu]` "
                "(`.[gpu]` on a machine with GPUs)"
            )
        print("starting vLLM ...", file=sys.stderr, flush=True)
        quiet_log = self._quiet_log()
        with self._explained(f"vLLM could not start on {model}"), _output_to(quiet_log):
            self._llm = _start_vllm(model, self._dtype, self._seed)
        if quiet_log is not None:
            _keep_log_in(quiet_log)
        seconds = time.perf_counter() - started
        self.start_seconds += seconds
        self._model = model.resolve()
        self.device = _device_name()
        self.context_tokens = self._llm.llm_engine.model_config.max_model_len
        print(f"vLLM started on {self.device} in {seconds:.1f} s", file=sys.stderr, flush=True)

    def _quiet_log(self) -> Path | None:
        return None if "VLLM_LOGGING_LEVEL" in os.environ else self._log_path

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn whatever vLLM raises into one sentence that names its log."""
        try:
            yield
        except (ValueError, OSError, KeyboardInterrupt):
            raise
        except Exception as error:
            log = f"; its log: {self._log_path}" if self._quiet_log() else ""
            reason = str(error).strip().splitlines()
            raise RuntimeError(
                f"{what}: {reason[0] if reason else type(error).__name__}{log}"
            ) from error


def _completion(request: Request, output: Any) -> Completion:
    return Completion(
        key=request.key,
        text=output.text,
        num_tokens=len(output.token_ids),
        finish_reason=output.finish_reason,
    )


def _start_vllm(model: Path, dtype: str | None, seed: int) -> Any:
    """Import vLLM and start it. Its settings on a CPU are environment variables only."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    from . import internlm2  # noqa: F401  # registers its config

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # Scheduling in this process: one process less to start, and the same batches every time.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_cache_gib(model)))
    settings: dict[str, Any] = {"dtype": dtype or "auto"}
    if on_cpu:
        config = model_config(model)
        saved = config.get("dtype", config.get("torch_dtype"))
        settings["dtype"] = dtype or saved or "auto"  # "auto" would round float32 to bfloat16
        # A seeded sample whose prompt is processed in parts stops vLLM 0.32 on a CPU ("CPU
        # Generator does not use offset"): prompts go in whole, so a step must hold the longest.
        longest = config["max_position_embeddings"]
        settings |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, longest),
        }
    return LLM(str(model.resolve()), max_num_seqs=MAX_CONCURRENT, seed=seed, **settings)


def _repack_tied_head(model: Any) -> None:
    """Make the head that vLLM computes with on a CPU anew from the weights it has now.

    On a CPU vLLM multiplies by a copy of each matrix, packed at loading. Reloading packs anew what
    it loads, but a head tied to the embedding is not in the checkpoint: vLLM 0.32 keeps the packed
    copy of the old one, and samples from a mixture of two models.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


def _cache_gib(model: Path) -> int:
    """GiB for keys and values on a CPU: all concurrent samples, within a quarter of the memory."""
    config = model_config(model)
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    bytes_per_token = 2 * 4 * config["num_hidden_layers"] * num_kv_heads * head_dim  # K, V; fp32
    wanted = bytes_per_token * config["max_position_embeddings"] * MAX_CONCURRENT
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, math.ceil(min(wanted, memory // 4) / 2**30))


def _device_name() -> str:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return f"cpu ({os.cpu_count()} cores)"
    return current_platform.get_device_name()


def _keep_log_in(path: Path) -> None:
    """Send what vLLM logs from this process to a file too; an error dumps every request."""
    for handler in logging.getLogger("vllm").handlers:
        if type(handler) is logging.StreamHandler:  # vLLM's own; a subclass is somebody else's
            handler.setStream(path.open("a", encoding="utf-8"))


@contextmanager
def _output_to(path: Path | None) -> Iterator[None]:
    """Send stdout and stderr, those of processes started meanwhile included, to a file.

    vLLM, its workers and the C++ below them write to the descriptors; only there can it be caught.
    """
    if path is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with path.open("ab") as log:
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])
