"""`python -m longcot.data countdown`: build training and held-out rows and a tokenizer.

`python -m longcot.data inspect PATH`: what rows of any source would be to a training run.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from .countdown import Teacher, build_examples
from .examples import write_examples
from .files import checksum, publish_directory, remove_partials, write_json_atomic
from .rules import Duplicates, OnBadRow, OverLong, ResponseForm, Rules, Targets, Template
from .tokenizer import save_tokenizer, train_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Countdown:
    """Countdown problems with a search teacher's verified chain of thought."""

    out: Path = Path("runs/data/countdown")
    """Folder to write: train.jsonl, heldout.jsonl, tokenizer/, manifest.json."""
    num_train: int = 12000
    """Training rows."""
    num_heldout: int = 300
    """Held-out rows; no problem is in both sets."""
    share_of_four: float = 0.1
    """Share of the problems with four numbers instead of three, 0 to 1."""
    teacher: Teacher = "restate"
    """`restate` writes the target beside each value it compares, `terse` does not."""
    max_number: int = 20
    """Largest given number."""
    max_value: int = 60
    """Largest intermediate value and target."""
    max_steps: int = 40
    """Problems whose search computes more values than this are left out."""
    seed: int = 0
    """Decides every row; the same settings give the same bytes."""


def countdown(settings: Countdown) -> None:
    """Build the folder, or say that it already holds exactly this.

    Raises:
        ValueError: settings that cannot be met; an existing folder made with other settings.
    """
    started = time.perf_counter()
    wanted = {name: value for name, value in asdict(settings).items() if name != "out"}
    manifest_path = settings.out / "manifest.json"
    if manifest_path.exists():
        found = json.loads(manifest_path.read_text())["settings"]
        if found == wanted:
            print(f"{settings.out} is complete and was made with these settings: kept")
            return
        differing = sorted(name for name in wanted if wanted[name] != found.get(name))
        raise ValueError(
            f"{settings.out} was made with other settings ({', '.join(differing)} differ): "
            "remove it, or choose another --out"
        )
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    for name in remove_partials(settings.out.parent):
        print(f"removed {name}, left by an interrupted build")
    shares = {3: 1 - settings.share_of_four, 4: settings.share_of_four}
    train, heldout, left_out = build_examples(
        num_train=settings.num_train,
        num_heldout=settings.num_heldout,
        shares={n: share for n, share in shares.items() if share},
        teacher=settings.teacher,
        max_number=settings.max_number,
        max_value=settings.max_value,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )
    with publish_directory(settings.out) as folder:
        write_examples(folder / "train.jsonl", train)
        write_examples(folder / "heldout.jsonl", heldout)
        texts = (f"{row.messages[0]['content']}\nuser\nassistant\n{row.response}" for row in train)
        save_tokenizer(train_tokenizer(texts), folder / "tokenizer")
        checksums = {
            str(file.relative_to(folder)): checksum(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        write_json_atomic(
            folder / "manifest.json",
            {
                "settings": wanted,
                "rows": {"train": len(train), "heldout": len(heldout)},
                "left_out": left_out,
                "sha256": checksums,
                "seconds": round(time.perf_counter() - started, 3),
            },
        )
    print(
        f"{settings.out}: {len(train):,} training and {len(heldout):,} held-out problems, every "
        "response verified; "
        f"left out: {', '.join(f'{count:,} {reason}' for reason, count in left_out.items())}; "
        f"{time.perf_counter() - started:.1f} s"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspect:
    """Lengths, dropped rows, packs, steps and one decoded row of a data set; trains nothing."""

    path: Positional[str]
    """JSONL or Parquet file, quoted glob, folder of such files or of `datasets.save_to_disk`, what
    `longcot.data` built, or a data set of the Hugging Face hub with its revision."""
    tokenizer: Path | None = None
    """Folder of the base or its tokenizer; None: `tokenizer/` in PATH."""
    revision: str | None = None
    """Commit of a data set of the hub, 40 hex digits."""
    subset: str | None = None
    """Configuration of a data set of the hub."""
    split: str = "train"
    """Split of the hub's data set, a saved one, or a folder whose file names have splits."""
    tokenized: Path | None = None
    """Keep the token ids in this folder, for training to reuse with `--data.tokenized`; None: made
    in a temporary folder."""
    sequences_per_step: int = 64
    """Rows of one optimizer step, over all ranks."""
    tokens_per_pack: int = 8192
    """Most tokens in one pack."""
    world_size: int = 1
    """Ranks."""
    seed: int = 0
    """Decides the order of the rows."""
    cost_quadratic: float = 2e-5
    """A document of s tokens costs s + this * s^2; the default is about Qwen3-8B's."""
    template: Template = "chat"
    """The tokenizer's chat template with its generation prompt, or `Question: ... Answer:`."""
    response: ResponseForm = "alone"
    """Tokenized alone with the end-of-sequence token behind it, or as the template renders it."""
    targets: Targets = "response"
    """Learn the last turn of the assistant, or its earlier turns too."""
    over_long: OverLong = "drop"
    """What happens to rows longer than a pack; a truncated one has no end-of-sequence target."""
    on_bad_row: OnBadRow = "drop"
    """A row that cannot be used is dropped into the ledger, or ends the inspection."""
    duplicates: Duplicates = "keep"
    """Rows that equal an earlier one are listed either way."""
    prompt_column: str | None = None
    """Column of the prompt, text or turns; None finds `messages`, `message` or `prompt`."""
    response_column: str | None = None
    """Column of the response; None finds `response` or `completion`, or takes the last turn."""
    num_processes: int | None = None
    """Processes that tokenize; None: one per core."""


def inspect(settings: Inspect) -> None:
    """Tokenize the rows as training would, and print what they are.

    Raises:
        ValueError: a source, tokenizer or setting that cannot be used.
        OSError: a file cannot be read or written.
    """
    from .inspection import Steps, report
    from .packing import CostModel
    from .sources import open_source, scan
    from .tokenized import open_or_build

    for name in ("sequences_per_step", "tokens_per_pack", "world_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}, it must be at least 1")
    tokenizer = settings.tokenizer or Path(settings.path) / "tokenizer"
    if not tokenizer.is_dir():
        raise ValueError(f"there is no tokenizer folder {tokenizer}: name one with --tokenizer")
    rules = Rules(
        **{name: getattr(settings, name) for name in Rules.__slots__}  # the same names
    )
    steps = Steps(
        sequences_per_step=settings.sequences_per_step,
        tokens_per_pack=settings.tokens_per_pack,
        world_size=settings.world_size,
        cost=CostModel(linear=1.0, quadratic=settings.cost_quadratic),
        seed=settings.seed,
    )
    source = open_source(
        settings.path, split=settings.split, subset=settings.subset, revision=settings.revision
    )
    print(f"{settings.path}: {len(source.files)} {source.kind} files", flush=True)
    with tempfile.TemporaryDirectory(prefix="longcot-inspect-") as scratch:
        dataset = open_or_build(
            settings.tokenized or Path(scratch) / "tokenized",
            scan(source),
            tokenizer_path=tokenizer,
            max_tokens=settings.tokens_per_pack,
            rules=rules,
            num_processes=settings.num_processes,
        )
        print(report(dataset, steps, colour=sys.stdout.isatty()))


def main() -> None:
    settings = tyro.extras.subcommand_cli_from_dict(
        {"countdown": Countdown, "inspect": Inspect}, description=__doc__
    )
    try:
        inspect(settings) if isinstance(settings, Inspect) else countdown(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"longcot.data: {error}")


if __name__ == "__main__":
    main()
