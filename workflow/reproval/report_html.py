"""report.html: one file that opens offline, with its style, script and figures inside."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape

from reproval import report_plots, words
from reproval.report_content import Report
from reproval.templates import FOLDER, environment

# What a page that stays quick to open holds; the rest is in report.json and scores.parquet, and the page says so.
SCORE_ROWS = 3000
PAIR_ROWS = 500
SCORE_CHARTS = 24
CHART_MODELS = 12
MEMORY_CHARTS = 24
TASK_ROWS = 1500


def figures(report: Report) -> dict[str, Any]:
    """Inline SVG by place: `scores` in the order of the headlines, `memory` in the order of the models."""
    drawn: dict[str, Any] = {"scores": [], "memory": []}
    if len(report.models) <= CHART_MODELS:
        shared = report_plots.score_range(report.headlines)
        for index, line in enumerate(report.headlines[:SCORE_CHARTS]):
            drawn["scores"].append(report_plots.scores(line, report.models, shared, f"score{index}"))
    for index, entry in enumerate(report.memory):
        drawn["memory"].append(report_plots.memory(entry, f"memory{index}") if index < MEMORY_CHARTS else None)
    return drawn


def shown_scores(report: Report) -> list[dict[str, Any]]:
    """The score rows of the page: tasks and groups before subtasks where not all have room."""
    rows = [dict(zip(report.scores.columns, row, strict=True)) for row in report.scores.rows]
    if len(rows) > SCORE_ROWS:
        rows = sorted(rows, key=lambda row: not row["top"])
    return rows[:SCORE_ROWS]


def unbroken(text: str, names: list[str]) -> Markup:
    """Text as HTML in which names of models do not break at their hyphens, unless they are long."""
    safe = escape(text)
    for name in sorted((n for n in names if len(n) <= 24), key=len, reverse=True):
        # Bounded by spaces or commas, so that a name inside a longer one is left alone.
        pattern = rf"(?<![\w>.-]){re.escape(str(escape(name)))}(?![\w<.-])"
        safe = Markup(re.sub(pattern, f'<span class="keep">{escape(name)}</span>', safe))
    return Markup(safe)


def render(report: Report) -> str:
    env = environment(autoescape=True)
    env.filters["unbroken"] = unbroken
    drawn = figures(report)
    return env.get_template("report.html.j2").render(
        report=report,
        charts={name: [Markup(svg) if svg else None for svg in found] for name, found in drawn.items()},
        rows=shown_scores(report),
        pairs=report.comparisons[:PAIR_ROWS],
        series=report_plots.SERIES,
        task_rows=TASK_ROWS,
        style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        script=Markup((FOLDER / "report.js").read_text(encoding="utf-8")),
        words=words,
    )
