"""One report of all models, as HTML, Markdown and JSON: `python -m reproval.report`.

The content is built once, as a `Report`; the three renderings only print it, so they cannot disagree.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from reproval import collect, repeats, report_facts, words
from reproval.collect import ModelData
from reproval.compare import comparisons, headlines
from reproval.files import RecordError, atomic
from reproval.manifests import Manifests
from reproval.manifests import read as read_manifests
from reproval.report_content import AttemptRow, Report, ScoreTable
from reproval.scrub import leaks, scrub
from reproval.templates import FOLDER

SCORE_COLUMNS = [
    "model", "suite", "task", "metric", "filter", "value", "stderr", "n", "interval_low", "interval_high",
    "interval_method", "repeats", "repeat_sd", "higher_is_better", "group", "top", "n_shot", "limit", "score_levers",
    "prompts_cut", "task_version", "task_hash", "key",
]  # fmt: skip


def methods_file() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "methods.yaml").read_text(encoding="utf-8"))
    return loaded


def build(models: Sequence[ModelData], manifests: Manifests | None = None, project: Path | None = None) -> Report:
    """The whole content. Paths outside `project` (default: the working directory) and secrets are taken out."""
    known = methods_file()
    whole = repeats.together(models)
    table = collect.rows(whole)
    labels = [m.label for m in whole]
    lines = headlines(table, labels, known["headline"])
    pairs, untested = comparisons(whole, lines)
    used = dict.fromkeys(row["interval_method"] for row in table if row["interval_method"])
    tests = dict.fromkeys(p.method for p in pairs)
    methods = {name: known["intervals"][name] for name in used} | {name: known["comparisons"][name] for name in tests}
    if pairs:
        methods |= {"Holm's correction": known["correction"], "detectable difference": known["detectable"]}
    if any(m.noise for m in whole):
        methods["repeats"] = known["repeats"]
    rows = [[row[c] for c in SCORE_COLUMNS] for row in table]
    fits = [report_facts.fit(m) for m in whole]
    cuts = [cut for m in models for cut in report_facts.cuts(m)]
    several = len({line.suite for line in lines}) > 1
    content: dict[str, Any] = {
        "title": words.title(labels, len(lines)),
        "answer": words.answer(lines, labels, pairs),
        "notices": words.notices(
            fits,
            lines,
            cuts,
            report_facts.sampled(models),
            report_facts.marked(models, report_facts.with_endless_thoughts),
            report_facts.marked(models, report_facts.without_numbers),
            report_facts.marked(models, report_facts.with_remote_code),
            report_facts.marked(models, report_facts.with_changed_workflow),
        ),
        "findings": [words.finding(p, several) for p in pairs if p.significant],
        "models": labels,
        "headlines": lines,
        "comparisons": pairs,
        "untested": untested,
        "fits": fits,
        "memory": [report_facts.memory(m) for m in whole],
        "timing": [report_facts.timing(m) for m in models],
        "attempts": [
            AttemptRow(model=report_facts.run_name(m), number=i, attempt=a)
            for m in models
            for i, a in enumerate(m.evaluation.attempts, start=1)
        ],
        "cuts": cuts,
        "provenance": report_facts.provenance(models, manifests or Manifests()),
        "commands": report_facts.commands(models),
        "methods": methods,
        "scores": ScoreTable(columns=SCORE_COLUMNS, rows=rows),
        "removed": 0,
    }
    clean, removed = scrub(Report(**content).model_dump(mode="json"), project or Path.cwd())
    return Report.model_validate({**clean, "removed": removed})


def main(arguments: Sequence[str] | None = None) -> int:
    # Drawing is slow to import, and a test of the content needs none of it.
    from reproval import report_html
    from reproval.report_markdown import render as markdown

    parser = argparse.ArgumentParser(prog="python -m reproval.report", fromfile_prefix_chars="@", description=__doc__)
    parser.add_argument(
        "--results", type=Path, required=True, help="folder that the evaluations' units are relative to"
    )
    parser.add_argument("--evaluations", type=Path, nargs="+", required=True, help="evaluation.json of every model")
    parser.add_argument("--manifests", type=Path, nargs="*", default=[], help="of models and suites")
    parser.add_argument("--html", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        models = collect.load(options.results, options.evaluations)
        report = build(models, read_manifests(options.manifests))
    except RecordError as error:
        print(f"reproval.report: {error}", file=sys.stderr)
        return 1
    renderings: list[tuple[Path | None, Callable[[Report], str]]] = [
        (options.json, lambda r: r.model_dump_json() + "\n"),
        (options.markdown, markdown),
        (options.html, report_html.render),
    ]
    for path, render in renderings:
        if path is None:
            continue
        text = render(report)
        if found := leaks(text):
            print(f"reproval.report: {path}: not written, it would show {found}", file=sys.stderr)
            return 1
        with atomic(path) as stream:
            stream.write(text)
        print(path)
    return 0


if __name__ == "__main__":
    # Records have no cycles. Looking for some among those of 100,000 scores takes a fifth of the time.
    gc.disable()
    sys.exit(main())
