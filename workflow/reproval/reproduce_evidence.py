"""The test of verdict.py that fits a score, and what it says: on paired samples, or beside a published value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from reproval import statistics, verdict
from reproval.collect import UnitData, finite, finite_pairs, is_mean
from reproval.records import Score
from reproval.reference import Margin, PublishedScore
from reproval.statistics import Floats, Scale
from reproval.verdict import Evidence


@dataclass(frozen=True)
class Paired:
    """What the samples of both sides say of a score. `evidence` is None where they do not make it on both sides."""

    evidence: Evidence | None
    leaves: list[str]
    changed_scores: int
    same_documents: bool
    notes: list[str]


@dataclass(frozen=True)
class Side:
    """One side's score, and all of its samples by task: values, or log-likelihoods and weights."""

    score: Score
    columns: list[tuple[Floats, Floats | None]]


# Ours, theirs and the weights of the documents of one task that both sides have.
Pairs = tuple[Floats, Floats, Floats | None]


def paired(
    reported: Score, score: Score, theirs: UnitData, ours: UnitData, margin: float, alpha: float
) -> Paired | None:
    """Judge a score on the questions that both sides have: theirs as `reported`, and ours; None without samples.

    `margin` is a difference of scores, and a share of perplexities. `evidence` is None where the samples of a side do
    not make its score, or not in the same way as the other's.
    """
    pairs: list[Pairs] = []
    sides = Side(reported, []), Side(score, [])
    changed, same = 0, True
    leaves = ours.leaves(score.task) if score.group else [score.task]
    for leaf in leaves:
        a, b = theirs.samples.get((leaf, score.filter)), ours.samples.get((leaf, score.filter))
        if a is None or b is None:
            return None
        _, ia, ib = np.intersect1d(a.documents, b.documents, return_indices=True)
        same &= len(ia) == a.documents.size == b.documents.size
        w = v = None
        if score.metric in a.values and score.metric in b.values:
            x, y = a.values[score.metric][ia], b.values[score.metric][ib]
            for side, samples in zip(sides, (a, b), strict=True):
                side.columns.append((finite(samples.values[score.metric]), None))
        elif score.metric in a.weighted and score.metric in b.weighted:
            x, w = (column[ia] for column in a.weighted[score.metric])
            y, v = (column[ib] for column in b.weighted[score.metric])
            for side, samples in zip(sides, (a, b), strict=True):
                side.columns.append(finite_pairs(samples.weighted[score.metric]))
        else:
            return None
        known = ~(np.isnan(x) | np.isnan(y))
        if w is not None and v is not None and not np.array_equal(w[known], v[known]):
            return None
        changed += int(np.sum(x[known] != y[known])) + int(np.sum(np.isnan(x) != np.isnan(y)))
        pairs.append((y[known], x[known], v[known] if v is not None else None))
    notes = [] if same else [f"judged on the {sum(y.size for y, *_ in pairs)} documents of both sides"]
    return Paired(_evidence(pairs, sides, margin, alpha), leaves, changed, same, notes)


def _evidence(pairs: list[Pairs], sides: tuple[Side, Side], margin: float, alpha: float) -> Evidence | None:
    """The test for how both sides' scores are made of their samples; None where they are not, or not alike."""
    if any(y.size == 0 for y, *_ in pairs):
        return None
    if sides[0].score.group:
        theirs, weights = map(_group_weights, sides)
        if theirs is None or weights is None or not np.allclose(theirs, weights):
            return None
        return verdict.paired_strata([(y, x) for y, x, _ in pairs], weights, margin, alpha)
    ((y, x, w),) = pairs
    means = [_is_mean(side) for side in sides]
    if all(means):
        binary = statistics.is_binary(x) and statistics.is_binary(y)
        return (verdict.paired_binary if binary else verdict.paired_means)(y, x, margin, alpha)
    scale, other = map(_scale, sides)
    if any(means) or scale is None or scale != other:
        return None
    return verdict.paired_log_likelihoods(y, x, np.ones_like(y) if w is None else w, scale, margin, alpha)


