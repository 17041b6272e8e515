"""The stage `reproduce`: a run beside a published value, or beside another run, and a verdict for every score.

    python -m reproval.reproduce compare A B      two results folders or bundles; A is the reference, B is judged

Settings and prompts are compared before scores, so that a verdict comes with the first thing that was not the same.
What a verdict means, and how it is reached, is in verdict.py. Exit code: 0 if every score is identical or reproduced,
1 if one differs, 3 if none differs and one is inconclusive; 2 if nothing could be judged.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from reproval import bundle, statistics, verdict
from reproval import reference as references
from reproval.bundle import BundleError
from reproval.collect import ModelData, UnitData, finite, is_mean, load, package_version, prompts_cut
from reproval.files import RecordError, atomic, read_record, write_record
from reproval.problems import ConfigError
from reproval.records import Part, Record, Score
from reproval.reference import Margin, PublishedScore, Reference
from reproval.report_markdown import cell
from reproval.run_file import RunFile
from reproval.samples import TaskSamples
from reproval.statistics import Floats, Scale
from reproval.verdict import ALPHA, Evidence, Verdict

DEFAULT_MARGIN = 0.02
EXIT_CODES: dict[Verdict, int] = {"identical": 0, "reproduced": 0, "differs": 1, "inconclusive": 3}
NAMED_CHANGES = 5


class Unlike(Part):
    """A setting that was not the same on both sides."""

    what: str
    reference: str
    here: str


class SampleComparison(Part):
    """Two sides' samples of one score, question by question."""

    documents: int = Field(description="On both sides.")
    only_reference: int
    only_here: int
    changed_prompts: int
    first_changed_prompt: str | None = Field(default=None, description="Where it begins to differ, in words.")
    changed_answers: int = Field(description="Another choice, or another text after the filter.")
    changed_scores: int
    changed: list[str] = Field(
        description="Of the first few questions with another answer: document, and both answers."
    )
    equal_bits: bool = Field(description="Every response is the same, log-probabilities to the last bit.")
    largest_log_probability_difference: float | None = Field(description="In nats; None without log-probabilities.")


class ScoreVerdict(Part):
    """What is said of one score."""

    model: str
    suite: str
    task: str
    metric: str
    filter: str
    verdict: Verdict
    reference: float | None
    here: float | None
    scale: Scale = Field(default="difference", description="`effect` is here minus reference, or here over reference.")
    effect: float | None = None
    low: float | None = Field(default=None, description="Lower end of the 95 % interval of the effect.")
    high: float | None = None
    margin: float | None = None
    n: int | None = None
    detectable: float | None = Field(default=None, description="The smallest effect that this n could have shown.")
    p_equivalence: float | None = Field(default=None, description="Not corrected; the verdict is.")
    p_difference: float | None = Field(default=None, description="Not corrected; the verdict is.")
    method: str | None = None
    notes: list[str]
    unlike: list[Unlike] = Field(description="The most telling first.")
    samples: SampleComparison | None = None


class Reproduction(Record):
    """The verdicts of one run."""

    kind: Literal["reproduction"] = "reproduction"
    title: str
    source: str
    verdict: Verdict = Field(description="Of the whole: the worst of its scores.")
    exit_code: int
    alpha: float
    margin_because: str
    scores: list[ScoreVerdict]


class NothingToJudge(Exception):
    """The two sides have no score in common."""


# --- settings, compared before scores -------------------------------------------------------------------------------


def settings_of(model: ModelData, unit: UnitData, task: str) -> dict[str, Any]:
    """What made a task's scores, the most telling first; what is not known is None."""
    result, engine = unit.result, unit.result.engine
    asked, made = result.made_of.get("settings", {}), result.provenance
    leaves = unit.groups.get(task, [task])
    had = made.engine_arguments
    return {
        "model": f"files {engine.get('model', '?')[:12]}",
        "dtype": engine.get("dtype"),
        "quantization": engine.get("quantization"),
        "KV cache dtype": engine.get("kv_cache_dtype"),
        "task version": {leaf: result.versions.get(leaf) for leaf in leaves},
        "few-shot examples": {leaf: result.n_shot.get(leaf) for leaf in leaves},
        "chat template": asked.get("apply_chat_template") or False,
        "few-shot as multiturn": asked.get("fewshot_as_multiturn"),
        "system instruction": asked.get("system_instruction"),
        "generation": asked.get("generation"),
        "limit": asked.get("limit"),
        "seed": result.made_of.get("seed"),
        "task and its prompts": {leaf: result.task_hashes.get(leaf, "")[:12] for leaf in leaves},
        "prompts cut to fit": prompts_cut(unit, task),
        "longest request": engine.get("max_model_len"),
        "lm-eval": package_version(made.packages, "lm_eval"),
        "vLLM": package_version(made.packages, "vllm"),
        "torch": package_version(made.packages, "torch"),
        "transformers": package_version(made.packages, "transformers"),
        "batch invariant": made.batch_invariant,
        "container": made.container.digest if made.container else None,
        "environment": engine.get("environment"),
        "GPUs": made.gpus,
        "CPU": made.cpu if not made.gpus else None,
        "tokens in a batch": had.get("scheduler_config.max_num_batched_tokens"),
        "sequences in a batch": had.get("scheduler_config.max_num_seqs"),
        "eager mode": had.get("model_config.enforce_eager"),
        "GPUs for one model": had.get("parallel_config.tensor_parallel_size"),
        "reproval": made.reproval_version,
    }


