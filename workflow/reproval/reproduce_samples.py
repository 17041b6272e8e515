"""Two sides' samples of one score, question by question: the prompts, the answers, and the bits of the responses."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproval.reproduce_content import SampleComparison

NAMED_CHANGES = 5


@dataclass(frozen=True)
class Answer:
    document: int
    prompt: str
    responses: Any
    filtered: Any


Answers = dict[tuple[str, str], dict[tuple[str, int], Answer]]


def read_answers(path: Path) -> Answers:
    """Responses from samples.jsonl.gz, whose hash has been checked by `collect.load`.

    By task and filter, and there by the document's hash and which of the equal documents it is.
    """
    found: Answers = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for raw in stream:
            line = json.loads(raw)
            task, filter_name, document = line["task"], line["filter"], line["doc_hash"]
            nth = seen[(task, filter_name, document)]
            seen[(task, filter_name, document)] += 1
            found.setdefault((task, filter_name), {})[(document, nth)] = Answer(
                line["doc_id"], line["prompt_hash"], line["resps"], line["filtered_resps"]
            )
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
    sides: tuple[Answers, Answers],
    files: tuple[Path, Path],
    leaves: Sequence[str],
    filter_name: str,
    changed_scores: int,
) -> SampleComparison:
    """Question by question, over the tasks of one score: the reference's answers, and ours.

    `files` are what both were read from, for the text of a prompt.
    """
    documents = only_theirs = only_ours = prompts = answers = 0
    changed: list[str] = []
    first, largest, equal = None, None, True
    for leaf in leaves:
        a, b = (side.get((leaf, filter_name), {}) for side in sides)
        only_theirs += len(a.keys() - b.keys())
        only_ours += len(b.keys() - a.keys())
        for key in sorted(a.keys() & b.keys(), key=lambda key: a[key].document):
            x, y = a[key], b[key]
            documents += 1
            if x.prompt != y.prompt:
                prompts += 1
                first = first or _first_difference(
                    leaf, x.document, _prompt(files[0], leaf, x.document), _prompt(files[1], leaf, y.document)
                )
            p, q = _choice(x.filtered), _choice(y.filtered)
            if p != q:
                answers += 1
                if len(changed) < NAMED_CHANGES:
                    changed.append(f"{leaf} {x.document}: {_short(p)} -> {_short(q)}")
            equal = equal and x.responses == y.responses
            pairs = list(zip(_floats(x.responses), _floats(y.responses), strict=False))
            if pairs:
                apart = (abs(u - v) for u, v in pairs if math.isfinite(u - v))
                largest = max(largest or 0.0, max(apart, default=0.0))
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
