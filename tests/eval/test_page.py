"""Pieces of the report that no demo run is sure to show."""

from typing import Any

import pytest

from longcot.eval.charts import CHARTS, Curves, chart_svg
from longcot.eval.page import escaped, split_thinking


@pytest.mark.parametrize(
    ("response", "thinking", "answer"),
    [
        ("<think>\na\n</think>\nb", "a", "b"),
        ("<think>a", "a", ""),
        ("no tags", None, "no tags"),
        ("", None, ""),
        # The verifier reads what follows the last </think>, so that is the answer shown.
        ("<think>a</think>b</think>c", "a</think>b", "c"),
        ("a</think>b", "a", "b"),  # the template itself may open the thinking
    ],
)
def test_thinking_is_parted_as_the_verifier_parts_it(
    response: str, thinking: str | None, answer: str
) -> None:
    assert split_thinking(response) == (thinking, answer)


def test_escaping_leaves_nothing_active_or_unseen() -> None:
    text = escaped("<a href='x'>&\"\x07\u202e\ud800\n\t\u00e9")
    assert text == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;\ufffd\ufffd\ufffd\n\t\u00e9"
    text.encode()


def result(step: int, accuracy: float, error: float | None) -> dict[str, Any]:
    quantiles = {"0.05": 1.0, "0.25": 2.0, "0.5": 3.0, "0.75": 4.0, "0.95": 5.0}
    return {
        "step": step,
        "accuracy": accuracy,
        "standard_error": error,
        "mean_response_tokens": 3.0,
        "response_tokens_quantiles": quantiles,
    }


CURVES = {
    "one checkpoint, no metrics": Curves(metrics=[], results=[result(0, 0.0, None)]),
    "even steps": Curves(
        metrics=[{"step": i + 1, "loss": 2.0} for i in range(30)],
        results=[result(step, step / 40, 0.1) for step in (0, 10, 20, 30)],
    ),
    "dense early steps, a loss that is not finite": Curves(
        metrics=[{"step": 1, "loss": float("nan")}, {"step": 800, "loss": 1.0}],
        results=[result(step, 1.0, 0.0) for step in (0, 1, 5, 50, 800)],
    ),
}


@pytest.mark.parametrize("curves", CURVES.values(), ids=CURVES.keys())
@pytest.mark.parametrize("name", CHARTS)
def test_charts_draw_and_take_the_pages_colours(name: str, curves: Curves) -> None:
    svg = chart_svg(name, curves)
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert "http" not in svg and "xmlns" not in svg
    assert "var(--ink)" in svg and "#1b1f24" not in svg
    assert svg == chart_svg(name, curves), "the same data must give the same bytes"
