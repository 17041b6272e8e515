"""Which metric stands for a task, and which models differ on it: every pair on the same questions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from reproval import statistics
from reproval.collect import ModelData, TaskSamples, UnitData, is_mean
from reproval.report_content import Cell, Headline, Pair, Untested
from reproval.statistics import Comparison, Floats

ALPHA = 1 - statistics.LEVEL


def headlines(table: Iterable[dict[str, Any]], models: Sequence[str], preference: Sequence[str]) -> list[Headline]:
    """The summary: for every task that no group stands for, the metric that is first in `preference`.

    The same metric and filter stand for all models, so that a row compares like with like.
    """
    tasks: dict[tuple[str, str], dict[tuple[str, str], dict[str, dict[str, Any]]]] = {}
    subtasks: dict[tuple[str, str], set[str]] = {}
    for row in table:
        if row["top"]:
            metrics = tasks.setdefault((row["suite"], row["task"]), {})
            metrics.setdefault((row["metric"], row["filter"]), {})[row["model"]] = row
        else:
            subtasks.setdefault((row["suite"], row["entry"]), set()).add(row["task"])
    found = []
    for (suite, task), metrics in tasks.items():
        rank = {name: position for position, name in enumerate(preference)}
        # A metric that every model has goes before one that only some have.
        metric, filter_name = min(metrics, key=lambda m: (-len(metrics[m]), rank.get(m[0], len(rank))))
        cells = metrics[(metric, filter_name)]
        first = next(iter(cells.values()))
        found.append(
            Headline(
                suite=suite,
                task=task,
                metric=metric,
                filter=filter_name,
                higher_is_better=first["higher_is_better"],
                group=first["group"],
                subtasks=len(subtasks.get((suite, task), ())) if first["group"] else 0,
                n_shot=first["n_shot"],
                cells=[_cell(cells[model]) if model in cells else None for model in models],
            )
        )
    return found


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(
        model=row["model"],
        value=row["value"],
        low=row["interval_low"],
        high=row["interval_high"],
        method=row["interval_method"],
        stderr=row["stderr"],
        n=row["n"],
        score_levers=row["score_levers"].split(",") if row["score_levers"] else [],
        prompts_cut=row["prompts_cut"],
    )


def _unit(model: ModelData, line: Headline) -> UnitData | None:
    return next((u for u in model.units if u.result.suite == line.suite and line.task in u.top_tasks), None)


def _other_documents(a: TaskSamples, b: TaskSamples) -> str | None:
    """Why two models' samples cannot be paired; None if they are of the same documents."""
    if np.array_equal(a.documents, b.documents):
        return None
    shared = np.intersect1d(a.documents, b.documents).size
    return f"not the same documents: {a.documents.size} and {b.documents.size}, {shared} of them shared"


def compare(a: ModelData, b: ModelData, line: Headline, alpha: float) -> tuple[Comparison, bool] | str:
    """Compare two models on the documents of one headline; whether their prompts were equal.

    Else, why there is no test.
    """
    ua, ub = _unit(a, line), _unit(b, line)
    if ua is None or ub is None:
        return f"{(a if ua is None else b).label} was not evaluated on it"
    leaves = ua.groups.get(line.task, []) if line.group else [line.task]
    values: list[tuple[Floats, Floats]] = []
    weighted: list[tuple[Floats, Floats, Floats]] = []
    prompts_equal = True
    for leaf in leaves:
        sa, sb = ua.samples.get((leaf, line.filter)), ub.samples.get((leaf, line.filter))
        if sa is None or sb is None:
            return f"{leaf} has no samples with filter {line.filter} for both models"
        if reason := _other_documents(sa, sb):
            return reason
        prompts_equal &= np.array_equal(sa.prompts, sb.prompts)
        if line.metric in sa.values and line.metric in sb.values:
            va, vb = sa.values[line.metric], sb.values[line.metric]
            both = ~(np.isnan(va) | np.isnan(vb))
            values.append((va[both], vb[both]))
        elif line.metric in sa.weighted and line.metric in sb.weighted:
            (xa, wa), (xb, wb) = sa.weighted[line.metric], sb.weighted[line.metric]
            if not np.array_equal(wa, wb):
                return "the documents have different lengths for the two models"
            weighted.append((xa, xb, wa))
    result = _test(line, ua, ub, leaves, values, weighted, alpha)
    if result is None:
        return "the score is not a mean of its samples, or there are fewer than two"
    return result, bool(prompts_equal)