def published_settings(reference: Reference, score: PublishedScore) -> dict[str, Any]:
    """The same of a published score, as far as its source says; the rest is left out."""
    suite, own = reference.suites[score.suite], score.made_with
    made = reference.made_with.model_copy(update=own.model_dump(exclude_unset=True) if own else {})
    known = {
        "model": _model_name(reference.models[score.model].hub, reference.models[score.model].revision),
        "dtype": made.dtype,
        "quantization": made.quantization,
        "task version": score.task_version,
        "few-shot examples": score.num_fewshot,
        "chat template": made.chat_template,
        "harness": _with_version(made.harness, made.harness_version),
        "engine": _with_version(made.engine, made.engine_version),
        "hardware": made.hardware,
    }
    return {key: value for key, value in known.items() if value is not None} | {"limit": suite.limit}


def _model_name(hub: str | None, revision: str | None) -> str | None:
    return f"{hub} at {revision}" if hub else None


def _with_version(name: str | None, version: str | None) -> str | None:
    return None if name is None else f"{name} {version}" if version else name


def against_published(reference: Reference, score: PublishedScore, model: ModelData, unit: UnitData) -> list[Unlike]:
    """What differs from a published score in settings, by what both sides know."""
    here = settings_of(model, unit, score.task)
    leaves = unit.groups.get(score.task, [score.task])
    run = _run_file(model)
    asked = run.run.model if run else None
    here["model"] = (_model_name(asked.hub, asked.revision) if asked else None) or f"a local folder, {here['model']}"
    here["quantization"] = here["quantization"] or "none"
    for name in ("task version", "few-shot examples"):
        values = {here[name].get(leaf) for leaf in leaves}
        here[name] = values.pop() if len(values) == 1 else sorted(map(str, values))
    here["harness"] = f"lm-eval {here['lm-eval']}"
    here["engine"] = f"vLLM {here['vLLM']}"
    here["hardware"] = ", ".join(here["GPUs"]) or here["CPU"]
    found = []
    for name, value in published_settings(reference, score).items():
        ours = here.get(name)
        if name in ("task version", "limit"):
            same = _number(value) == _number(ours)
        elif name in ("harness", "engine"):
            # A name without a version is met by every version of it.
            same = str(ours).casefold().startswith(str(value).casefold())
        else:
            same = value == ours
        if not same:
            found.append(Unlike(what=name, reference=_shown(value), here=_shown(ours)))
    return found


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _run_file(model: ModelData) -> RunFile | None:
    path = model.folder / "run.json"
    return read_record(path, RunFile) if path.exists() else None


def between_runs(a: tuple[ModelData, UnitData], b: tuple[ModelData, UnitData], task: str) -> list[Unlike]:
    """What differs between two runs' settings of a task, the most telling first."""
    theirs, ours = settings_of(*a, task), settings_of(*b, task)
    found = []
    for name, value in theirs.items():
        other = ours[name]
        if value == other:
            continue
        if isinstance(value, dict) or isinstance(other, dict):
            value, other = value or {}, other or {}
            key = next((key for key in {**value, **other} if value.get(key) != other.get(key)), None)
            if key is None:
                continue
            value, other, name = value.get(key), other.get(key), name if key == task else f"{name}: {key}"
        found.append(Unlike(what=name, reference=_shown(value), here=_shown(other)))
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    document: int
    prompt: str
    responses: Any
    filtered: Any


Answers = dict[
    tuple[str, str], dict[tuple[str, int], Answer]
]  # task, filter -> document hash, its how manieth -> answer