def _is_mean(side: Side) -> bool:
    ((column, weights),) = side.columns
    return weights is None and is_mean(side.score, column)


def _scale(side: Side) -> Scale | None:
    """On which scale a score made of log-likelihoods compares; None for any other."""
    ((column, weights),) = side.columns
    weights = np.ones_like(column) if weights is None else weights
    found = statistics.log_likelihood_interval(side.score.value, column, weights)
    return found[1] if found else None


def _group_weights(side: Side) -> list[float] | None:
    """How a side's score weights its tasks; None where no task's samples are plain values, or neither way fits."""
    columns = [column for column, weights in side.columns if weights is None]
    if len(columns) != len(side.columns) or any(column.size == 0 for column in columns):
        return None
    means = [float(column.mean()) for column in columns]
    return statistics.group_weights(means, [column.size for column in columns], side.score.value)


def published(
    score: Score, ours: UnitData, theirs: PublishedScore, margin: Margin | float, alpha: float
) -> tuple[Evidence | None, list[str]]:
    """Judge a score against a published value. The notes say what had to be assumed."""
    numbers = {
        "value in the reference": theirs.value,
        "value here": score.value,
        "standard error in the reference": theirs.stderr,
        "standard error here": score.stderr,
    }
    if unusable := [name for name, number in numbers.items() if number is not None and not math.isfinite(number)]:
        return None, [f"the {name} is no finite number: nothing to test with" for name in unusable]
    rounding, notes = theirs.rounded_to / 2, []
    samples = ours.samples.get((score.task, score.filter))
    column = samples.values.get(score.metric) if samples and not score.group else None
    column = finite(column) if column is not None else None
    binary = column is not None and is_mean(score, column) and statistics.is_binary(column)
    if binary and not 0 <= theirs.value <= 1:
        return None, [f"value {theirs.value:g} is no proportion: a percentage? Write it as a share of 1"]
    if binary and column is not None and (theirs.n is not None or theirs.stderr is None):
        n = theirs.n
        if n is None:
            n = column.size
            notes.append("the source gives neither n nor standard error: taken to have as many documents as here")
        limit = _limit(margin, theirs.value, "difference")
        return verdict.unpaired_proportions(score.value, column.size, theirs.value, n, limit, rounding, alpha), notes
    scale: Scale = "difference"
    stderr = score.stderr
    sums = (column, np.ones_like(column)) if column is not None else None
    if samples and not score.group and score.metric in samples.weighted:
        sums = finite_pairs(samples.weighted[score.metric])
    if sums is not None and (column is None or not is_mean(score, column)):
        found = statistics.log_likelihood_interval(score.value, *sums)
        if found is not None and found[1] == "ratio":
            scale, stderr = "ratio", score.value * statistics.ratio_stderr(*sums)
        elif found is not None:
            stderr = statistics.ratio_stderr(*sums) / math.log(2)
    if stderr is None:
        return None, ["no standard error of the score here: nothing to test with"]
    other = theirs.stderr
    if other is None:
        other = stderr * math.sqrt(score.n / theirs.n) if score.n and theirs.n else stderr
        notes.append("the source gives no standard error: taken to be as here")
    known = [n for n in (score.n, theirs.n) if n]
    evidence = verdict.unpaired_values(
        score.value,
        stderr,
        theirs.value,
        other,
        _limit(margin, theirs.value, scale),
        n=min(known, default=None),
        rounding=rounding,
        scale=scale,
        alpha=alpha,
    )
    return evidence, notes if evidence else [*notes, "a standard error of 0: nothing to test with"]


def _limit(margin: Margin | float, value: float, scale: Scale) -> float:
    """The margin in units of the effect. A bare number is a difference of scores, and a share of perplexities."""
    return margin if isinstance(margin, float) else margin.of(value, scale)
