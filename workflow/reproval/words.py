"""Numbers and findings as people read them; HTML and Markdown print the same words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from reproval.records import ScoringPath
from reproval.report_content import Cut, Fit, Headline, Notice, Pair


def number(value: float | None, digits: int = 3) -> str:
    """A score as people read it: fixed decimals below 10, four significant digits above; only 0 is printed as 0."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if 0 < abs(value) < 1e-6:
        return f"{value:.1e}"
    if abs(value) < 10:
        return f"{value:.{max(digits, _decimals(value))}f}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _decimals(value: float) -> int:
    """Decimals that leave a number below 0.001 two digits; else 0."""
    return 1 - math.floor(math.log10(abs(value))) if 0 < abs(value) < 0.001 else 0


def p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def finding(pair: Pair, several: bool = False) -> str:
    """One significant difference in a sentence, told from the side of the better model; of `several` suites, which."""
    effect, low, high, first, second = pair.effect, pair.low, pair.high, pair.a, pair.b
    if pair.better == pair.b:
        first, second = pair.b, pair.a
        turned = [None if x is None else 1 / x if pair.scale == "ratio" else -x for x in (effect, high, low)]
        effect, low, high = turned[0] or 0.0, turned[1], turned[2]
    verb = "is better than" if pair.better else "differs from"
    interval = (
        f"95\u00a0% interval {signed(low, pair.scale)} to {signed(high, pair.scale)}, " if low is not None else ""
    )
    p = p_text(pair.p_holm).replace(" ", "\u00a0")
    marks = f" With a score-changing lever: {'; '.join(pair.score_levers)}." if pair.score_levers else ""
    where = f"{pair.task} ({pair.suite})" if several else pair.task
    return (
        f"{where}: {first} {verb} {second}, {pair.metric} {signed(effect, pair.scale)} "
        f"({interval}adjusted p\u00a0{p if p.startswith('<') else '= ' + p}, {pair.n:,} questions).{marks}"
    )


def title(models: Sequence[str], tasks: int) -> str:
    names = [models[0]] if len(models) == 1 else [", ".join(models[:-1]) + " and " + models[-1]]
    who = names[0] if len(models) <= 3 else f"{len(models)} models"
    return f"How {who} score{'s' if len(models) == 1 else ''} on {count(tasks, 'task')}"


def answer(lines: Sequence[Headline], models: Sequence[str], pairs: Sequence[Pair]) -> str:
    """The first thing to know: which differences there are, or how small a one could have been seen."""
    questions = sum(max((c.n or 0 for c in line.cells if c), default=0) for line in lines)
    asked = f"{questions:,} questions"
    if len(models) == 1:
        return f"{models[0]} was asked {asked}. With one model nothing is compared."
    if not pairs:
        return f"{count(len(models), 'model')} were evaluated, and no two of them on the same questions."
    same = f"in {count(len(pairs), 'comparison')} on the same questions ({questions:,} in all)"
    significant = sum(p.significant for p in pairs)
    if significant:
        they = "difference is" if significant == 1 else "differences are"
        return f"{significant:,} {they} significant at 5\u00a0% after correction, {same}."
    reach = [p.detectable for p in pairs if p.detectable is not None and p.scale == "difference"]
    more = ""
    if reach:
        more = f" The smallest difference in score that a test here finds with 80\u00a0% power is {number(min(reach))}."
    return f"No difference is significant at 5\u00a0% after correction, {same}.{more}"


def limit(value: float) -> str:
    """lm-eval's limit: a number of documents, or below 1 a share of them."""
    return f"{100 * value:g} % of the documents" if value < 1 else count(round(value), "document")