def read_answers(path: Path) -> Answers:
    """Responses from samples.jsonl.gz. The file's hash has been checked by `collect.load`."""
    found: Answers = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for raw in stream:
            line = json.loads(raw)
            key = (line["task"], line["filter"])
            document = (*key, line["doc_hash"])
            found.setdefault(key, {})[(line["doc_hash"], seen[document])] = Answer(
                line["doc_id"], line["prompt_hash"], line["resps"], line["filtered_resps"]
            )
            seen[document] += 1
    return found


def _prompt(path: Path, task: str, document: int) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for raw in stream:
            line = json.loads(raw)
            if line["task"] == task and line["doc_id"] == document:
                return _first_text(line["arguments"])
    return ""


def _first_text(value: Any) -> str:
    """The prompt among a request's arguments, which are lists here and mappings in lm-eval's own sample files."""
    while isinstance(value, list | dict) and value:
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return str(value)


def _choice(filtered: Any) -> Any:
    """What a question was answered with: the likeliest choice, or the text after the filter.

    None for a single log-likelihood, which answers nothing.
    """
    if isinstance(filtered, list) and filtered and all(isinstance(x, list) and len(x) == 2 for x in filtered):
        likelihoods = [x[0] for x in filtered]
        return likelihoods.index(max(likelihoods)) if len(likelihoods) > 1 else filtered[0][1]
    if isinstance(filtered, list) and all(isinstance(x, int | float) for x in filtered):
        return None
    return filtered


def _floats(value: Any) -> list[float]:
    if isinstance(value, list):
        return [x for item in value for x in _floats(item)]
    return [value] if isinstance(value, float) else []


def compare_samples(
    theirs: Answers,
    ours: Answers,
    leaves: Sequence[str],
    filter_name: str,
    changed_scores: int,
    files: tuple[Path, Path],
) -> SampleComparison:
    """Question by question, over the tasks of one score. `files` are both sides' samples, for the text of a prompt."""
    documents = only_theirs = only_ours = prompts = answers = 0
    changed: list[str] = []
    first, largest, equal = None, None, True
    for leaf in leaves:
        a, b = theirs.get((leaf, filter_name), {}), ours.get((leaf, filter_name), {})
        only_theirs += len(a.keys() - b.keys())
        only_ours += len(b.keys() - a.keys())
        for key in sorted(a.keys() & b.keys(), key=lambda key: a[key].document):
            x, y = a[key], b[key]
            documents += 1
            if x.prompt != y.prompt:
                prompts += 1
                first = first or _first_difference(leaf, x.document, *(
                    _prompt(file, leaf, answer.document) for file, answer in zip(files, (x, y), strict=True)
                ))  # fmt: skip
            p, q = _choice(x.filtered), _choice(y.filtered)
            if p != q:
                answers += 1
                if len(changed) < NAMED_CHANGES:
                    changed.append(f"{leaf} {x.document}: {_short(p)} -> {_short(q)}")
            equal = equal and x.responses == y.responses
            pairs = list(zip(_floats(x.responses), _floats(y.responses), strict=False))
            if pairs:
                largest = max(largest or 0.0, *(abs(u - v) for u, v in pairs if math.isfinite(u - v)), 0.0)
    return SampleComparison(
        documents=documents,
        only_reference=only_theirs,
        only_here=only_ours,
        changed_prompts=prompts,
        first_changed_prompt=first,
        changed_answers=answers,
        changed_scores=changed_scores,
        changed=changed,
        equal_bits=equal and not (only_theirs or only_ours),
        largest_log_probability_difference=largest,
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_difference(task: str, document: int, theirs: str, ours: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(theirs, ours, strict=False)) if x != y), min(len(theirs), len(ours)))
    begin = max(0, at - 20)
    return (
        f"document {document} of {task}, from character {at}: "
        f"{_short(theirs[begin : at + 30])} in the reference, {_short(ours[begin : at + 30])} here"
    )


# --- evidence --------------------------------------------------------------------------------------------------------


def _shared(a: TaskSamples, b: TaskSamples) -> tuple[Any, Any]:
    _, ia, ib = np.intersect1d(a.documents, b.documents, return_indices=True)
    return ia, ib


@dataclass(frozen=True)
class Paired:
    evidence: Evidence | None
    changed_scores: int
    same_documents: bool
    notes: list[str]


@dataclass(frozen=True)
class Side:
    """One side's score, and all of its samples by task: values, or log-likelihoods and weights."""

    score: Score
    columns: list[tuple[Floats, Floats | None]]


