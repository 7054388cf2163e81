"""The three pictures of a run: loss, accuracy and response length against the optimizer step.

Each is drawn once and comes out twice: as PNG, and as SVG to stand in the page, where its colours
are the page's (so that they follow light and dark) and its letters the page's letters.
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .stats import Z_95

INK, MUTED, GRID, ACCENT, RAW = "#1b1f24", "#6a7178", "#e3e6e9", "#2f6f9f", "#a9c4d8"
_PAGE_COLORS = {INK: "--ink", MUTED: "--muted", GRID: "--line", ACCENT: "--accent", RAW: "--soft"}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10.0,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "longcot",
}
_SMOOTHING_SHARE = 0.03
"""Width of the running mean over the loss, as a share of the run."""


_CHECKPOINT_LINE: dict[str, Any] = {
    "color": ACCENT,
    "linewidth": 1.8,
    "marker": "o",
    "markersize": 4,
    "clip_on": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """What is drawn."""

    metrics: Sequence[dict[str, Any]]
    """Rows of metrics.jsonl with `step` and `loss`."""
    results: Sequence[dict[str, Any]]
    """Contents of result.json per checkpoint, in step order."""

    @property
    def steps(self) -> list[int]:
        return [result["step"] for result in self.results]


def draw_loss(axes: Axes, curves: Curves) -> None:
    """Training loss of every step, and its running mean."""
    axes.set_title("Training loss (nats per token)")
    rows = [row for row in curves.metrics if math.isfinite(row["loss"])]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses, color=RAW, linewidth=1.0)
    axes.plot(steps, _running_mean(losses), color=ACCENT, linewidth=1.8)
    if losses:
        axes.set_ylim(0, sorted(losses)[int(0.995 * (len(losses) - 1))] * 1.05)
    _step_axis(axes, curves)


def draw_accuracy(axes: Axes, curves: Curves) -> None:
    """Accuracy on held-out problems with its 95 % interval."""
    axes.set_title("Accuracy on held-out problems (%)")
    values = [100 * result["accuracy"] for result in curves.results]
    spread = [100 * Z_95 * (result["standard_error"] or 0.0) for result in curves.results]
    low = [max(0.0, v - s) for v, s in zip(values, spread, strict=True)]
    high = [min(100.0, v + s) for v, s in zip(values, spread, strict=True)]
    axes.fill_between(curves.steps, low, high, color=ACCENT, alpha=0.16, linewidth=0)
    axes.plot(curves.steps, values, **_CHECKPOINT_LINE)
    axes.set_ylim(0, min(100.0, max(10.0, 1.12 * max(high, default=0.0))))
    if values:
        axes.annotate(f"{values[-1]:.1f}", (curves.steps[-1], values[-1]), xytext=(0, 7),
                      textcoords="offset points", ha="right", color=INK)  # fmt: skip
    _step_axis(axes, curves)


def draw_length(axes: Axes, curves: Curves) -> None:
    """Mean response length, and the middle half of the lengths."""
    axes.set_title("Response length (tokens)")
    values = [result["mean_response_tokens"] for result in curves.results]
    quartiles = [result["response_tokens_quantiles"] for result in curves.results]
    low, high = [q["0.25"] for q in quartiles], [q["0.75"] for q in quartiles]
    axes.fill_between(curves.steps, low, high, color=ACCENT, alpha=0.16, linewidth=0)
    axes.plot(curves.steps, values, **_CHECKPOINT_LINE)
    axes.set_ylim(0, 1.12 * max([1.0, *values, *high]))
    _step_axis(axes, curves)


CHARTS: dict[str, Callable[[Axes, Curves], None]] = {
    "loss": draw_loss,
    "accuracy": draw_accuracy,
    "length": draw_length,
}


def chart_png(name: str, curves: Curves) -> bytes:
    """One chart as a PNG, 1320 x 900 pixels."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        CHARTS[name](figure.subplots(), curves)
        return _rendered(figure, "png", dpi=300)


def overview_png(curves: Curves) -> bytes:
    """The three charts side by side, 2640 x 640 pixels."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.2, 3.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # pyright: ignore
        for axes, draw in zip(figure.subplots(1, 3), CHARTS.values(), strict=True):
            draw(axes, curves)
        return _rendered(figure, "png", dpi=200)


def chart_svg(name: str, curves: Curves) -> str:
    """One chart as an `<svg>` element that refers to nothing outside itself.

    Colours become the page's variables --ink, --muted, --line, --accent and --soft.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        CHARTS[name](figure.subplots(), curves)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        svg = _rendered(figure, "svg", transparent=True, metadata=nothing).decode()
    svg = svg[svg.index("<svg") :]
    # Inside HTML the namespaces are known, and no address need appear in the page.
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"(href=\"|url\()#", rf"\1#{name}-", svg)
    for color, variable in _PAGE_COLORS.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{name} against the step"', 1)


def _rendered(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window, narrower at the ends."""
    half = max(1, round(_SMOOTHING_SHARE * len(values) / 2))
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def _step_axis(axes: Axes, curves: Curves) -> None:
    """Steps on a square-root axis where checkpoints are denser early, ticks at checkpoints."""
    steps = curves.steps
    last = max([1, *steps, *(row["step"] for row in curves.metrics[-1:])])
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    if gaps and max(gaps) > 3 * min(gaps):
        axes.set_xscale("function", functions=(_signed_root, _signed_square))
        axes.set_xlabel("optimizer step (square-root scale)")

        def place(step: float) -> float:
            return math.sqrt(step / last)
    else:
        axes.set_xlabel("optimizer step")

        def place(step: float) -> float:
            return step / last

    ticks: list[int] = []
    for step in sorted(set(steps), reverse=True):  # the last checkpoint always has its number
        if not ticks or place(ticks[-1]) - place(step) > 0.09:
            ticks.append(step)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlim(0, last)


def _signed_root(value: Any) -> Any:
    return abs(value) ** 0.5 * ((value > 0) * 2 - 1)


def _signed_square(value: Any) -> Any:
    return value**2 * ((value > 0) * 2 - 1)
