"""Repeats of one model taken together: the score is their mean, and how it moved is the noise floor.

A question that is asked again is no new question: samples are averaged question by question before any interval or
test, so n stays the number of questions. What the questions leave open (the standard error) and what a repeat of the
same questions leaves open (the standard deviation over repeats) stand side by side.
Source: Miller 2024, Adding Error Bars to Evals, arXiv:2411.00640, sections 3.1 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reproval import statistics
from reproval.collect import ModelData, Noise, UnitData, finite, finite_pairs, is_mean
from reproval.records import Score
from reproval.samples import SampleKey, TaskSamples

_MIX = np.uint64(0x9E3779B97F4A7C15)


def together(models: Sequence[ModelData]) -> list[ModelData]:
    """One entry for each label, in the order given. A model without repeats is returned as it is."""
    runs: dict[str, list[ModelData]] = {}
    for model in models:
        runs.setdefault(model.label, []).append(model)
    return [_merged(sorted(found, key=lambda m: m.repeat)) if len(found) > 1 else found[0] for found in runs.values()]


def _merged(runs: list[ModelData]) -> ModelData:
    noise: dict[tuple[str, str, str, str], Noise] = {}
    units = []
    for unit in runs[0].units:
        name = (unit.result.suite, unit.result.task)
        units.append(
            _merged_unit([u for run in runs for u in run.units if (u.result.suite, u.result.task) == name], noise)
        )
    return replace(runs[0], units=units, noise=noise)


def _merged_unit(units: list[UnitData], noise: dict[tuple[str, str, str, str], Noise]) -> UnitData:
    """The first unit with the scores and samples of all, and `noise` filled by the way."""
    first = units[0]
    samples = {key: _averaged([unit.samples[key] for unit in units if key in unit.samples]) for key in first.samples}
    scores = []
    for score in first.result.scores:
        key = (score.task, score.metric, score.filter)
        found = [s for unit in units for s in unit.result.scores if (s.task, s.metric, s.filter) == key]
        scores.append(_mean(found, first.samples.get((score.task, score.filter)), samples))
        if len(found) > 1:
            noise[(first.result.suite, *key)] = Noise(len(found), float(np.std([s.value for s in found], ddof=1)))
    levers = {(v.lever, v.before, v.after): v for unit in units for v in unit.result.score_levers}
    changed = first.result.model_copy(update={"scores": scores, "score_levers": list(levers.values())})
    return UnitData(first.reference, changed, samples)


def _averaged(repeats: list[TaskSamples]) -> TaskSamples:
    """Every document's mean. Repeats on other documents cannot be averaged: then the first stands alone."""
    first = repeats[0]
    if any(not np.array_equal(first.documents, other.documents) for other in repeats):
        return first
    prompts = first.prompts
    if any(not np.array_equal(prompts, other.prompts) for other in repeats):
        # Other shots in other repeats: equal to another model's only if all of them are, in the same order.
        for other in repeats[1:]:
            prompts = prompts * _MIX ^ other.prompts
    values = {
        name: np.mean([other.values[name] for other in repeats], axis=0)
        for name in first.values
        if all(name in other.values for other in repeats)
    }
    weighted = {
        name: (np.mean([other.weighted[name][0] for other in repeats], axis=0), weights)
        for name, (_, weights) in first.weighted.items()
        if all(name in o.weighted and np.array_equal(o.weighted[name][1], weights, equal_nan=True) for o in repeats)
    }
    return TaskSamples(first.documents, prompts, values, weighted)


def _mean(scores: list[Score], before: TaskSamples | None, samples: dict[SampleKey, TaskSamples]) -> Score:
    """One score for all repeats; `before` are the samples of the first. A perplexity's mean is that of its logarithm.

    The standard error is that of the questions' means where the score is a mean, else the root mean square of the
    repeats' own.
    """
    first = scores[0]
    values = [score.value for score in scores]
    logarithmic = _is_perplexity(first, before)
    value = math.exp(float(np.mean(np.log(values)))) if logarithmic else float(np.mean(values))
    errors = [score.stderr for score in scores if score.stderr is not None]
    stderr = math.sqrt(float(np.mean(np.square(errors)))) if len(errors) == len(scores) else None
    merged = first.model_copy(update={"value": value, "stderr": stderr})
    mine = samples.get((first.task, first.filter))
    column = finite(mine.values[first.metric]) if mine and first.metric in mine.values else None
    if not first.group and stderr is not None and column is not None and column.size > 1 and is_mean(merged, column):
        return merged.model_copy(update={"stderr": float(column.std(ddof=1) / math.sqrt(column.size))})
    return merged


def _is_perplexity(score: Score, samples: TaskSamples | None) -> bool:
    if score.group or samples is None:
        return False
    if score.metric in samples.weighted:
        numerators, weights = finite_pairs(samples.weighted[score.metric])
    elif score.metric in samples.values:
        numerators = finite(samples.values[score.metric])
        if is_mean(score, numerators):
            return False
        weights = np.ones_like(numerators)
    else:
        return False
    found = statistics.log_likelihood_interval(score.value, numerators, weights)
    return found is not None and found[1] == "ratio"