def paired(
    reported: Score, score: Score, theirs: UnitData, ours: UnitData, margin: float, alpha: float
) -> Paired | None:
    """Judge a score on the questions that both sides have: theirs as `reported`, and ours; None without samples.

    `margin` is a difference of scores, and a share of perplexities. `evidence` is None where the samples of a side do
    not make its score, or not in the same way as the other's.
    """
    leaves = ours.groups.get(score.task, []) if score.group else [score.task]
    values: list[tuple[Floats, Floats]] = []
    whole: tuple[Side, Side] = Side(reported, []), Side(score, [])
    weighted: list[tuple[Floats, Floats, Floats]] = []
    changed, same = 0, True
    for leaf in leaves:
        a, b = theirs.samples.get((leaf, score.filter)), ours.samples.get((leaf, score.filter))
        if a is None or b is None:
            return None
        ia, ib = _shared(a, b)
        same &= len(ia) == a.documents.size == b.documents.size
        if score.metric in a.values and score.metric in b.values:
            x, y = a.values[score.metric][ia], b.values[score.metric][ib]
            known = ~(np.isnan(x) | np.isnan(y))
            changed += int(np.sum(x[known] != y[known])) + int(np.sum(np.isnan(x) != np.isnan(y)))
            values.append((y[known], x[known]))
            for side, samples in zip(whole, (a, b), strict=True):
                side.columns.append((finite(samples.values[score.metric]), None))
        elif score.metric in a.weighted and score.metric in b.weighted:
            (x, w), (y, v) = a.weighted[score.metric], b.weighted[score.metric]
            if not np.array_equal(w[ia], v[ib]):
                return None
            changed += int(np.sum(x[ia] != y[ib]))
            weighted.append((y[ib], x[ia], v[ib]))
            for side, column in zip(whole, ((x, w), (y, v)), strict=True):
                side.columns.append(column)
        else:
            return None
    notes = [] if same else [f"judged on the {sum(len(x) for x, *_ in [*values, *weighted])} documents of both sides"]
    evidence = _evidence(values, weighted, whole, margin, alpha)
    return Paired(evidence, changed, same, notes)


def _evidence(
    values: list[tuple[Floats, Floats]],
    weighted: list[tuple[Floats, Floats, Floats]],
    whole: tuple[Side, Side],
    margin: float,
    alpha: float,
) -> Evidence | None:
    if any(x.size == 0 for x, *_ in [*values, *weighted]):
        return None
    if whole[0].score.group:
        theirs, weights = map(_group_weights, whole)
        if not values or weighted or theirs is None or weights is None:
            return None
        return verdict.paired_strata(values, weights, margin, alpha) if np.allclose(theirs, weights) else None
    means = [weights is None and is_mean(side.score, column) for side in whole for column, weights in side.columns]
    if all(means):
        y, x = values[0]
        if statistics.is_binary(x) and statistics.is_binary(y):
            return verdict.paired_binary(y, x, margin, alpha)
        return verdict.paired_means(y, x, margin, alpha)
    scales = [
        found[1] if (found := statistics.log_likelihood_interval(side.score.value, column, w)) else None
        for side in whole
        for column, weights in side.columns
        for w in [np.ones_like(column) if weights is None else weights]
    ]
    scale = scales[0]
    if scale is None or any(means) or scales[1] != scale:
        return None
    y, x, w = weighted[0] if weighted else (*values[0], np.ones_like(values[0][0]))
    return verdict.paired_log_likelihoods(y, x, w, scale, margin, alpha)


def _group_weights(side: Side) -> list[float] | None:
    """How a side's score weights its tasks; None where no task's samples are plain values, or neither way fits."""
    columns = [column for column, weights in side.columns if weights is None]
    if len(columns) != len(side.columns) or any(column.size == 0 for column in columns):
        return None
    means = [float(column.mean()) for column in columns]
    return statistics.group_weights(means, [column.size for column in columns], side.score.value)


def published(score: Score, ours: UnitData, theirs: PublishedScore, margin: Margin | float, alpha: float) -> tuple[
    Evidence | None, list[str]
]:  # fmt: skip
    """Judge a score against a published value. The notes say what had to be assumed."""
    rounding, notes = theirs.rounded_to / 2, []
    samples = ours.samples.get((score.task, score.filter))
    column = samples.values.get(score.metric) if samples and not score.group else None
    column = column[~np.isnan(column)] if column is not None else None
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
        sums = samples.weighted[score.metric]
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