def some(names: Sequence[str], most: int = 5) -> str:
    """Names as a list that stays short."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


UNASKED = (
    "nobody asked for it: lm-eval's vLLM model samples at temperature 1 where neither do_sample nor temperature is "
    "given; generation: {do_sample: false} takes the most likely tokens."
)


def notices(
    fits: Sequence[Fit],
    lines: Sequence[Headline],
    cuts: Sequence[Cut],
    sampled: Mapping[str, bool],
    endless: Sequence[str],
    broken: Sequence[str],
    remote: Sequence[str],
    changed: Sequence[str],
) -> list[Notice]:
    """What to know before using a number.

    `sampled` are tasks whose answers were drawn at random, and whether that was asked for, `endless` models that think
    and reached the length of their answers, `broken` those with log-probabilities that are NaN, `remote` those whose
    own code was allowed to run, `changed` those that a changed workflow evaluated.
    """
    found = []
    if marked := [fit.model for fit in fits if fit.changes_scores]:
        text = f"† Score-changing levers were pulled for {some(marked)}: the marked numbers are not those of the "
        found.append(Notice(text=f"{text}checkpoint as published.", section="fit"))
    limits: dict[float, list[str]] = {}
    for line in lines:
        if line.limit is not None:
            limits.setdefault(line.limit, []).append(f"{line.suite}/{line.task}")
    for value, tasks in limits.items():
        text = f"Only the first {limit(value)} of each task were asked in {some(tasks)} (limit): for trying out, not "
        found.append(Notice(text=f"{text}for publishing.", section="provenance"))
    prompts: dict[str, int] = {}
    for cut in cuts:
        if cut.cut:
            prompts[cut.model] = prompts.get(cut.model, 0) + cut.cut
    if prompts:
        each = some([f"{number:,} for {model}" for model, number in prompts.items()])
        text = f"Prompts that were longer than the engine's length lost their beginning: {each}."
        found.append(Notice(text=text, section="cuts"))
    if sampled:
        text = f"Answers were drawn at random in {some(list(sampled))}: asked again, a model gives others."
        if unasked := [task for task, asked in sampled.items() if not asked]:
            text += f" In {some(unasked)} {UNASKED}"
        found.append(Notice(text=text, section="provenance"))
    if endless:
        text = (
            f"Answers of {some(endless)} reached max_gen_toks. What has no think_end_token by then is judged as it is, "
        )
        found.append(Notice(text=f"{text}though it may be a thought.", section="cuts"))
    no_scores = [c.model for line in lines for c in line.cells if c and not math.isfinite(c.value)]
    if names := list(dict.fromkeys([*no_scores, *broken])):
        text = f"Scores or log-probabilities of {some(names)} are not numbers, as weights make them that are damaged "
        text += "or too large for their type. Other scores rest on the same weights."
        found.append(Notice(text=text, section="provenance"))
    if remote:
        text = f"Python code that came with the checkpoint was allowed to run for {some(remote)} (trust_remote_code)."
        found.append(Notice(text=text, section="provenance"))
    if changed:
        text = f"The workflow had changes beyond its Git commit when it evaluated {some(changed)}."
        found.append(Notice(text=text, section="provenance"))
    return found


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


REPEATS = (
    "Each is the mean over repeats of the run with other seeds. SE, the standard error, says how far other questions "
    "could have moved it; SD, the standard deviation over the repeats, how far the same questions asked again do. A "
    "difference that is small against the SD may be noise, however many questions there are."
)

_PHASES = {"kv_cache": "KV", "capture": "graphs"}


def phase_name(phase: str) -> str:
    """A phase as a label: a task's own name, without the suite."""
    return phase.removeprefix("task:").split("/", 1)[-1] if phase.startswith("task:") else _PHASES.get(phase, phase)


def size(value: int | None) -> str:
    """Bytes in MiB below 1 GiB, else in GiB; nothing measured is no size."""
    if not value:
        return "–"
    if value < 2**30:
        return f"{value / 2**20:.0f} MiB"
    return f"{value / 2**30:.2f} GiB" if value < 10 * 2**30 else f"{value / 2**30:.1f} GiB"


def duration(seconds: float | None) -> str:
    """Seconds below two minutes, then minutes and seconds, then hours and minutes."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.1f} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def parameters(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def signed(value: float | None, scale: str) -> str:
    """A difference with its sign, or a ratio with its multiplication sign; only a ratio of 1 is printed as 1."""
    if value is None:
        return "–"
    return (
        f"×{number(value, min(6, max(3, _decimals(round(value - 1, 9)))))}"
        if scale == "ratio"
        else ("+" if value > 0 else "−" if value < 0 else "") + number(abs(value))
    )


def setting(value: object) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_PATHS = {
    "one_token": "one token",
    "suffix": "suffix rows",
    "stock": "lm-eval's own request",
    "second_pass": "asked again",
    "duplicates": "equal request",
    "cached": "kept earlier",
}


def answered(paths: ScoringPath) -> str:
    """How the requests of a task were answered: only the ways that were used."""
    used = [f"{getattr(paths, name):,} {label}" for name, label in _PATHS.items() if getattr(paths, name)]
    return ", ".join(used) or "–"
