"""Every setting of a run, its unit and default; recipes fill it in, the command line overrides it.

The config stops at `trainer/main.py`: everything below takes explicit arguments.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """A base to fine-tune, or the shape of a Qwen3 to train from random weights."""

    path: Path | None = None
    """Hugging Face directory of the base, with its tokenizer. None: random weights of the shape
    below, whose vocabulary comes from the data's tokenizer; with a base the shape is the base's."""
    hidden_size: int = 160
    """Width D of the residual stream."""
    intermediate_size: int = 480
    """Width F between a block's two feed-forward matmuls."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 5
    """Query heads of each block."""
    num_kv_heads: int = 5
    """Key and value heads; query heads are shared out among them."""
    head_dim: int = 32
    """Size K of a head."""
    max_position_embeddings: int = 1024
    """Longest context in tokens, prompt and response, in training and sampling."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """One matrix for the embedding and the head."""
    attention: Literal[
        "auto",
        "flash_attn",
        "torch_varlen",
        "torch_varlen_fa3",
        "torch_varlen_fa4",
        "torch_varlen_cudnn",
        "flex",
        "sdpa",
    ] = "auto"
    """Attention backend; auto picks by device and says what it picked."""
    activations: Literal["keep", "selective", "recompute", "offload"] = "keep"
    """What blocks keep for the backward pass: all; matmul and attention outputs; their input; or
    nothing, their input waiting in host memory. Each holds less and computes more than the last."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matmuls; that of weights and Adam states is `optimizer.precision`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """What is trained on, and how it is cut into steps."""

    path: Path = Path("runs/data/countdown")
    """What `longcot.data` built; or a JSONL or Parquet file, a quoted glob, a folder of such files
    or of `datasets.save_to_disk`, or a data set of the Hugging Face hub with its revision."""
    revision: str | None = None
    """Commit of a data set of the hub, 40 hex digits."""
    subset: str | None = None
    """Configuration of a data set of the hub."""
    split: str = "train"
    """Split of the hub's data set, a saved one, or a folder whose file names have splits."""
    prompt_column: str | None = None
    """Column of the prompt, text or turns; None finds `messages`, `message` or `prompt`."""
    response_column: str | None = None
    """Column of the response; None finds `response` or `completion`, or takes the last turn."""
    tokenizer: Path | None = None
    """Tokenizer of a model from random weights; None: `tokenizer/` in `path`."""
    tokenized: Path | None = None
    """Folder of the token ids, which runs may share; None: in the run folder."""
    template: Literal["chat", "plain"] = "chat"
    """The tokenizer's chat template with its generation prompt, or `Question: ... Answer:`."""
    response: Literal["alone", "template"] = "alone"
    """Tokenized alone with the end-of-sequence token behind it, or as the template renders it."""
    targets: Literal["response", "every_turn"] = "response"
    """Learn the last turn of the assistant, or its earlier turns too."""
    over_long: Literal["drop", "error", "truncate"] = "drop"
    """What happens to rows longer than a pack; a truncated one has no end-of-sequence target."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that cannot be used ends the run, or is dropped into the ledger."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Rows that equal an earlier one are listed either way."""
    num_processes: int | None = None
    """Processes that tokenize, on the first rank's machine; None: one per core it may use."""
    sequences_per_step: int = 64
    """Rows of one optimizer step, over all ranks."""
    tokens_per_pack: int = 8192
    """Most tokens in one pack, which a rank holds at a time."""
    shuffle: bool = True
    """Shuffle every epoch anew, by seed; otherwise file order, as in the paper."""
    seed: int = 0
    """Decides the order of the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSection:
    """AdamW on all parameters, the gradient clipped by its global norm."""

    precision: Literal["fp32_master", "bf16_stochastic", "paper"] = "fp32_master"
    """fp32 weights and states (12 bytes a parameter); bf16 weights, rounded stochastically, and
    fp32 states (10); or bf16 for both, rounded to nearest (6), as in the paper's runs."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the rate rises linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up."""
    min_learning_rate_ratio: float = 0.05
    """Where the cosine ends, as a share of the peak."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients."""
    weight_decay: float = 0.01
    """Decoupled, on every parameter, norms and embeddings included, as in the paper."""
    max_gradient_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSection:
    """Where the run lives, how long it is, what it keeps."""

    folder: Path = Path("runs/demo")
    """Run directory: manifest.json, metrics.jsonl, checkpoints/."""
    num_steps: int = 640
    """Optimizer steps."""
    checkpoint_steps: tuple[int, ...] = (0, 640)
    """Steps after which the model is saved, 0 for before training; the last step always is."""
    on_not_finite: Literal["halt", "skip"] = "halt"
    """A step whose loss or gradient is not finite never changes the weights; the run ends, naming
    step and rows, or leaves that step out and says so in metrics.jsonl."""
    profile: str | None = None
    """START:END, steps counted from 1: write traces of what hosts and GPUs did in them."""
    checkpoint_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of saved models."""
    seed: int = 0
    """Decides the initial weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One training run."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    run: RunSection = field(default_factory=RunSection)


def check(config: Config) -> None:
    """Refuse settings that cannot work, before anything is made.

    Raises:
        ValueError: naming the field, its value and the rule.
    """
    at_least_one = {
        "model.num_layers": config.model.num_layers,
        "model.hidden_size": config.model.hidden_size,
        "data.sequences_per_step": config.data.sequences_per_step,
        "data.tokens_per_pack": config.data.tokens_per_pack,
        "run.num_steps": config.run.num_steps,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1")
    for name, value in (
        ("optimizer.learning_rate", config.optimizer.learning_rate),
        ("optimizer.max_gradient_norm", config.optimizer.max_gradient_norm),
    ):
        if not value > 0:
            raise ValueError(f"{name} is {value}, it must be above 0")
    for name, value in (
        ("optimizer.warmup_ratio", config.optimizer.warmup_ratio),
        ("optimizer.min_learning_rate_ratio", config.optimizer.min_learning_rate_ratio),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, it must lie between 0 and 1")
    if config.model.path is not None and config.data.tokenizer is not None:
        raise ValueError(
            f"data.tokenizer is {config.data.tokenizer}, but the base {config.model.path} brings "
            "its own: leave it out"
        )
    if config.data.num_processes is not None and config.data.num_processes < 1:
        raise ValueError(
            f"data.num_processes is {config.data.num_processes}, it must be at least 1"
        )
    if config.optimizer.precision != "fp32_master" and config.model.dtype != "bfloat16":
        raise ValueError(
            f"optimizer.precision is {config.optimizer.precision}, whose weights are bf16, and "
            f"model.dtype is {config.model.dtype}: set model.dtype to bfloat16, or keep fp32_master"
        )
    profiled_steps(config)
    outside = [s for s in config.run.checkpoint_steps if not 0 <= s <= config.run.num_steps]
    if outside:
        raise ValueError(
            f"run.checkpoint_steps names {outside}, outside 0 to run.num_steps "
            f"{config.run.num_steps}"
        )


def profiled_steps(config: Config) -> tuple[int, int] | None:
    """(first, last) of `run.profile`, both of them profiled, steps counted from 1.

    Raises:
        ValueError: it is not two steps of the run.
    """
    text = config.run.profile
    if text is None:
        return None
    first, _, last = text.partition(":")
    is_range = first.isdecimal() and last.isdecimal()
    if not (is_range and 1 <= int(first) <= int(last) <= config.run.num_steps):
        raise ValueError(
            f"run.profile is {text!r}: give START:END, the first and the last step to profile, "
            f"counted from 1 to the run's {config.run.num_steps}, as in 5:7"
        )
    return int(first), int(last)