# --- verdicts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A score before its verdict, which needs the whole table."""

    entry: ScoreVerdict
    evidence: Evidence | None
    identical: bool


def conclude(title: str, source: str, because: str, drafts: Sequence[Draft]) -> Reproduction:
    """Verdicts with Holm's correction over the table. Raises NothingToJudge for an empty one."""
    if not drafts:
        raise NothingToJudge("the two sides have no score in common: no model, suite and task of the same names")
    # What the samples show to be identical is not tested, and costs the others nothing.
    words = iter(verdict.decide([draft.evidence for draft in drafts if not draft.identical]))
    scores = []
    for draft in drafts:
        evidence, word = draft.evidence, "identical" if draft.identical else next(words)
        found: dict[str, Any] = {"verdict": word}
        if evidence is not None:
            found |= {
                "scale": evidence.scale,
                "effect": evidence.effect,
                "low": evidence.low,
                "high": evidence.high,
                "margin": evidence.margin,
                "n": evidence.n,
                "detectable": evidence.detectable,
                "p_equivalence": evidence.p_equivalence,
                "p_difference": evidence.p_difference,
                "method": evidence.method,
            }
        scores.append(draft.entry.model_copy(update=found))
    order: list[Verdict] = ["differs", "inconclusive", "reproduced", "identical"]
    overall = next(word for word in order if any(score.verdict == word for score in scores))
    return Reproduction(
        title=title,
        source=source,
        verdict=overall,
        exit_code=EXIT_CODES[overall],
        alpha=ALPHA,
        margin_because=because,
        scores=scores,
    )


def judge_published(reference: Reference, models: Sequence[ModelData], margin: float | None = None) -> Reproduction:
    """Judge runs against a reference; `margin`, absolute, takes the place of the reference's own.

    Raises NothingToJudge if none of its scores was evaluated.
    """
    alpha = ALPHA / len(reference.scores)
    drafts = []
    for theirs in reference.scores:
        chosen = margin if margin is not None else theirs.margin or reference.margin
        entry = ScoreVerdict(
            model=theirs.model,
            suite=theirs.suite,
            task=theirs.task,
            metric=theirs.metric,
            filter=theirs.filter,
            verdict="inconclusive",
            reference=theirs.value,
            here=None,
            notes=[theirs.note] if theirs.note else [],
            unlike=[],
        )
        at = _find(models, theirs.model, theirs.suite, theirs.task, theirs.metric, theirs.filter)
        if at is None:
            missing = entry.model_copy(update={"notes": [*entry.notes, "not evaluated here"]})
            drafts.append(Draft(missing, None, False))
            continue
        model, unit, score = at
        evidence, notes = published(score, unit, theirs, chosen, alpha)
        unlike = against_published(reference, theirs, model, unit)
        entry = entry.model_copy(
            update={"here": score.value, "n": score.n, "notes": [*entry.notes, *notes], "unlike": unlike}
        )
        drafts.append(Draft(entry, evidence, False))
    if all(draft.entry.here is None for draft in drafts):
        tops = [score for run in models for u in run.units for score in u.result.scores if score.task in u.top_tasks]
        wanted, here = (
            ", ".join(sorted({f"{score.task} {score.metric} ({score.filter})" for score in scores})) or "none"
            for scores in (reference.scores, tops)
        )
        raise NothingToJudge(
            f"none of the reference's scores was evaluated here: expected {wanted}; found {here}. "
            "Correct model, suite, task, metric or filter under scores"
        )
    because = _because(margin) or reference.margin.because
    return conclude(reference.title, reference.source.url, because, drafts)


