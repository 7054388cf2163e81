"""What a benchmark is to this module: questions, how answers are drawn, and how one is judged."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.sampling import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of a benchmark."""

    id: str
    messages: list[dict[str, str]]
    """Chat turns, each `{"role": ..., "content": ...}`."""
    answer: Any
    """What `Task.score` needs to judge a response; any JSON value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The verdict on one response."""

    correct: bool
    parsed: bool
    """Whether an answer could be read from the response at all."""
    reason: str
    """A few words, from a small fixed set, so that they can be counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A benchmark; one per module, listed in `suite.py`."""

    name: str
    version: int
    """Raised whenever the same responses would score differently, or be drawn differently."""
    sampling: Sampling
    num_samples: int
    """Responses per question."""
    load: Callable[[Path], list[Question]]
    """Read the questions. Raises ValueError naming the file and line where it cannot."""
    score: Callable[[str, Question], Score]
    """Judge a response: a pure function."""
