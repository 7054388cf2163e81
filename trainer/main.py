"""Train: `torchrun --nproc-per-node 8 trainer/main.py RECIPE [--section.field value ...]`.

Also runs as one process: `python trainer/main.py RECIPE`. `RECIPE --help` explains every field.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

try:
    from longcot.trainer.config import Config, check, profiled_steps
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("longcot"):
        raise
    sys.exit("trainer/main.py: longcot is not installed: run `make install`, or `pip install -e .`")
from longcot.trainer.recipes import RECIPES

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` does not need it
    from collections.abc import Callable

    from longcot.data.loader import StepLoader
    from longcot.data.rules import Rules
    from longcot.data.sources import Source
    from longcot.data.tokenized import TokenizedDataset
    from longcot.trainer.model import Decoder
    from longcot.trainer.parallel import World


def parse(arguments: list[str]) -> tuple[str, Config]:
    """(recipe, its config with the overrides applied); bad usage ends with exit code 2."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nRecipes: {', '.join(RECIPES)}")
        sys.exit(0 if arguments else 2)
    recipe = arguments[0]
    if recipe not in RECIPES:
        stop(f"there is no recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    import tyro

    config = tyro.cli(
        Config,
        default=RECIPES[recipe](),
        args=arguments[1:],
        prog=f"trainer/main.py {recipe}",
        description=RECIPES[recipe].__doc__,
        console_outputs=is_first_rank(),
    )
    return recipe, config


def run(recipe: str, config: Config) -> None:
    """Everything between a checked config and a finished run directory.

    Raises:
        ValueError: settings, data or a run directory that cannot be used.
        OSError: the disk is full or read-only.
        FloatingPointError: a step's loss or gradient was not finite.
    """
    import torch

    from longcot.data.files import write_json_atomic
    from longcot.trainer.checkpoints import save_model
    from longcot.trainer.loop import StepResult, train
    from longcot.trainer.metrics import StepLog
    from longcot.trainer.optimizer import build_adamw, learning_rate_at
    from longcot.trainer.parallel import start_world

    started = time.perf_counter()
    source, identity = find_data(config)
    raw = raw_config(config)
    world = start_world()
    dataset = prepare(recipe, config, source, identity, raw["max_position_embeddings"], world)
    if dataset is None:
        return
    folder, num_steps, settings = config.run.folder, config.run.num_steps, config.optimizer
    model = build_model(recipe, config, world, dataset, raw)
    optimizer = build_adamw(
        model.parameters(),
        learning_rate=settings.learning_rate,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        precision=settings.precision,
        seed=config.run.seed,
        rank=world.rank,
    )
    loader = build_loader(config, world, dataset, raw)
    log = StepLog(folder / "metrics.jsonl", num_steps) if is_first_rank() else None

    def save(step: int) -> None:
        if step in config.run.checkpoint_steps or step == num_steps:
            save_model(
                model,
                folder,
                step,
                raw_config=raw,
                tokenizer_path=tokenizer_path(config),
                dtype=getattr(torch, config.run.checkpoint_dtype),
            )

    profile = make_profiler(config, world)

    def after_step(result: StepResult) -> None:
        profile(result.step)
        if log:
            log.write(result, waited_seconds=loader.take_waited_seconds())
        save(result.step)
        if log:
            log.restart_clock()

    def learning_rate(step: int) -> float:
        return learning_rate_at(
            step,
            num_steps=num_steps,
            peak=settings.learning_rate,
            warmup_ratio=settings.warmup_ratio,
            schedule=settings.schedule,
            min_ratio=settings.min_learning_rate_ratio,
        )

    save(0)
    profile(0)
    train(
        model,
        optimizer,
        loader,
        learning_rate=learning_rate,
        max_gradient_norm=settings.max_gradient_norm,
        device=world.device,
        after_step=after_step,
        skips_not_finite=config.run.on_not_finite == "skip",
    )
    if log:
        log.close()
        seconds = round(time.perf_counter() - started, 3)
        write_json_atomic(folder / "finished.json", {"steps": num_steps, "seconds": seconds})
        print(f"finished {num_steps} steps in {seconds:.1f} s: {folder}")


def find_data(config: Config) -> "tuple[Source | None, dict[str, str] | None]":
    """(the files to train on, checksums of all that `longcot.data` built), found sound before
    anything is made; None for a data set of the hub, which the first rank downloads, and for
    checksums not made yet.
    """
    from longcot.data.files import check_manifest
    from longcot.data.sources import open_source

    data, identity = config.data, None
    names = [name for name in ("manifest.json", "train.jsonl") if (data.path / name).is_file()]
    if names and (data.path / "heldout.jsonl").is_file():
        remedy = "build it with `python -m longcot.data`, or name the file with the rows itself"
        identity = check_manifest(data.path, remedy)["sha256"]
    if data.revision is not None and not data.path.exists():
        return None, identity
    source = open_source(
        str(data.path), split=data.split, subset=data.subset, revision=data.revision
    )
    return source, identity


def prepare(
    recipe: str,
    config: Config,
    source: "Source | None",
    identity: dict[str, str] | None,
    context_tokens: int,
    world: "World",
) -> "TokenizedDataset | None":
    """Make the run folder, return the tokenized rows; None where the run is already finished.

    Raises:
        ValueError: a row that the rules refuse, fewer rows than a step takes, another run's folder.
    """
    import torch.distributed as dist

    from longcot.data.sources import open_source, scan
    from longcot.data.tokenized import key_digest, open_dataset, open_or_build
    from longcot.trainer.manifest import prepare_run_folder, write_manifest

    folder, data = config.run.folder, config.data
    tokenized = data.tokenized or folder / "tokenized"
    # Gloo, for days: tokenizing may outlast the minutes that a collective is given.
    waiting = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    assert not isinstance(waiting, int), "every rank is in the group"
    state = ["", ""]
    if is_first_rank():
        source = source or open_source(
            str(data.path), split=data.split, subset=data.subset, revision=data.revision
        )
        scanned = scan(source)
        identity = identity or scanned.digests
        state[0] = prepare_run_folder(folder, config, identity)
        if state[0] != "finished":
            write_manifest(
                folder, recipe=recipe, config=config, data_identity=identity,
                device=world.describe(),
            )  # fmt: skip
            dataset = open_or_build(
                tokenized,
                scanned,
                tokenizer_path=tokenizer_path(config),
                max_tokens=min(data.tokens_per_pack, context_tokens),
                rules=rules(config),
                num_processes=data.num_processes,
            )
            check_rows(len(dataset), data.sequences_per_step)
            state[1] = key_digest(dataset.manifest)
    dist.broadcast_object_list(state, group=waiting)  # the others read what rank 0 wrote
    if state[0] == "finished":
        say(f"{folder} holds this run, finished: kept")
        return None
    dataset = open_dataset(tokenized)
    if key_digest(dataset.manifest) != state[1]:
        raise ValueError(
            f"{tokenized} was replaced by a run with other data or rules: give each its own "
            "data.tokenized"
        )
    return dataset


def rules(config: Config) -> "Rules":
    """How rows become token ids, in the words of `longcot.data`."""
    from longcot.data.rules import Rules

    data = config.data
    return Rules(
        template=data.template,
        response=data.response,
        targets=data.targets,
        over_long=data.over_long,
        on_bad_row=data.on_bad_row,
        duplicates=data.duplicates,
        prompt_column=data.prompt_column,
        response_column=data.response_column,
    )


def check_rows(num_rows: int, sequences_per_step: int) -> None:
    """Refuse data that one step would go through more than once.

    Raises:
        ValueError: naming both numbers.
    """
    if num_rows < sequences_per_step:
        raise ValueError(
            f"the data has {num_rows} usable rows, data.sequences_per_step is "
            f"{sequences_per_step}: a step would take rows twice, lower it to at most {num_rows}"
        )


def build_model(
    recipe: str, config: Config, world: "World", dataset: "TokenizedDataset", raw: dict[str, Any]
) -> "Decoder":
    """The sharded model with its first weights; prints what will run."""
    import torch

    from longcot.data.chat import marked
    from longcot.data.tokenized import describe
    from longcot.kernels.attention import choose_backend
    from longcot.kernels.softmax_gradient import choose_form, prove_form
    from longcot.trainer import weights
    from longcot.trainer.activations import keep_activations
    from longcot.trainer.families import decoder_config
    from longcot.trainer.model import Decoder
    from longcot.trainer.optimizer import weight_dtype
    from longcot.trainer.parallel import shard

    dtype = getattr(torch, config.model.dtype)
    shape = decoder_config(raw)
    backend, why = choose_backend(config.model.attention, world.device, dtype, shape.head_dim)
    form, form_why = choose_form("auto", shape.vocab_size, world.device)
    prove_form(form, shape.vocab_size, world.device, dtype)
    with torch.device("meta"):  # no process ever holds a whole model
        model = Decoder(shape, backend)
    model.to(weight_dtype(config.optimizer.precision))
    keep_activations(model, config.model.activations)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    shard(model, world.mesh, dtype)
    model.to_empty(device=world.device)
    if config.model.path is None:
        weights.initialize(model, config.run.seed)
    else:
        weights.load(model, config.model.path)

    described = "\n    ".join(["data:", *describe(dataset)])
    epochs = config.run.num_steps * config.data.sequences_per_step / len(dataset)
    say(
        f"{recipe}: {num_parameters:,} parameters ({config.model.path or 'random weights'}) on "
        f"{world.describe()}, {config.model.dtype} matmuls, "
        f"optimizer {config.optimizer.precision}\n"
        f"attention: {backend} ({why})\n"
        f"head: softmax {form} ({form_why}); activations: {config.model.activations}\n"
        f"{described}\n"
        f"    {epochs:.2f} epochs\n"
        f"one row, what is learnt between the quotes:\n{marked(dataset.manifest['example'])}"
    )
    return model


def tokenizer_path(config: Config) -> Path:
    """A base brings its tokenizer; a model from random weights uses the one of its data."""
    return config.model.path or config.data.tokenizer or config.data.path / "tokenizer"


def raw_config(config: Config) -> dict[str, Any]:
    """The `config.json` of the model to train, found sound before anything is made."""
    from longcot.data.chat import load_tokenizer
    from longcot.data.model_files import model_config
    from longcot.trainer.families import check_vocabulary, decoder_config, qwen3_config

    needs_template = rules(config).needs_chat_template
    if config.model.path is not None:
        raw = model_config(config.model.path)
        decoder_config(raw)  # refuses what is not implemented
        tokenizer = load_tokenizer(str(tokenizer_path(config)), needs_chat_template=needs_template)
        padding = check_vocabulary(raw, len(tokenizer), tokenizer.eos_token_id)
        if padding:
            say(padding)
        return raw
    if not tokenizer_path(config).is_dir():
        raise ValueError(
            f"{tokenizer_path(config)} does not exist: set data.tokenizer to a tokenizer's folder "
            "to train from random weights, or model.path to a base that brings its own"
        )
    tokenizer = load_tokenizer(str(tokenizer_path(config)), needs_chat_template=needs_template)
    shape = config.model
    return qwen3_config(
        # A multiple of 64 rows: even shards, and sizes that matmuls like.
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        rope_theta=shape.rope_theta,
        tie_embeddings=shape.tie_embeddings,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_profiler(config: Config, world: "World") -> "Callable[[int], None]":
    """Called with 0 before training and with each step's number after it."""
    steps = profiled_steps(config)
    if steps is None:
        return lambda step: None
    from longcot.trainer.profiling import profile_steps

    return profile_steps(config.run.folder, *steps, world.rank, world.device)


def build_loader(
    config: Config, world: "World", dataset: "TokenizedDataset", raw: dict[str, Any]
) -> "StepLoader":
    """This rank's packs of every step."""
    from longcot.data.loader import StepLoader
    from longcot.data.packing import StepPlan, plan_step
    from longcot.trainer.families import decoder_config
    from longcot.trainer.flops import document_flops

    data, cost = config.data, document_flops(decoder_config(raw))
    lengths = dataset.lengths

    def plan(step: int) -> StepPlan:
        return plan_step(
            step,
            lengths=lengths,
            num_targets=dataset.num_targets,
            sequences_per_step=data.sequences_per_step,
            tokens_per_pack=data.tokens_per_pack,
            world_size=world.size,
            cost=cost,
            seed=data.seed if data.shuffle else None,
        )

    return StepLoader(
        dataset,
        plan,
        rank=world.rank,
        num_steps=config.run.num_steps,
        pin_memory=world.device.type == "cuda",
    )


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    if is_first_rank():
        print(text, flush=True)


def stop(message: str) -> NoReturn:
    """Bad usage: one sentence from the first rank, since all found the same; exit code 2."""
    if is_first_rank():
        print(f"trainer/main.py: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    recipe, config = parse(sys.argv[1:])
    try:
        check(config)
    except ValueError as error:
        stop(str(error))
    import torch.distributed as dist

    from longcot.trainer.parallel import leave_world

    rank = os.environ.get("RANK", "0")
    try:
        run(recipe, config)
    except ChildProcessError as error:  # an OSError to Python, but not one of the disk
        print(f"trainer/main.py, rank {rank}: {error}", file=sys.stderr)
        leave_world(1)
    except OSError as error:
        # The rank that failed speaks, whichever it is; torchrun ends the others.
        remedy = "free some space, or choose another --run.folder"
        print(f"trainer/main.py, rank {rank}: {error}: {remedy}", file=sys.stderr)
        leave_world(1)
    except (ValueError, FloatingPointError) as error:
        print(f"trainer/main.py, rank {rank}: {error}", file=sys.stderr)
        leave_world(1)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        print(f"trainer/main.py, rank {rank}: another rank failed and says why", file=sys.stderr)
        leave_world(1)
    leave_world(0)


if __name__ == "__main__":
    main()