def judge_runs(
    title: str,
    source: str,
    theirs: tuple[Path, Sequence[ModelData]],
    ours: tuple[Path, Sequence[ModelData]],
    margin: float | None = None,
) -> Reproduction:
    """Judge runs against runs, each given with its results folder: every score that no group stands for."""
    chosen = DEFAULT_MARGIN if margin is None else margin
    found = []
    for model, unit in [(their, unit) for their in theirs[1] for unit in their.units]:
        name = model.evaluation.model
        if len(theirs[1]) == len(ours[1]) == 1:
            name = ours[1][0].evaluation.model
        if model.repeat not in {0, *(run.repeat for run in ours[1])}:
            continue
        for score in unit.result.scores:
            if score.task not in unit.top_tasks:
                continue
            at = _find(ours[1], name, unit.result.suite, score.task, score.metric, score.filter, model.repeat)
            found.append((model, unit, score, at))
    if not any(at for *_, at in found):
        found = []
    alpha = ALPHA / max(1, len(found))
    answers: dict[Path, Answers] = {}

    def answers_of(path: Path) -> Answers:
        if path not in answers:
            if len(answers) > 1:
                answers.clear()
            answers[path] = read_answers(path)
        return answers[path]

    drafts = []
    for model, unit, score, at in found:
        entry = ScoreVerdict(
            model=model.evaluation.model + (f", repeat {model.repeat}" if model.repeat else ""),
            suite=unit.result.suite,
            task=score.task,
            metric=score.metric,
            filter=score.filter,
            verdict="inconclusive",
            reference=score.value,
            here=None,
            notes=["not evaluated here"],
            unlike=[],
        )
        if at is None:
            drafts.append(Draft(entry, None, False))
            continue
        model_here, unit_here, here = at
        result = paired(score, here, unit, unit_here, chosen, alpha)
        unlike = between_runs((model, unit), (model_here, unit_here), score.task)
        entry = entry.model_copy(update={"here": here.value, "n": here.n, "notes": [], "unlike": unlike})
        if result is None:
            evidence, notes = _as_two_values(score, here, unit_here, chosen, alpha)
            drafts.append(Draft(entry.model_copy(update={"notes": notes}), evidence, False))
            continue
        files = (
            theirs[0] / unit.reference.folder / "samples.jsonl.gz",
            ours[0] / unit_here.reference.folder / "samples.jsonl.gz",
        )
        leaves = unit_here.groups.get(score.task, []) if score.group else [score.task]
        compared = compare_samples(
            answers_of(files[0]), answers_of(files[1]), leaves, score.filter, result.changed_scores, files
        )
        if compared.changed_prompts:
            first = Unlike(what="prompt", reference="", here=compared.first_changed_prompt or "")
            hashes = [entry.what.startswith("task and its prompts") for entry in unlike]
            at_hash = hashes.index(True) if True in hashes else len(unlike)
            unlike = [*unlike[:at_hash], first, *unlike[at_hash + 1 :]]
        changes = result.changed_scores + compared.changed_prompts + compared.changed_answers
        same_value = math.isclose(score.value, here.value, rel_tol=1e-9)
        identical = result.same_documents and changes == 0 and same_value
        evidence, notes = result.evidence, result.notes
        if changes == 0 and result.same_documents and not same_value:
            notes = [*notes, "the samples are the same and the values are not: another aggregation"]
        if evidence is None and not identical:
            evidence, more = _as_two_values(score, here, unit_here, chosen, alpha)
            notes = [*notes, *more]
        update = {"notes": notes, "samples": compared, "unlike": unlike}
        drafts.append(Draft(entry.model_copy(update=update), evidence, identical))
    because = _because(margin) or f"reproval's own, {DEFAULT_MARGIN}, because nobody stated one"
    return conclude(title, source, because, drafts)


def _as_two_values(
    theirs: Score, here: Score, unit: UnitData, margin: float, alpha: float
) -> tuple[Evidence | None, list[str]]:
    """Judge a score without pairs, for want of samples that make it on both sides."""
    value = PublishedScore(
        model="reference", suite="reference", task=theirs.task, metric=theirs.metric, filter=theirs.filter,
        value=theirs.value, stderr=theirs.stderr or None, n=theirs.n,
    )  # fmt: skip
    evidence, notes = published(here, unit, value, margin, alpha)
    return evidence, ["too few samples of both sides, or they do not make the score: compared as two values", *notes]


def _limit(margin: Margin | float, value: float, scale: Scale) -> float:
    """The margin in units of the effect. A bare number is a difference of scores, and a share of perplexities."""
    return margin if isinstance(margin, float) else margin.of(value, scale)


def _because(value: float | None) -> str | None:
    return f"{value}, given with the command" if value is not None else None


def _find(
    models: Sequence[ModelData], model: str, suite: str, task: str, metric: str, filter_name: str, repeat: int = 0
) -> tuple[ModelData, UnitData, Score] | None:
    for candidate in models:
        if (candidate.evaluation.model, candidate.repeat) != (model, repeat):
            continue
        for unit in candidate.units:
            if unit.result.suite == suite:
                for score in unit.result.scores:
                    if (score.task, score.metric, score.filter) == (task, metric, filter_name):
                        return candidate, unit, score
    return None


# --- in words --------------------------------------------------------------------------------------------------------


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) >= 10 else f"{value:.4f}"


