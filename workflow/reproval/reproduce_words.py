"""The verdicts as people read them: a table for the terminal, and results/reproduction.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reproval.report_markdown import cell
from reproval.reproduce_content import Reproduction, ScoreVerdict
from reproval.text_table import text_table
from reproval.verdict import ALPHA

COLUMNS = ("model", "task", "metric", "reference", "here", "difference [95 %]", "margin", "could show", "verdict")
MEANING = (
    "reproduced: the difference is shown to be smaller than the margin. differs: a difference is shown. inconclusive: "
    "neither is, with so few documents; `could show` is the smallest difference that would have been found four times "
    "in five."
)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) >= 10 else f"{value:.4f}"


def _effect(score: ScoreVerdict) -> str:
    if score.verdict == "identical":
        return "none"
    if score.effect is None:
        return ""
    sign = "" if score.scale == "ratio" else "+"
    times = "x" if score.scale == "ratio" else ""
    interval = f" [{score.low:{sign}.4f}, {score.high:{sign}.4f}]" if score.low is not None else ""
    return f"{times}{score.effect:{sign}.4f}{interval}"


def _plus_minus(score: ScoreVerdict, value: float | None) -> str:
    if value is None:
        return ""
    return f"x{1 + value:.4f}" if score.scale == "ratio" else f"{value:.4f}"


def _tasks(reproduction: Reproduction) -> list[str]:
    """Each score's task; with its suite where there are several, as a task may be in two with other settings."""
    several = len({score.suite for score in reproduction.scores}) > 1
    return [f"{score.task} ({score.suite})" if several else score.task for score in reproduction.scores]


def _metric(score: ScoreVerdict) -> str:
    """As lm-eval writes it. Without a space, because remarks list several scores."""
    return score.metric if score.filter == "none" else f"{score.metric},{score.filter}"


def _rows(reproduction: Reproduction) -> list[tuple[str, ...]]:
    return [
        (
            score.model,
            task,
            _metric(score),
            _figure(score.reference),
            _figure(score.here),
            _effect(score),
            _plus_minus(score, score.margin),
            _plus_minus(score, score.detectable),
            score.verdict,
        )
        for score, task in zip(reproduction.scores, _tasks(reproduction), strict=True)
    ]


def _said(score: ScoreVerdict) -> list[str]:
    """Notes, the first difference, and what the samples say."""
    said = list(score.notes)
    if score.unlike:
        first, more = score.unlike[0], len(score.unlike) - 1
        text = first.here if first.what == "prompt" else f"{first.reference} in the reference, {first.here} here"
        said.append(f"first difference: {first.what}: {text}" + (f" (and {more} more)" if more else ""))
    if (s := score.samples) is not None:
        largest = s.largest_log_probability_difference
        nats = f", log-probabilities at most {largest:.2g} nats apart" if largest is not None else ""
        bits = "every response the same bit for bit" if s.equal_bits else f"not the same bits{nats}"
        missing = f", {s.only_reference} not here, {s.only_here} only here" if s.only_reference or s.only_here else ""
        changed = f"{s.changed_prompts} prompts and {s.changed_answers} answers changed"
        said.append(f"{s.documents} documents{missing}, {changed}, {bits}")
        said += [f"changed answer: {text}" for text in s.changed]
    return said


def _remarks(reproduction: Reproduction) -> list[str]:
    """What is said of the scores: each text once, with the scores that it is about.

    A model is named where the same is not said of all that have the score.
    """
    about: dict[str, dict[str, list[str]]] = {}
    models: dict[str, list[str]] = {}
    for score, task in zip(reproduction.scores, _tasks(reproduction), strict=True):
        name = f"{task} {_metric(score)}"
        models.setdefault(name, []).append(score.model)
        for text in _said(score):
            about.setdefault(text, {}).setdefault(name, []).append(score.model)
    lines = []
    for text, scores in about.items():
        if sum(map(len, scores.values())) == len(reproduction.scores) > 1:
            where = "all scores"
        else:
            where = ", ".join(
                name if found == models[name] else f"{name} of {' and '.join(found)}" for name, found in scores.items()
            )
        lines.append(f"{where}: {text}")
    return lines


def table_text(reproduction: Reproduction) -> str:
    """The verdicts for a terminal."""
    parts = [
        f"{reproduction.title}: {reproduction.verdict.upper()}",
        f"reference: {reproduction.source}",
        "",
        text_table(COLUMNS, _rows(reproduction)),
        "",
    ]
    return "\n".join([*parts, *_remarks(reproduction), "", MEANING]) + "\n"


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(map(cell, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def table_markdown(reproduction: Reproduction) -> str:
    """The verdicts as results/reproduction.md."""
    lines = [
        f"# {reproduction.title}: {reproduction.verdict}",
        "",
        f"Reference: {reproduction.source}. Margin: {reproduction.margin_because}.",
        "",
        *_markdown_table(COLUMNS, _rows(reproduction)),
        "",
        *(f"- {cell(line)}" for line in _remarks(reproduction)),
        "",
        f"{MEANING} Two one-sided tests and a test of difference at {ALPHA:.2g}, each corrected over the table (Holm).",
    ]
    pairs = zip(reproduction.scores, _tasks(reproduction), strict=True)
    if unlike := [(s.model, task, e.what, e.reference, e.here) for s, task in pairs for e in s.unlike]:
        head = ("model", "task", "what", "reference", "here")
        lines += ["", "## What was not the same", "", *_markdown_table(head, dict.fromkeys(unlike))]
    return "\n".join(lines) + "\n"
