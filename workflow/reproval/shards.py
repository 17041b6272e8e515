"""One model's requests divided over several jobs: how many jobs, and which of them answers what.

Pure functions of requests, so that every job, and the one that merges their answers (merge.py), divides alike without
a word between them. docs/scoring.md says why the division is as it is.

Run as `python -m reproval.shards`, it writes how many jobs a run has (rule `divide`).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from reproval.files import atomic, read_record, sha256_bytes, write_record
from reproval.records import Division, Facts, Plan

JOB_S = 2 * 3600.0
"""What `shards: auto` makes a job take, by the plan's estimate and with the start of its engine."""
CHARACTERS_PER_TOKEN = 4
"""Roughly, of English text under vocabularies of 32,000 to 256,000. Only the ratio between requests matters."""
CONTEXT_TOKENS = 16
"""What a context costs however short it is: a millisecond of Python, in which a GPU computes a few tokens."""


# --- how many ------------------------------------------------------------------------------------------------------


def count(asked: int | Literal["auto"], plan: Plan, facts: Facts) -> int:
    """Jobs for a run: as many as asked for, or as many as keep each below JOB_S; never more than there is to divide.

    Each entry of a suite is divided by itself, so the documents of the largest are the most that there can be.
    """
    documents: dict[tuple[str, str], int] = {}
    for task in facts.tasks:
        entry = (task.suite, task.unit)
        documents[entry] = documents.get(entry, 0) + task.documents
    wanted = asked if asked != "auto" else _by_time(plan)
    return max(1, min(wanted, max(documents.values(), default=1)))


def _by_time(plan: Plan) -> int:
    if plan.time is None:
        return 1
    # A start that takes most of the target would make jobs that do little else.
    work_s = max(JOB_S - plan.time.engine_start_s, JOB_S / 2)
    return math.ceil(plan.time.work_s / work_s)


# --- which ---------------------------------------------------------------------------------------------------------


def divide(contexts: Sequence[str], tokens: Sequence[float], shards: int) -> list[int]:
    """The shard, 0 to `shards` - 1, of each request, from its context and the tokens that it needs beside the context.

    Requests with equal contexts stay together. Contexts are put in order, each costs what it shares with neither of its
    neighbours, and the sequence is cut into `shards` pieces: so contexts that begin alike, such as those of one task
    with the same examples, mostly meet in one engine's prefix cache. A piece costs at most the mean and the largest
    single context. The order of the requests does not matter.
    """
    needs: dict[str, float] = dict.fromkeys(contexts, 0.0)
    for context, more in zip(contexts, tokens, strict=True):
        needs[context] += more
    ordered = sorted(needs)
    shared = [0, *(common_prefix(one, other) for one, other in pairwise(ordered)), 0]
    costs = []
    for context, before, after in zip(ordered, shared, shared[1:], strict=False):
        own = (len(context) - max(before, after)) / CHARACTERS_PER_TOKEN
        # Whole numbers, so that sums are exact.
        costs.append(CONTEXT_TOKENS + round(own + needs[context]))
    total, spent = sum(costs), 0
    found = {}
    for context, cost in zip(ordered, costs, strict=True):
        found[context] = (2 * spent + cost) * shards // (2 * total)
        spent += cost
    return [found[context] for context in contexts]


def common_prefix(left: str, right: str) -> int:
    """Number of leading characters that are equal, by bisection: contexts are long, and slices compare fast."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# What lm-eval reads the length of an answer from, in its order (normalize_gen_kwargs), and what it takes without.
ANSWER_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_MAX_GEN_TOKS = 256


def answer_tokens(generation: Mapping[str, Any]) -> int:
    """The most tokens of an answer to a request with these gen_kwargs."""
    return int(next((generation[key] for key in ANSWER_KEYS if generation.get(key) is not None), DEFAULT_MAX_GEN_TOKS))


def context_and_tokens(kind: str, arguments: Sequence[Any]) -> tuple[str, float]:
    """What `divide` needs of one lm-eval request. Without a context, the text that is scored stands for it."""
    text = str(arguments[0])
    if kind == "generate_until":
        return text, float(answer_tokens(arguments[1]))
    if kind == "loglikelihood":
        return text or str(arguments[1]), len(arguments[1]) / CHARACTERS_PER_TOKEN
    return text, 0.0


def assign(kind: str, requests: Sequence[Sequence[Any]], shards: int) -> list[int]:
    """The shard of each of lm-eval's requests of one kind, given by their arguments."""
    described = [context_and_tokens(kind, arguments) for arguments in requests]
    return divide([context for context, _ in described], [tokens for _, tokens in described], shards)


# --- answers on disk -----------------------------------------------------------------------------------------------


def request_name(kind: str, arguments: Sequence[Any]) -> str:
    """32 hex digits that stand for a request as lm-eval makes it, whatever model and settings answer it."""
    told = json.dumps([kind, *arguments], sort_keys=True, default=repr)
    return sha256_bytes(told.encode("ascii"))[:32]


Answers = dict[str, dict[str, list[Any]]]
"""By the key of the suite's entry and the name of the request: answers, one for each time that it is asked."""


def write_answers(path: Path, answers: Answers) -> None:
    """One JSON line a request, gzip; the same answers make the same bytes."""
    with atomic(path, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream:
        for key, requests in answers.items():
            for name, values in requests.items():
                stream.write(json.dumps([key, name, values]).encode("ascii") + b"\n")


def read_answers(path: Path) -> Iterator[tuple[str, str, list[Any]]]:
    """Key, name and answers of every line. Raises OSError, EOFError and ValueError for what is no such file."""
    with gzip.open(path, "rb") as stream:
        for line in stream:
            key, name, values = json.loads(line)
            yield key, name, values


def main() -> None:
    parser = argparse.ArgumentParser(description="Write how many jobs a run is divided over.")
    parser.add_argument("--shards", required=True, help="a number, or auto")
    for name in ("plan", "facts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    plan, facts = read_record(options.plan, Plan), read_record(options.facts, Facts)
    asked: int | Literal["auto"] = "auto" if options.shards == "auto" else int(options.shards)
    write_record(options.out, Division(run=plan.run, asked=asked, shards=count(asked, plan, facts)))


if __name__ == "__main__":
    main()