def _effect(score: ScoreVerdict) -> str:
    if score.verdict == "identical":
        return "none"
    if score.effect is None:
        return ""
    sign = "" if score.scale == "ratio" else "+"
    times = "x" if score.scale == "ratio" else ""
    interval = f" [{score.low:{sign}.4f}, {score.high:{sign}.4f}]" if score.low is not None else ""
    return f"{times}{score.effect:{sign}.4f}{interval}"


def _plus_minus(score: ScoreVerdict, value: float | None) -> str:
    if value is None:
        return ""
    return f"x{1 + value:.4f}" if score.scale == "ratio" else f"{value:.4f}"


COLUMNS = ("model", "task", "metric", "reference", "here", "difference [95 %]", "margin", "could show", "verdict")


def _tasks(reproduction: Reproduction) -> list[str]:
    """Each score's task; with its suite where there are several, as a task may be in two with other settings."""
    several = len({score.suite for score in reproduction.scores}) > 1
    return [f"{score.task} ({score.suite})" if several else score.task for score in reproduction.scores]


def _rows(reproduction: Reproduction) -> list[tuple[str, ...]]:
    return [
        (
            score.model,
            task,
            score.metric if score.filter == "none" else f"{score.metric}, {score.filter}",
            _figure(score.reference),
            _figure(score.here),
            _effect(score),
            _plus_minus(score, score.margin),
            _plus_minus(score, score.detectable),
            score.verdict,
        )
        for score, task in zip(reproduction.scores, _tasks(reproduction), strict=True)
    ]


def _remarks(reproduction: Reproduction) -> list[str]:
    """First differences, what the samples say, and notes: each once, with the scores that it is about.

    A model is named where the same is not said of all that have the score.
    """
    about: dict[str, dict[str, list[str]]] = {}
    models: dict[str, list[str]] = {}
    for score, task in zip(reproduction.scores, _tasks(reproduction), strict=True):
        said = list(score.notes)
        if score.unlike:
            first, more = score.unlike[0], len(score.unlike) - 1
            text = first.here if first.what == "prompt" else f"{first.reference} in the reference, {first.here} here"
            said.append(f"first difference: {first.what}: {text}" + (f" (and {more} more)" if more else ""))
        if (s := score.samples) is not None:
            bits = "every response the same bit for bit" if s.equal_bits else None
            largest = s.largest_log_probability_difference
            nats = f", log-probabilities at most {largest:.2g} nats apart" if largest is not None else ""
            missing = (
                f", {s.only_reference} not here, {s.only_here} only here" if s.only_reference or s.only_here else ""
            )
            said.append(
                f"{s.documents} documents{missing}, {s.changed_prompts} prompts and {s.changed_answers} answers "
                + "changed, "
                + (bits or f"not the same bits{nats}")
            )
            said += [f"changed answer: {text}" for text in s.changed]
        metric = score.metric if score.filter == "none" else f"{score.metric},{score.filter}"
        name = f"{task} {metric}"
        models.setdefault(name, []).append(score.model)
        for text in said:
            about.setdefault(text, {}).setdefault(name, []).append(score.model)
    lines = []
    for text, scores in about.items():
        if sum(map(len, scores.values())) == len(reproduction.scores) > 1:
            where = "all scores"
        else:
            where = ", ".join(
                name if found == models[name] else f"{name} of {' and '.join(found)}" for name, found in scores.items()
            )
        lines.append(f"{where}: {text}")
    return lines


MEANING = (
    "reproduced: the difference is shown to be smaller than the margin. differs: a difference is shown. inconclusive: "
    "neither is, with so few documents; `could show` is the smallest difference that would have been found four times "
    "in five."
)


