"""The page of a run as one string of HTML that loads nothing and runs nothing.

Whatever a model or a data set wrote goes through `escaped` on its way into the page.
"""

import html
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import CHARTS, Curves, chart_svg
from .generate import Job, read_samples
from .page_style import STYLE
from .stats import Z_95
from .targets import num_parameters
from .tasks import Question, Score

NUM_SHOWN = 5
"""Problems whose responses are shown for every checkpoint."""

Shown = tuple[dict[str, Any], Score]
"""A sample and the verdict on it."""


def escaped(text: object) -> str:
    """Text made safe to stand anywhere in HTML; characters that cannot be seen become U+FFFD."""
    visible = (
        c if c in "\n\t" or not unicodedata.category(c).startswith("C") else "\ufffd"
        for c in str(text)
    )
    return html.escape("".join(visible))


def split_thinking(response: str) -> tuple[str | None, str]:
    """Thinking and answer of a response, parted where the verifier parts them.

    Thinking is None where there is none; the answer is empty where thinking never ends.
    """
    thinking, closed, answer = response.rpartition("</think>")
    if not closed:
        if "<think>" not in response:
            return None, response.strip()
        thinking, answer = response, ""
    return thinking.replace("<think>", "", 1).strip("\n"), answer.strip()


def render_page(
    run: Path,
    jobs: Sequence[Job],
    curves: Curves,
    summary: dict[str, Any],
    manifest: dict[str, Any],
) -> str:
    """The whole page.

    Args:
        run: the run directory; its name is the title.
        jobs: one task on the evaluated checkpoints, in step order, each with its samples on disk.
        curves: what the charts draw; its results are those of `jobs`.
        summary: the content of summary.json.
        manifest: the run's manifest.json.
    """
    body = "\n".join(
        [
            _header(run, jobs[-1], curves.results, summary, manifest),
            _charts(curves),
            _checkpoint_table(curves.results),
            _responses(jobs),
            _footer(curves.results[-1], manifest),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Belt to the braces of escaping: the page may load nothing and run nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escaped(run.resolve().name)} - longcot</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(
    run: Path,
    last: Job,
    results: Sequence[dict[str, Any]],
    summary: dict[str, Any],
    manifest: dict[str, Any],
) -> str:
    first_accuracy, last_accuracy = results[0]["accuracy"], results[-1]["accuracy"]
    error = results[-1]["standard_error"]
    margin = "" if error is None else f"&#8202;&plusmn;&#8202;{100 * Z_95 * error:.1f}"
    seconds = summary["seconds"]
    known = [value for value in seconds.values() if value is not None]
    stages = " + ".join(
        f"{escaped(name)} {_duration(value)}"
        for name, value in seconds.items()
        if value is not None
    )
    facts = [
        f"recipe <b>{escaped(manifest['recipe'])}</b>" if manifest.get("recipe") else "",
        f"<b>{_count(num_parameters(last.target.model))}</b> parameters",
        escaped(summary["device"]) if summary["device"] else "",
        f"commit <code>{escaped(str(manifest['commit'])[:10])}</code>"
        if manifest.get("commit")
        else "",
    ]
    tiles = [
        (f"{100 * last_accuracy:.1f}{margin}&#8202;%",
         f"accuracy at step&nbsp;{results[-1]['step']:,}; {100 * first_accuracy:.1f}&#8202;% at "
         f"step&nbsp;{results[0]['step']:,}"),
        (f"{results[-1]['num_problems']:,}",
         f"held-out problems ({escaped(last.task.name)}), never trained on"),
        (f"{results[-1]['mean_response_tokens']:,.0f}",
         f"tokens in the mean response; {100 * results[-1]['truncated']:.1f}&#8202;% cut&nbsp;off"),
        (_duration(sum(known)), stages),
    ]  # fmt: skip
    boxes = "".join(f"<div><dt>{note}</dt><dd>{value}</dd></div>" for value, note in tiles)
    return (
        f'<header class="top"><p class="kicker">longcot training report</p>'
        f"<h1>{escaped(run.resolve().name)}</h1>"
        f'<p class="facts">{" &middot; ".join(fact for fact in facts if fact)}</p>'
        f'<dl class="tiles">{boxes}</dl></header>'
    )


def _charts(curves: Curves) -> str:
    notes = {
        "loss": "Every step, with its running mean.",
        "accuracy": "Each checkpoint sampled with vLLM; band: 95 % interval.",
        "length": "Mean; band: the middle half of the responses.",
    }
    figures = "".join(
        f"<figure>{chart_svg(name, curves)}<figcaption>{notes[name]}</figcaption></figure>"
        for name in CHARTS
    )
    return f'<section><h2>The training</h2><div class="charts">{figures}</div></section>'


def _checkpoint_table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for row in results:
        error = row["standard_error"]
        margin = "" if error is None else f"&plusmn;&#8202;{100 * Z_95 * error:.1f}"
        wrong = [f"{count}&#215; {escaped(reason)}" for reason, count in row["reasons"].items()
                 if reason != "correct"]  # fmt: skip
        quartiles = row["response_tokens_quantiles"]
        rows.append(
            f'<tr><th scope="row"><a href="#step-{row["step"]}">{row["step"]:,}</a></th>'
            f'<td><span class="bar" style="--share:{100 * row["accuracy"]:.2f}%"></span>'
            f'<span class="share">{100 * row["accuracy"]:.1f}&#8202;%</span> '
            f"<small>{margin}</small></td>"
            f"<td>{row['mean_response_tokens']:,.0f}</td>"
            f"<td>{quartiles['0.5']:,.0f} <small>({quartiles['0.05']:,.0f}&ndash;"
            f"{quartiles['0.95']:,.0f})</small></td>"
            f"<td>{100 * row['truncated']:.1f}&#8202;%</td>"
            f"<td>{100 * row['unparsed']:.1f}&#8202;%</td>"
            f'<td class="text">{", ".join(wrong[:3])}</td></tr>'
        )
    return (
        '<section><h2>Checkpoints</h2><div class="wide"><table><thead><tr><th>step</th>'
        "<th>accuracy</th><th>mean tokens</th><th>median <small>(5&ndash;95 %)</small></th>"
        '<th>cut off</th><th>no answer</th><th class="text">what went wrong, by count</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _responses(jobs: Sequence[Job]) -> str:
    questions = _spread(jobs[-1].questions, NUM_SHOWN)
    shown = [_first_samples(job, questions) for job in jobs]
    blocks = []
    for index, (job, samples) in enumerate(zip(jobs, shown, strict=True)):
        cards = "".join(
            _card(job, number, question, samples[question.id])
            for number, question in enumerate(questions, start=1)
        )
        marks = "".join(_mark(samples[question.id][1]) for question in questions)
        is_open = " open" if index == len(jobs) - 1 else ""
        blocks.append(
            f'<details class="step" id="step-{job.target.step}"{is_open}><summary>'
            f"<span>Step {job.target.step:,}</span> <span class=marks>{marks}</span></summary>"
            f"{cards}</details>"
        )
    return (
        f"<section><h2>What the model wrote</h2><p>The same {len(questions)} problems for every "
        "checkpoint, spread evenly over the held-out set and not chosen by outcome, so that one "
        f"problem can be followed through the training.</p>{_grid(jobs, questions, shown)}"
        f"{''.join(blocks)}</section>"
    )


def _grid(
    jobs: Sequence[Job], questions: Sequence[Question], shown: Sequence[dict[str, Shown]]
) -> str:
    """Problems down, checkpoints across, right or wrong in each cell, linked to the response."""
    head = "".join(f"<th>{job.target.step:,}</th>" for job in jobs)
    rows = []
    for number, question in enumerate(questions, start=1):
        cells = "".join(
            f'<td><a href="#step-{job.target.step}-{number}">'
            f"{_mark(samples[question.id][1])}</a></td>"
            for job, samples in zip(jobs, shown, strict=True)
        )
        text = " ".join(question.messages[-1]["content"].split())
        short = text if len(text) <= 60 else f"{text[:57]}..."
        rows.append(f'<tr><th scope="row" class="text">{escaped(short)}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table class="grid"><thead><tr><th class="text">problem \\ step</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _card(job: Job, number: int, question: Question, shown: Shown) -> str:
    sample, score = shown
    thinking, answer = split_thinking(sample["response"])
    turns = "".join(f"<pre>{escaped(turn['content'])}</pre>" for turn in question.messages)
    folded = ""
    if thinking is not None:
        folded = (
            f"<details class=thinking open><summary>thinking</summary>"
            f"<pre>{escaped(thinking) or '(empty)'}</pre></details>"
        )
    empty = "(no answer: the thinking never ends)" if thinking is not None else "(nothing)"
    verdict = "right" if score.correct else "wrong"
    reason = "" if score.correct else f" {escaped(score.reason)}"
    cut = ", cut off" if sample["finish_reason"] == "length" else ""
    return (
        f'<article class="{verdict}" id="step-{job.target.step}-{number}"><header>'
        f'<span class="verdict">{_mark(score)} {verdict}</span>'
        f'<span class="reason">{reason}</span>'
        f'<span class="meta">{sample["response_tokens"]:,} tokens{cut}</span></header>'
        f'<div class="prompt">{turns}</div>{folded}'
        f'<div class="answer"><pre>{escaped(answer) or empty}</pre></div></article>'
    )


def _mark(score: Score) -> str:
    if score.correct:
        return '<span class="yes" title="right">&#10003;</span>'
    return '<span class="no" title="wrong">&#10007;</span>'


def _first_samples(job: Job, questions: Sequence[Question]) -> dict[str, Shown]:
    """The first sample of each question, judged."""
    rows = {row["id"]: row for row in read_samples(job.folder / "samples.jsonl")
            if row["sample"] == 0}  # fmt: skip
    return {
        question.id: (rows[question.id], job.task.score(rows[question.id]["response"], question))
        for question in questions
    }


def _spread(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` questions at equal distances, all if there are fewer."""
    count = min(count, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def _footer(result: dict[str, Any], manifest: dict[str, Any]) -> str:
    sampling = result["sampling"]
    limit = sampling["max_tokens"]
    versions = {**manifest.get("versions", {}), **result["versions"]}
    drawn = (
        f"temperature {sampling['temperature']}, top-p {sampling['top_p']}, "
        f"{sampling['num_samples']} sample per problem, at most "
        f"{f'{limit:,} tokens' if limit else 'as many tokens as the context holds'}"
    )
    return (
        f"<footer><p>{escaped(result['task'])} version {result['version']}; {drawn}; sampled on "
        f"{escaped(result['device'])}.</p><p>"
        f"{escaped(', '.join(f'{name} {value}' for name, value in versions.items()))}</p></footer>"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f}&#8202;s" if seconds < 10 else f"{seconds:.0f}&#8202;s"
    minutes = seconds / 60
    return f"{minutes:.1f}&#8202;min" if minutes < 100 else f"{minutes / 60:.1f}&#8202;h"


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}&#8202;{letter}"
    return str(number)
