"""Train: `torchrun --nproc-per-node 8 trainer/main.py RECIPE [--section.field value ...]`.

Also runs as one process: `python trainer/main.py RECIPE`. `RECIPE --help` explains every field.
"""

import os
import sys
import time
from typing import TYPE_CHECKING, NoReturn

try:
    from longcot.trainer.config import Config, check
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("longcot"):
        raise
    sys.exit("trainer/main.py: longcot is not installed: run `make install`, or `pip install -e .`")
from longcot.trainer.recipes import RECIPES

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` does not need it
    from longcot.data.loader import StepLoader
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
    world = start_world()
    dataset = prepare(recipe, config, world)
    if dataset is None:
        return
    folder, num_steps, settings = config.run.folder, config.run.num_steps, config.optimizer
    model = build_model(recipe, config, world, dataset)
    optimizer = build_adamw(
        model.parameters(),
        learning_rate=settings.learning_rate,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
    )
    loader = build_loader(config, world, dataset)
    log = StepLog(folder / "metrics.jsonl", num_steps) if is_first_rank() else None

    def save(step: int) -> None:
        if step in config.run.checkpoint_steps or step == num_steps:
            tokenizer_path = config.data.path / "tokenizer"
            dtype = getattr(torch, config.run.checkpoint_dtype)
            save_model(model, folder, step, tokenizer_path=tokenizer_path, dtype=dtype)

    def after_step(result: StepResult) -> None:
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
    train(
        model,
        optimizer,
        loader,
        learning_rate=learning_rate,
        max_gradient_norm=settings.max_gradient_norm,
        device=world.device,
        after_step=after_step,
    )
    if log:
        log.close()
        seconds = round(time.perf_counter() - started, 3)
        write_json_atomic(folder / "finished.json", {"steps": num_steps, "seconds": seconds})
        print(f"finished {num_steps} steps in {seconds:.1f} s: {folder}")


def prepare(recipe: str, config: Config, world: "World") -> "TokenizedDataset | None":
    """Make the run folder, return the tokenized rows; None where the run is already finished."""
    import torch.distributed as dist

    from longcot.data.files import check_manifest
    from longcot.data.tokenized import open_dataset, open_or_build
    from longcot.trainer.manifest import prepare_run_folder, write_manifest

    folder, data = config.run.folder, config.data
    identity = check_manifest(data.path, "build it with `python -m longcot.data`")["sha256"]
    state = [prepare_run_folder(folder, config, identity) if is_first_rank() else ""]
    dist.broadcast_object_list(state)
    if state[0] == "finished":
        say(f"{folder} holds this run, finished: kept")
        return None
    if is_first_rank():
        write_manifest(
            folder, recipe=recipe, config=config, data_identity=identity, device=world.describe()
        )
        open_or_build(
            folder / "tokenized",
            source=data.path / "train.jsonl",
            tokenizer_path=data.path / "tokenizer",
            max_tokens=min(data.tokens_per_pack, config.model.max_position_embeddings),
        )
    dist.barrier()  # the others read what rank 0 wrote
    return open_dataset(folder / "tokenized")


def build_model(
    recipe: str, config: Config, world: "World", dataset: "TokenizedDataset"
) -> "Decoder":
    """The sharded model with its initial weights; prints what will run."""
    import torch

    from longcot.data.chat import load_tokenizer
    from longcot.kernels.attention import choose_backend
    from longcot.trainer.model import Decoder, DecoderConfig
    from longcot.trainer.parallel import shard

    fields = DecoderConfig.__dataclass_fields__.keys() & config.model.__dataclass_fields__.keys()
    # A multiple of 64 rows: even shards, and sizes that matmuls like. The extra rows are never
    # targets.
    vocab_size = -(-len(load_tokenizer(str(config.data.path / "tokenizer"))) // 64) * 64
    shape = DecoderConfig(vocab_size=vocab_size, **{k: getattr(config.model, k) for k in fields})
    backend, why = choose_backend(config.model.attention, world.device)
    model = Decoder(shape, backend)
    model.initialize(config.run.seed)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    model.to(world.device)
    shard(model, world.mesh, getattr(torch, config.model.dtype))

    dropped = dataset.manifest["dropped"]
    epochs = config.run.num_steps * config.data.sequences_per_step / len(dataset)
    say(
        f"{recipe}: {num_parameters:,} parameters on {world.describe()}, {config.model.dtype} "
        "matmuls, "
        f"fp32 masters and states\n"
        f"attention: {backend} ({why})\n"
        f"data: {len(dataset):,} rows, {dataset.lengths.sum():,} tokens, {len(dropped):,} rows "
        "dropped"
        f"{''.join(f'; {row}' for row in dropped[:3])}; {epochs:.2f} epochs\n"
        f"one row, what is learnt between the quotes:\n{dataset.manifest['example']}"
    )
    return model


def build_loader(config: Config, world: "World", dataset: "TokenizedDataset") -> "StepLoader":
    """This rank's packs of every step."""
    from longcot.data.loader import StepLoader
    from longcot.data.packing import StepPlan, plan_step

    data = config.data

    def plan(step: int) -> StepPlan:
        return plan_step(
            step,
            lengths=dataset.lengths,
            num_targets=dataset.lengths - dataset.prompt_lengths,
            sequences_per_step=data.sequences_per_step,
            tokens_per_pack=data.tokens_per_pack,
            world_size=world.size,
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

    try:
        run(recipe, config)
    except (ValueError, OSError, FloatingPointError) as error:
        # The rank that failed speaks, whichever it is; torchrun ends the others.
        sys.exit(f"trainer/main.py, rank {os.environ.get('RANK', '0')}: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
