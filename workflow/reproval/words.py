"""Numbers and findings as people read them; HTML and Markdown print the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reproval.report_content import Headline, Pair


def number(value: float | None, digits: int = 3) -> str:
    """A score as people read it: fixed decimals below 10, four significant digits above."""
    if value is None:
        return "–"
    if abs(value) < 10:
        return f"{value:.{digits}f}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def finding(pair: Pair) -> str:
    interval = f"95 % interval {number(pair.low)} to {number(pair.high)}, " if pair.low is not None else ""
    p = p_text(pair.p_holm)
    tail = f"({interval}adjusted p {p if p.startswith('<') else '= ' + p}, {pair.n} questions)"
    marks = f" A score-changing lever was pulled ({'; '.join(pair.score_levers)})." if pair.score_levers else ""
    if pair.scale == "ratio":
        return (
            f"{pair.task}: the {pair.metric} of {pair.a} is {number(pair.effect)} times that of {pair.b} {tail}.{marks}"
        )
    more = "more" if pair.effect > 0 else "less"
    return (
        f"{pair.task}: {pair.a} scores {number(abs(pair.effect))} {more} than {pair.b} in {pair.metric} {tail}.{marks}"
    )


def answer(lines: Sequence[Headline], models: Sequence[str], pairs: Sequence[Pair]) -> str:
    questions = sum(max((c.n or 0 for c in line.cells if c), default=0) for line in lines)
    what = f"{count(len(models), 'model')} on {count(len(lines), 'task')}, {questions:,} questions."
    if not pairs:
        return f"{what} Nothing is compared." if len(models) > 1 else what
    significant = sum(p.significant for p in pairs)
    if significant:
        which = "it is" if len(pairs) == 1 else f"{significant} {'is' if significant == 1 else 'are'}"
        return f"{what} Of {count(len(pairs), 'comparison')}, {which} significant at 5 % after correction."
    reach = [p.detectable for p in pairs if p.detectable is not None and p.scale == "difference"]
    could = f" The samples are large enough to show differences of {number(min(reach))} and more." if reach else ""
    return f"{what} Of {count(len(pairs), 'comparison')} none is significant at 5 % after correction.{could}"


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


_PHASES = {"kv_cache": "KV", "capture": "graphs"}


def phase_name(phase: str) -> str:
    """A phase as a label: a task's own name, without the suite."""
    return phase.removeprefix("task:").split("/", 1)[-1] if phase.startswith("task:") else _PHASES.get(phase, phase)


def size(value: int | None) -> str:
    """Bytes in MiB below 1 GiB, else in GiB."""
    if value is None:
        return "–"
    if value < 2**30:
        return f"{value / 2**20:.0f} MiB"
    return f"{value / 2**30:.2f} GiB" if value < 10 * 2**30 else f"{value / 2**30:.1f} GiB"


def duration(seconds: float | None) -> str:
    """Seconds below two minutes, then minutes and seconds, then hours and minutes."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def parameters(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def signed(value: float | None, scale: str) -> str:
    """A difference with its sign, or a ratio with its multiplication sign."""
    if value is None:
        return "–"
    return (
        f"×{number(value)}"
        if scale == "ratio"
        else ("+" if value > 0 else "−" if value < 0 else "") + number(abs(value))
    )


def setting(value: object) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
