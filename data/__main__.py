"""`python -m longcot.data countdown`: build training and held-out rows and a tokenizer."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from .countdown import Teacher, build_examples
from .examples import write_examples
from .files import checksum, publish_directory, remove_partials, write_json_atomic
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


def main() -> None:
    settings = tyro.extras.subcommand_cli_from_dict({"countdown": Countdown}, description=__doc__)
    try:
        countdown(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"longcot.data: {error}")


if __name__ == "__main__":
    main()
