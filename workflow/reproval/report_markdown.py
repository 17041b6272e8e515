"""report.md: the same content for GitHub, terminals and diffs."""

from __future__ import annotations

from reproval.report_content import Report
from reproval.templates import environment

SCORE_ROWS = 400
PAIR_ROWS = 200


def cell(value: object) -> str:
    """Text that cannot break out of a table cell, and is no HTML: tokens are called <s> and <bos>."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def render(report: Report) -> str:
    env = environment(autoescape=False)
    env.filters["cell"] = cell
    rows = [dict(zip(report.scores.columns, row, strict=True)) for row in report.scores.rows[:SCORE_ROWS]]
    return env.get_template("report.md.j2").render(report=report, rows=rows, pairs=report.comparisons[:PAIR_ROWS])