def table_text(reproduction: Reproduction) -> str:
    """The verdicts for a terminal."""
    rows = [COLUMNS, *_rows(reproduction)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    parts = [
        f"{reproduction.title}: {reproduction.verdict.upper()}",
        f"reference: {reproduction.source}",
        "",
        *lines,
        "",
    ]
    return "\n".join([*parts, *_remarks(reproduction), "", MEANING]) + "\n"


def table_markdown(reproduction: Reproduction) -> str:
    """The verdicts as results/reproduction.md."""

    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(map(cell, cells)) + " |"

    lines = [
        f"# {reproduction.title}: {reproduction.verdict}",
        "",
        f"Reference: {reproduction.source}. Margin: {reproduction.margin_because}.",
        "",
        row(COLUMNS),
        row(["---"] * len(COLUMNS)),
        *map(row, _rows(reproduction)),
        "",
        *(f"- {cell(line)}" for line in _remarks(reproduction)),
        "",
        f"{MEANING} Two one-sided tests and a test of difference at {ALPHA:.2g}, each corrected over the table (Holm).",
    ]
    pairs = zip(reproduction.scores, _tasks(reproduction), strict=True)
    if unlike := [(s.model, task, e.what, e.reference, e.here) for s, task in pairs for e in s.unlike]:
        head = ["model", "task", "what", "reference", "here"]
        lines += ["", "## What was not the same", "", row(head), row(["---"] * len(head))]
        lines += map(row, dict.fromkeys(unlike))
    return "\n".join(lines) + "\n"


# --- by hand ----------------------------------------------------------------------------------------------------------


def newest(results: Path) -> list[Path]:
    """Evaluations below a results folder: of every model and repeat the newest. Raises RecordError if there is none."""
    from reproval.records import Evaluation

    found: dict[tuple[str, int], tuple[str, Path]] = {}
    for path in sorted(results.glob("runs/*/evaluation.json")):
        evaluation = read_record(path, Evaluation)
        key = (evaluation.model, evaluation.repeat)
        found[key] = max(found.get(key, ("", path)), (evaluation.begin, path))
    if not found:
        raise RecordError(f"{results}: no runs/*/evaluation.json; name a results folder or a bundle")
    return [path for _, path in found.values()]


def _side(path: Path, scratch: Path) -> tuple[Path, list[ModelData]]:
    """The results folder and runs of a results folder, a project's folder, or a bundle."""
    if path.is_file():
        bundle.unpack(path, scratch)
        path = scratch
    results = path if (path / "runs").is_dir() else path / "results"
    return results, load(results, newest(results))


def _write(reproduction: Reproduction, json_path: Path | None, markdown_path: Path | None) -> None:
    if json_path is not None:
        write_record(json_path, reproduction)
    if markdown_path is not None:
        with atomic(markdown_path) as stream:
            stream.write(table_markdown(reproduction))


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0, such as {DEFAULT_MARGIN}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reproval.reproduce", fromfile_prefix_chars="@", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    judge = commands.add_parser("judge", help="judge evaluations against a reference or an unpacked bundle")
    against = judge.add_mutually_exclusive_group(required=True)
    against.add_argument("--reference", type=Path)
    against.add_argument("--bundle", type=Path, help="the folder of an unpacked bundle")
    judge.add_argument("--title", help="what to call the bundle")
    judge.add_argument("--results", type=Path, required=True)
    judge.add_argument("--evaluations", type=Path, nargs="+", required=True)
    compare = commands.add_parser("compare", help="judge run B against run A: results folders or bundles")
    compare.add_argument("a", type=Path, metavar="A")
    compare.add_argument("b", type=Path, metavar="B")
    for command in (judge, compare):
        command.add_argument("--margin", type=_positive, help="largest difference that counts as none")
        command.add_argument("--json", type=Path)
        command.add_argument("--markdown", type=Path)
    show = commands.add_parser("show", help="print verdicts; the exit code is theirs")
    show.add_argument("json", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "show":
            reproduction = read_record(options.json, Reproduction)
        elif options.command == "compare":
            with tempfile.TemporaryDirectory() as scratch:
                a, b = _side(options.a, Path(scratch) / "a"), _side(options.b, Path(scratch) / "b")
                reproduction = judge_runs(f"{options.b} against {options.a}", str(options.a), a, b, options.margin)
            _write(reproduction, options.json, options.markdown)
        else:
            models = load(options.results, options.evaluations)
            if options.reference is not None:
                reproduction = judge_published(references.load(options.reference), models, options.margin)
            else:
                bundle.check_folder(options.bundle)
                theirs = options.bundle / "results"
                reproduction = judge_runs(
                    f"Run again from {options.title or options.bundle.name}",
                    options.title or str(options.bundle),
                    (theirs, load(theirs, newest(theirs))),
                    (options.results, models),
                    options.margin,
                )
            _write(reproduction, options.json, options.markdown)
            return 0
    except (RecordError, BundleError, ConfigError, NothingToJudge, OSError) as error:
        print(f"reproval.reproduce: {error}", file=sys.stderr)
        return 2
    except Exception:
        # Python's own exit code for it is 1, which is that of "differs".
        traceback.print_exc()
        return 2
    print(table_text(reproduction), end="")
    return reproduction.exit_code


if __name__ == "__main__":
    sys.exit(main())
