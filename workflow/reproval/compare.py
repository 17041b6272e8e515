"""Which metric stands for a task, and which models differ on it: every pair on the same questions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reproval import statistics
from reproval.collect import ModelData, finite, is_mean
from reproval.records import Score
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
                limit=first["limit"],
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
        repeats=row["repeats"],
        repeat_sd=row["repeat_sd"],
    )


@dataclass(frozen=True)
class Side:
    """One model's samples of one headline, the leaf tasks of a group one after the other."""

    score: Score
    sizes: list[int]
    documents: NDArray[np.uint64]
    prompts: NDArray[np.uint64]
    values: Floats
    weights: Floats | None
    binary: bool


def side(model: ModelData, line: Headline) -> Side | str:
    """What one model brings to the comparisons of a headline, or why it brings nothing."""
    unit = next((u for u in model.units if u.result.suite == line.suite and line.task in u.top_tasks), None)
    key = (line.task, line.metric, line.filter)
    score = next((s for s in unit.result.scores if (s.task, s.metric, s.filter) == key), None) if unit else None
    if unit is None or score is None:
        return f"{model.label} was not evaluated on it"
    leaves = unit.leaves(line.task) if line.group else [line.task]
    samples = [s for leaf in leaves if (s := unit.samples.get((leaf, line.filter)))]
    if not samples or len(samples) < len(leaves):
        return f"{model.label} has no samples with filter {line.filter}"
    columns = [s.values[line.metric] for s in samples if line.metric in s.values]
    pairs = [s.weighted[line.metric] for s in samples if line.metric in s.weighted]
    weights = None
    if len(pairs) == len(samples):
        columns = [numerators for numerators, _ in pairs]
        weights = np.concatenate([w for _, w in pairs])
    elif len(columns) < len(samples):
        return "the score is not made of numbers by document"
    values = np.concatenate(columns)
    return Side(
        score=score,
        sizes=[s.documents.size for s in samples],
        documents=np.concatenate([s.documents for s in samples]),
        prompts=np.concatenate([s.prompts for s in samples]),
        values=values,
        weights=weights,
        binary=statistics.is_binary(finite(values)),
    )


def compare(a: Side, b: Side, alpha: float) -> Comparison | str:
    """Compare two models on the documents of one headline; else, why there is no test."""
    if not (math.isfinite(a.score.value) and math.isfinite(b.score.value)):
        return "a score is not a number"
    if a.sizes != b.sizes or not np.array_equal(a.documents, b.documents):
        shared = np.intersect1d(a.documents, b.documents).size
        return f"not the same documents: {a.documents.size} and {b.documents.size}, {shared} of them shared"
    if (a.weights is None) != (b.weights is None) or not (
        a.weights is None or b.weights is None or np.array_equal(a.weights, b.weights, equal_nan=True)
    ):
        return "the documents have different lengths for the two models"
    both = ~(np.isnan(a.values) | np.isnan(b.values))
    x, y = a.values[both], b.values[both]
    sizes = [int(part.sum()) for part in np.split(both, np.cumsum(a.sizes)[:-1])] if not both.all() else a.sizes
    found = _test(a, b, x, y, sizes, a.weights[both] if a.weights is not None else None, alpha)
    return found or "the score is not a mean of its samples, or there are fewer than two"


def _test(
    a: Side, b: Side, x: Floats, y: Floats, sizes: list[int], weights: Floats | None, alpha: float
) -> Comparison | None:
    value = a.score.value
    if min(sizes) == 0:
        return None
    if a.score.group:
        if weights is not None:
            return None
        begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        means = (np.add.reduceat(x, begins) / np.asarray(sizes)).tolist()
        shares = statistics.group_weights(means, sizes, value)
        return statistics.compare_strata(x, y, sizes, shares, a.binary and b.binary, alpha) if shares else None
    if weights is None and is_mean(a.score, x):
        compare_kind = statistics.compare_binary if a.binary and b.binary else statistics.compare_means
        return compare_kind(x, y, alpha)
    weights = np.ones_like(x) if weights is None else weights
    found = statistics.log_likelihood_interval(value, x, weights)
    return statistics.compare_log_likelihoods(x, y, weights, found[1], alpha) if found else None


def _untested(line: Headline, a: ModelData, b: ModelData, reason: str) -> Untested:
    return Untested(suite=line.suite, task=line.task, a=a.label, b=b.label, reason=reason)


def comparisons(models: Sequence[ModelData], lines: Sequence[Headline]) -> tuple[list[Pair], list[Untested]]:
    """Every pair of models on every headline, with Holm's correction over all of them."""
    pairs = list(itertools.combinations(models, 2))
    # Bonferroni's level bounds Holm's, and unlike Holm's is known before the tests.
    alpha = ALPHA / max(1, len(pairs) * len(lines))
    tested: list[tuple[Headline, ModelData, ModelData, Comparison, bool]] = []
    untested: list[Untested] = []
    for line in lines:
        sides = {model.label: side(model, line) for model in models}
        for a, b in pairs:
            x, y = sides[a.label], sides[b.label]
            if isinstance(x, str) or isinstance(y, str):
                untested.append(_untested(line, a, b, x if isinstance(x, str) else str(y)))
            elif isinstance(outcome := compare(x, y, alpha), str):
                untested.append(_untested(line, a, b, outcome))
            else:
                tested.append((line, a, b, outcome, bool(np.array_equal(x.prompts, y.prompts))))
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
