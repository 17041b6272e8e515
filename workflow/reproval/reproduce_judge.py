"""The judgement: every score of a run beside a published value, or beside another run, and the verdict of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reproval import verdict
from reproval.collect import ModelData, UnitData
from reproval.keep import SAMPLES
from reproval.records import Score
from reproval.reference import PublishedScore, Reference
from reproval.reproduce_content import Reproduction, SampleComparison, ScoreVerdict, Unlike
from reproval.reproduce_evidence import Paired, paired, published
from reproval.reproduce_samples import Answers, compare_samples, read_answers
from reproval.reproduce_settings import PROMPTS, against_published, between_runs
from reproval.verdict import ALPHA, Evidence, Verdict

DEFAULT_MARGIN = 0.02
EXIT_CODES: dict[Verdict, int] = {"identical": 0, "reproduced": 0, "differs": 1, "inconclusive": 3}


class NothingToJudge(Exception):
    """The two sides have no score in common."""


@dataclass(frozen=True)
class Draft:
    """A score before its verdict, which needs the whole table."""

    entry: ScoreVerdict
    evidence: Evidence | None = None
    identical: bool = False


def conclude(title: str, source: str, because: str, drafts: Sequence[Draft]) -> Reproduction:
    """Verdicts with Holm's correction over the table, which has at least one score."""
    # What the samples show to be identical is not tested, and costs the others nothing.
    words = iter(verdict.decide([draft.evidence for draft in drafts if not draft.identical]))
    scores = []
    for draft in drafts:
        word = "identical" if draft.identical else next(words)
        found = asdict(draft.evidence) if draft.evidence else {}
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


def _entry(model: str, suite: str, score: Score | PublishedScore, note: str | None = None) -> ScoreVerdict:
    """A score of the reference, before it is known whether it was evaluated here."""
    return ScoreVerdict(
        model=model,
        suite=suite,
        task=score.task,
        metric=score.metric,
        filter=score.filter,
        verdict="inconclusive",
        reference=score.value,
        here=None,
        notes=[note] if note else [],
        unlike=[],
    )


def _missing(entry: ScoreVerdict) -> Draft:
    return Draft(entry.model_copy(update={"notes": [*entry.notes, "not evaluated here"]}))


def _because(margin: float | None, else_because: str) -> str:
    return else_because if margin is None else f"{margin}, given with the command"


def _find(
    models: Sequence[ModelData], model: str, suite: str, like: Score | PublishedScore, repeat: int = 0
) -> tuple[ModelData, UnitData, Score] | None:
    """The score of the same task, metric and filter."""
    for candidate in models:
        if (candidate.evaluation.model, candidate.repeat) != (model, repeat):
            continue
        for unit in candidate.units:
            if unit.result.suite == suite:
                for score in unit.result.scores:
                    if (score.task, score.metric, score.filter) == (like.task, like.metric, like.filter):
                        return candidate, unit, score
    return None


# --- against a published value -------------------------------------------------------------------------------------


def judge_published(reference: Reference, models: Sequence[ModelData], margin: float | None = None) -> Reproduction:
    """Judge runs against a reference; `margin`, absolute, takes the place of the reference's own.

    Raises NothingToJudge if none of its scores was evaluated.
    """
    alpha = ALPHA / len(reference.scores)
    drafts = []
    for theirs in reference.scores:
        entry = _entry(theirs.model, theirs.suite, theirs, theirs.note)
        at = _find(models, theirs.model, theirs.suite, theirs)
        if at is None:
            drafts.append(_missing(entry))
            continue
        model, unit, score = at
        chosen = margin if margin is not None else theirs.margin or reference.margin
        evidence, notes = published(score, unit, theirs, chosen, alpha)
        unlike = against_published(reference, theirs, model, unit)
        update = {"here": score.value, "n": score.n, "notes": [*entry.notes, *notes], "unlike": unlike}
        drafts.append(Draft(entry.model_copy(update=update), evidence))
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
    return conclude(reference.title, reference.source.url, _because(margin, reference.margin.because), drafts)


# --- against another run -------------------------------------------------------------------------------------------


