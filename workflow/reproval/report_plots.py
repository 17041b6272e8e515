"""The report's figures as inline SVG, drawn by matplotlib.

Colours are drawn as marks and turned into CSS variables, so that one figure serves the light and the dark page; text
stays text, in the page's own font. Chosen over Vega or Plotly, whose scripts alone are larger than the whole report.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reproval.report_content import Headline, Memory
from reproval.words import number, phase_name

# CSS pixels, near what the page gives a figure at any width, so that text keeps its size.
SCORE_WIDTH, MEMORY_WIDTH = 330, 430
SERIES = 8

# Marks that stand for CSS variables until the figure is written.
_INK, _MUTED, _LINE, _BAND, _MARK = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _BAND: "--band", _MARK: "--mark"}
_SERIES = [f"#06060{i}" for i in range(SERIES)]
_VARIABLES |= {mark: f"--s{i}" for i, mark in enumerate(_SERIES)}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reproval",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.solid_capstyle": "round",
    "figure.dpi": 72,
}


def _figure(width: int, height: int) -> Figure:
    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_visible(False)
    return figure


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element for a page that holds several: own ids, CSS colours, an accessible name."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", body)
    body = body.replace("font-family: 'DejaVu Sans'; ", "")
    body = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", body)
    for mark, variable in _VARIABLES.items():
        body = body.replace(mark, f"var({variable})")
    # Hundredths of a pixel are enough; the text between the tags is left alone.
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)
    body = re.sub(r"\n\s*", "\n", body)
    _, _, rest = body.partition(">")
    width, tall = figure.get_size_inches() * 72
    box = f"0 0 {width:.0f} {tall:.0f}"
    return f'<svg role="img" viewBox="{box}" aria-label="{html.escape(description)}">{rest.strip()}'


def _short(name: str, length: int = 20) -> str:
    """The middle goes: the ends of model names are what tells them apart."""
    return name if len(name) <= length else f"{name[: length - 9]}…{name[-8:]}"


def score_range(lines: Sequence[Headline]) -> tuple[float, float]:
    """One range for all scores between 0 and 1, so that their charts compare."""
    ends = [
        x
        for line in lines
        for cell in line.cells
        if cell and is_share(line)
        for x in (cell.low if cell.low is not None else cell.value, cell.high if cell.high is not None else cell.value)
    ]
    if not ends:
        return 0.0, 1.0
    return max(0.0, np.floor(min(ends) * 10) / 10), min(1.0, np.ceil(max(ends) * 10) / 10)


def is_share(line: Headline) -> bool:
    return line.higher_is_better is not False and all(0 <= c.value <= 1 for c in line.cells if c)


def scores(line: Headline, models: Sequence[str], shared: tuple[float, float], name: str) -> str:
    """One task: a dot and a 95 % interval for each model, in the order of the models."""
    cells = [(model, cell) for model, cell in zip(models, line.cells, strict=True) if cell]
    with mpl.rc_context(_STYLE):
        height = 34 + 24 * len(cells)
        figure = _figure(SCORE_WIDTH, height)
        left, right = 8 + 6.6 * min(20, max(len(m) for m, _ in cells)), 62
        axes = figure.add_axes(
            (left / SCORE_WIDTH, 26 / height, 1 - (left + right) / SCORE_WIDTH, (24 * len(cells)) / height)
        )
        for row, (model, cell) in enumerate(cells):
            colour = _SERIES[models.index(model) % SERIES]
            if cell.low is not None and cell.high is not None:
                axes.plot([cell.low, cell.high], [row, row], color=colour, linewidth=2.6, alpha=0.45)
            hollow = bool(cell.score_levers)
            fill = _BAND if hollow else colour
            # Not clipped: a score of 0 or 1 lies on the edge.
            axes.plot([cell.value], [row], "o", ms=8, mfc=fill, mec=colour, mew=1.8, clip_on=False)
            axes.text(
                1 + 10 / (SCORE_WIDTH - left - right), row, number(cell.value) + ("†" if hollow else ""),
                transform=axes.get_yaxis_transform(), va="center", ha="left", fontsize=11, fontweight="bold",
            )  # fmt: skip
        if is_share(line):
            axes.set_xlim(*shared)
        else:
            axes.margins(x=0.12)
        axes.set_ylim(len(cells) - 0.5, -0.5)
        axes.set_yticks(range(len(cells)), [_short(model) for model, _ in cells], color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.tick_params(length=0, pad=6)
        axes.grid(axis="x", color=_LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.patch.set_visible(False)
        said = ", ".join(
            f"{model} {number(cell.value)}"
            + (f" ({number(cell.low)} to {number(cell.high)})" if cell.low is not None else "")
            for model, cell in cells
        )
        return _svg(figure, name, f"{line.task}, {line.metric}, with 95 % intervals: {said}")


def memory(entry: Memory, name: str) -> str | None:
    """Memory over time, the phases behind it, the prediction as a dashed line. None without a trace."""
    if entry.curve is None:
        return None
    gib = 2**30
    device = {k: v for k, v in entry.curve.series.items() if (k == "host") == (entry.device == "host")}
    if not device:
        return None
    times = np.asarray(entry.curve.t_s)
    with mpl.rc_context(_STYLE):
        height = 208
        figure = _figure(MEMORY_WIDTH, height)
        axes = figure.add_axes((46 / MEMORY_WIDTH, 24 / height, 1 - 62 / MEMORY_WIDTH, 1 - 48 / height))
        top = max(max(v) for v in device.values()) / gib
        if entry.predicted_bytes:
            top = max(top, entry.predicted_bytes / gib)
        with_limit = 0 < entry.capacity_bytes / gib < 1.4 * top
        ceiling = (max(top, entry.capacity_bytes / gib) if with_limit else top) * 1.13
        end = max(float(times[-1]), 1e-9)
        for index, phase in enumerate(entry.phases):
            if index % 2 == 0:
                axes.axvspan(phase.begin_s, phase.end_s, color=_BAND, linewidth=0)
            label = _short(phase_name(phase.phase), 16)
            if (phase.end_s - phase.begin_s) / end * (MEMORY_WIDTH - 62) > 5.8 * len(label) + 4:
                middle = (phase.begin_s + phase.end_s) / 2
                axes.text(middle, ceiling * 1.025, label, ha="center", va="bottom", fontsize=9.5, color=_MUTED)
        for index, values in enumerate(device.values()):
            shown = np.asarray(values) / gib
            if index == 0:
                axes.fill_between(times, shown, color=_SERIES[0], alpha=0.11, linewidth=0)
            axes.plot(times, shown, color=_SERIES[0], linewidth=1.8 if index == 0 else 0.9)
        if entry.predicted_bytes:
            at = entry.predicted_bytes / gib
            axes.axhline(at, color=_MARK, linewidth=1.4, dashes=(5, 3))
            axes.text(end * 0.995, at + 0.012 * ceiling, "predicted", ha="right", va="bottom", fontsize=10, color=_MARK)
        if with_limit:
            at = entry.capacity_bytes / gib
            axes.axhline(at, color=_MUTED, linewidth=0.9)
            axes.text(0.005 * end, at - 0.012 * ceiling, "available", ha="left", va="top", fontsize=10, color=_MUTED)
        axes.set_xlim(0, end)
        axes.set_ylim(0, ceiling)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter("{x:g} s")
        axes.tick_params(length=0, pad=6)
        axes.grid(axis="y", color=_LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.patch.set_visible(False)
        axes.text(-0.02, 1.02, "GiB", transform=axes.transAxes, ha="right", va="bottom", fontsize=10, color=_MUTED)
        said = f"highest {max(max(v) for v in device.values()) / gib:.2f} GiB"
        if entry.predicted_bytes:
            said += f", predicted {entry.predicted_bytes / gib:.2f} GiB"
        return _svg(figure, name, f"{entry.device} memory of {entry.model} over {end:.0f} seconds: {said}")