def _test(
    line: Headline,
    ua: UnitData,
    ub: UnitData,
    leaves: list[str],
    values: list[tuple[Floats, Floats]],
    weighted: list[tuple[Floats, Floats, Floats]],
    alpha: float,
) -> Comparison | None:
    score = next(
        s for s in ua.result.scores if (s.task, s.metric, s.filter) == (line.task, line.metric, line.filter)
    )  # fmt: skip
    if line.group:
        if len(values) != len(leaves) or not all(x.size for x, _ in values):
            return None
        weights = statistics.group_weights(
            [float(x.mean()) for x, _ in values], [x.size for x, _ in values], score.value
        )
        return statistics.compare_strata(values, weights, alpha) if weights else None
    if len(weighted) == 1:
        x, y, w = weighted[0]
        found = statistics.log_likelihood_interval(score.value, x, w)
        return statistics.compare_log_likelihoods(x, y, w, found[1], alpha) if found else None
    if len(values) != 1:
        return None
    x, y = values[0]
    if is_mean(score, x):
        if statistics.is_binary(x) and statistics.is_binary(y):
            return statistics.compare_binary(x, y, alpha)
        return statistics.compare_means(x, y, alpha)
    ones = np.ones_like(x)
    found = statistics.log_likelihood_interval(score.value, x, ones)
    return statistics.compare_log_likelihoods(x, y, ones, found[1], alpha) if found else None


def comparisons(models: Sequence[ModelData], lines: Sequence[Headline]) -> tuple[list[Pair], list[Untested]]:
    """Every pair of models on every headline, with Holm's correction over all of them."""
    pairs = list(itertools.combinations(models, 2))
    # Bonferroni's level bounds Holm's, and unlike Holm's is known before the tests.
    alpha = ALPHA / max(1, len(pairs) * len(lines))
    tested: list[tuple[Headline, ModelData, ModelData, Comparison, bool]] = []
    untested: list[Untested] = []
    for line in lines:
        for a, b in pairs:
            outcome = compare(a, b, line, alpha)
            if isinstance(outcome, str):
                untested.append(Untested(suite=line.suite, task=line.task, a=a.label, b=b.label, reason=outcome))
            else:
                tested.append((line, a, b, *outcome))
    adjusted = statistics.holm([c.p_value for *_, c, _ in tested])
    found = []
    for (line, a, b, c, equal), p_holm in zip(tested, adjusted, strict=True):
        cells = {cell.model: cell for cell in line.cells if cell}
        significant = p_holm < ALPHA
        a_more = c.effect > (1 if c.scale == "ratio" else 0)
        better = (a if a_more == line.higher_is_better else b).label if line.higher_is_better is not None else None
        found.append(
            Pair(
                suite=line.suite,
                task=line.task,
                metric=line.metric,
                filter=line.filter,
                a=a.label,
                b=b.label,
                n=c.n,
                effect=c.effect,
                low=c.low,
                high=c.high,
                scale=c.scale,
                p_value=c.p_value,
                p_holm=p_holm,
                significant=significant,
                better=better if significant else None,
                detectable=c.detectable,
                method=c.method,
                prompts_equal=equal,
                score_levers=[f"{m}: {lever}" for m in (a.label, b.label) for lever in cells[m].score_levers],
            )
        )
    return sorted(found, key=lambda p: (p.p_holm, p.p_value)), untested
