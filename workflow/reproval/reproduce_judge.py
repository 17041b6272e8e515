"""The judgement: every score of a run beside a published value, or beside another run, and the verdict of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reproval import verdict
from reproval.collect import ModelData, UnitData
from reproval.records import Score
from reproval.reference import PublishedScore, Reference
from reproval.reproduce_content import Reproduction, ScoreVerdict, Unlike
from reproval.reproduce_evidence import paired, published
from reproval.reproduce_samples import Answers, compare_samples, read_answers
from reproval.reproduce_settings import against_published, between_runs
from reproval.verdict import ALPHA, Evidence, Verdict

DEFAULT_MARGIN = 0.02
EXIT_CODES: dict[Verdict, int] = {"identical": 0, "reproduced": 0, "differs": 1, "inconclusive": 3}


class NothingToJudge(Exception):
    """The two sides have no score in common."""


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
        found = asdict(evidence) if evidence is not None else {}
        scores.append(draft.entry.model_copy(update=found | {"verdict": word}))
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