def judge_runs(
    title: str,
    source: str,
    theirs: tuple[Path, Sequence[ModelData]],
    ours: tuple[Path, Sequence[ModelData]],
    margin: float | None = None,
) -> Reproduction:
    """Judge runs against runs, each given with its results folder: every score that no group stands for.

    One model against one is judged whatever they are called. Raises NothingToJudge if no score is of both sides.
    """
    (their_results, their_runs), (our_results, our_runs) = theirs, ours
    chosen = DEFAULT_MARGIN if margin is None else margin
    one_model = len(their_runs) == len(our_runs) == 1
    repeats = {0, *(run.repeat for run in our_runs)}
    found = []
    for model in their_runs:
        if model.repeat not in repeats:
            continue
        name = (our_runs[0] if one_model else model).evaluation.model
        for unit in model.units:
            for score in unit.result.scores:
                if score.task in unit.top_tasks:
                    found.append((model, unit, score, _find(our_runs, name, unit.result.suite, score, model.repeat)))
    if not any(at for *_, at in found):
        raise NothingToJudge("the two sides have no score in common: no model, suite and task of the same names")
    alpha = ALPHA / len(found)
    held: dict[Path, Answers] = {}

    def answers_of(path: Path) -> Answers:
        """Scores of one unit follow each other, so that two files at once are enough."""
        if path not in held:
            if len(held) > 1:
                held.clear()
            held[path] = read_answers(path)
        return held[path]

    drafts = []
    for model, unit, score, at in found:
        repeat = f", repeat {model.repeat}" if model.repeat else ""
        entry = _entry(model.evaluation.model + repeat, unit.result.suite, score)
        if at is None:
            drafts.append(_missing(entry))
            continue
        _, unit_here, here = at
        unlike = between_runs(unit, unit_here, score.task)
        entry = entry.model_copy(update={"here": here.value, "n": here.n, "unlike": unlike})
        draft = Draft(entry)
        result = paired(score, here, unit, unit_here, chosen, alpha)
        if result is not None:
            files = their_results / unit.reference.folder / SAMPLES, our_results / unit_here.reference.folder / SAMPLES
            answers = answers_of(files[0]), answers_of(files[1])
            compared = compare_samples(answers, files, result.leaves, score.filter, result.changed_scores)
            draft = _on_samples(entry, result, compared, (score.value, here.value))
        if draft.evidence is None and not draft.identical:
            draft = _as_two_values(draft.entry, score, here, unit_here, chosen, alpha)
        drafts.append(draft)
    because = _because(margin, f"reproval's own, {DEFAULT_MARGIN}, because nobody stated one")
    return conclude(title, source, because, drafts)


def _on_samples(entry: ScoreVerdict, result: Paired, compared: SampleComparison, values: tuple[float, float]) -> Draft:
    """What both sides' samples say of a score. A change of prompts is named in place of that of their hash."""
    unlike, notes = entry.unlike, result.notes
    if compared.changed_prompts:
        at = next((i for i, each in enumerate(unlike) if each.what.startswith(PROMPTS)), len(unlike))
        first = Unlike(what="prompt", reference="", here=compared.first_changed_prompt or "")
        unlike = [*unlike[:at], first, *unlike[at + 1 :]]
    changed = compared.changed_scores or compared.changed_prompts or compared.changed_answers
    same = result.same_documents and not changed
    same_value = math.isclose(*values, rel_tol=1e-9)
    if same and not same_value and all(map(math.isfinite, values)):
        notes = [*notes, "the samples are the same and the values are not: another aggregation"]
    update = {"notes": notes, "samples": compared, "unlike": unlike}
    return Draft(entry.model_copy(update=update), result.evidence, same and same_value)


def _as_two_values(
    entry: ScoreVerdict, theirs: Score, here: Score, unit: UnitData, margin: float, alpha: float
) -> Draft:
    """Judge a score without pairs, for want of samples that make it on both sides."""
    # Not validated: what a person may write into a reference is no rule for what a run came to, NaN included.
    value = PublishedScore.model_construct(
        model="reference", suite="reference", task=theirs.task, metric=theirs.metric, filter=theirs.filter,
        value=theirs.value, stderr=theirs.stderr or None, n=theirs.n or None,
    )  # fmt: skip
    evidence, notes = published(here, unit, value, margin, alpha)
    why = "too few samples of both sides, or they do not make the score: compared as two values"
    return Draft(entry.model_copy(update={"notes": [*entry.notes, why, *notes]}), evidence)
