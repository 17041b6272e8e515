"""The Jinja environment of the report's templates."""

from __future__ import annotations

from pathlib import Path

import jinja2

from reproval import words

FOLDER = Path(__file__).parent.parent / "report"


def environment(autoescape: bool) -> jinja2.Environment:
    """Templates of workflow/report, with the words of `words` as filters. A name that is missing is an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in (
        "number",
        "p_text",
        "size",
        "duration",
        "parameters",
        "signed",
        "setting",
        "phase_name",
        "count",
        "answered",
    ):
        env.filters[name] = getattr(words, name)
    env.globals["repeats_note"] = words.REPEATS
    return env
