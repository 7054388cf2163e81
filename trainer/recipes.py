"""Named runs: functions that return a whole config. The command line overrides single fields."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .config import Config, DataSection, RunSection


def demo() -> Config:
    """Countdown from random weights, in minutes on two cores; traces restate the target."""
    return Config(
        data=DataSection(path=Path("runs/data/countdown"), sequences_per_step=16),
        run=RunSection(
            folder=Path("runs/demo"),
            num_steps=1200,
            checkpoint_steps=(0, 40, 100, 200, 300, 450, 600, 800, 1000, 1200),
        ),
    )


def demo_terse() -> Config:
    """The demo on traces that do not restate the target: the same search, harder to learn."""
    config = demo()
    return replace(
        config,
        data=replace(config.data, path=Path("runs/data/countdown-terse")),
        run=replace(config.run, folder=Path("runs/demo-terse")),
    )


def demo_smoke() -> Config:
    """A minute's form of the demo, for CI: every part runs, nothing is learnt."""
    config = demo()
    return replace(
        config,
        data=replace(config.data, path=Path("runs/data/countdown-smoke")),
        run=replace(
            config.run, folder=Path("runs/demo-smoke"), num_steps=12, checkpoint_steps=(0, 6, 12)
        ),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "demo-terse": demo_terse,
    "demo-smoke": demo_smoke,
}
