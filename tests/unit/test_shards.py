"""How one model's requests are divided over jobs, and what the job that merges them refuses."""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from examples import engine_settings, model_facts, provenance_record, run_file, task_facts
from hypothesis import given
from hypothesis import strategies as st

from reproval import merge, shards
from reproval.files import sha256_file, write_record
from reproval.memory import Trace, join_traces, write_trace
from reproval.records import (
    EngineSettings,
    Facts,
    Hardware,
    Plan,
    ScoringPath,
    ShardAnswers,
    ShardResult,
    TimeEstimate,
)
from reproval.tasks import TaskError

# --- how many --------------------------------------------------------------------------------------------------------


def plan(work_s: float | None, start_s: float = 60.0) -> Plan:
    return Plan(
        run="m-000000000000",
        model="m",
        hardware=Hardware(gpus=1, gpu_memory_bytes=80 * 2**30, host_memory_bytes=2**36, cpus=8),
        policy="auto",
        tier="t",
        parameters=1,
        fits=True,
        levers=[],
        reasons=[],
        ladder=[],
        time=None if work_s is None else TimeEstimate(engine_start_s=start_s, work_s=work_s, gpu_hours=1),
    )


def facts(*documents: int) -> Facts:
    tasks = [task_facts(unit=f"u{n}", task=f"t{n}", documents=d) for n, d in enumerate(documents)]
    return Facts(run="r", model="m", model_digest="1" * 64, model_facts=model_facts(), tasks=tasks)


@pytest.mark.parametrize(
    ("hours", "expected"), [(0.01, 1), (1.9, 1), (2.0, 2), (10, 6), (1000, 50), (None, 1)], ids=str
)
def test_auto_makes_a_job_take_two_hours_and_no_more_jobs_than_documents(hours: float | None, expected: int) -> None:
    found = shards.count("auto", plan(None if hours is None else hours * 3600), facts(10, 50))
    assert found == expected


def test_an_engine_that_takes_long_to_start_does_not_make_jobs_without_number() -> None:
    assert shards.count("auto", plan(10 * 3600, start_s=3 * 3600), facts(1000)) == 10


def test_a_number_is_taken_as_it_is_unless_there_is_less_to_divide() -> None:
    assert shards.count(3, plan(1), facts(10, 50)) == 3
    assert shards.count(80, plan(1), facts(10, 50)) == 50
    assert shards.count(3, plan(1), facts()) == 1
    # The subtasks of an entry are divided together.
    group = [task_facts(unit="group", task=f"t{n}", documents=10) for n in range(3)]
    assert shards.count(80, plan(1), facts().model_copy(update={"tasks": group})) == 30


# --- which -----------------------------------------------------------------------------------------------------------

contexts = st.lists(st.text(alphabet="ab \n", max_size=40), min_size=1, max_size=60)
numbers = st.integers(1, 9)


def common(left: str, right: str) -> int:
    unequal = (n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(unequal, min(len(left), len(right)))


def costs_of(texts: list[str], tokens: list[float]) -> dict[str, int]:
    """What each context costs, as `divide` documents it."""
    ordered = sorted(set(texts))
    found = {}
    for place, text in enumerate(ordered):
        neighbours = ordered[max(place - 1, 0) : place] + ordered[place + 1 : place + 2]
        own = len(text) - max((common(text, other) for other in neighbours), default=0)
        more = sum(number for other, number in zip(texts, tokens, strict=True) if other == text)
        found[text] = shards.CONTEXT_TOKENS + round(own / shards.CHARACTERS_PER_TOKEN + more)
    return found


@given(contexts, numbers, st.data())
def test_every_request_has_one_shard_and_equal_contexts_the_same(texts: list[str], count: int, data: Any) -> None:
    tokens = data.draw(st.lists(st.floats(0, 1000), min_size=len(texts), max_size=len(texts)))
    places = shards.divide(texts, tokens, count)
    assert all(0 <= place < count for place in places)
    of_context = defaultdict(set)
    for text, place in zip(texts, places, strict=True):
        of_context[text].add(place)
    assert all(len(found) == 1 for found in of_context.values())
    # Contexts that begin alike are neighbours in order, and a shard is a piece of that order.
    in_order = [place for _, place in sorted(zip(texts, places, strict=True))]
    assert in_order == sorted(in_order)


@given(contexts, numbers, st.data())
def test_no_shard_costs_more_than_the_mean_and_one_context(texts: list[str], count: int, data: Any) -> None:
    tokens = data.draw(st.lists(st.floats(0, 1000), min_size=len(texts), max_size=len(texts)))
    places = dict(zip(texts, shards.divide(texts, tokens, count), strict=True))
    costs = costs_of(texts, tokens)
    load = [sum(cost for text, cost in costs.items() if places[text] == shard) for shard in range(count)]
    assert max(load) <= math.ceil(sum(costs.values()) / count) + max(costs.values())


@given(contexts, numbers, st.randoms(use_true_random=False))
def test_the_order_of_the_requests_does_not_matter(texts: list[str], count: int, random: Any) -> None:
    before = dict(zip(texts, shards.divide(texts, [1.0] * len(texts), count), strict=True))
    random.shuffle(texts)
    assert dict(zip(texts, shards.divide(texts, [1.0] * len(texts), count), strict=True)) == before


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_common_prefix(prefix: str, left: str, right: str) -> None:
    assert shards.common_prefix(prefix + left, prefix + right) == common(prefix + left, prefix + right)


def test_questions_of_one_kind_are_divided_evenly_and_choices_stay_with_their_question() -> None:
    shots = "Q: what?\nA: that\n" * 40
    requests = [(f"{shots}Q: number {n}?\nA:", f" {letter}") for n in range(400) for letter in "ABCD"]
    places = shards.assign("loglikelihood", requests, 4)
    sizes = [places.count(shard) for shard in range(4)]
    assert max(sizes) - min(sizes) <= 0.1 * len(requests) / 4
    assert all(len(set(places[n : n + 4])) == 1 for n in range(0, len(places), 4))


def test_requests_without_a_context_are_divided_by_what_they_score() -> None:
    """As acc_mutual_info asks for every choice alone."""
    assert set(shards.assign("loglikelihood", [("", f"choice {n}") for n in range(40)], 4)) == {0, 1, 2, 3}


def test_a_long_answer_costs_what_it_may_generate() -> None:
    long = [(f"a{n}", {"max_gen_toks": 1000}) for n in range(10)]
    short = [(f"b{n}", {"max_gen_toks": 10}) for n in range(10)]
    places = shards.assign("generate_until", long + short, 2)
    assert 4 <= places[:10].count(0) <= 6


def test_many_choices_of_one_question_and_long_ones_cost_what_they_score() -> None:
    choices = [("z: which?", f"{n:400}") for n in range(100)]
    others = [(f"a{n:03}: which?", f"{n:400}") for n in range(100)]
    places = shards.assign("loglikelihood", others + choices, 2)
    assert places[100:] == [1] * 100
    assert places[:100].count(0) >= 80


def test_what_contexts_share_is_counted_once() -> None:
    """A hundred questions after the same examples cost less than ten after examples of their own."""
    same = [("a" * 8000 + str(n), " yes") for n in range(100)]
    own = [(f"b{n}" + "c" * 8000, " yes") for n in range(10)]
    assert set(shards.assign("loglikelihood", same + own, 2)[:100]) == {0}


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_come_back_bit_for_bit_and_the_same_answers_make_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: shards.Answers = {"k": {"a": [[-0.1 + 1e-17, True]], "b": ["é\n", "second draw"], "c": [-math.inf]}}
    for year, name in enumerate(("one", "two")):
        monkeypatch.setattr(time, "time", lambda now=year * 3e7: now)
        shards.write_answers(tmp_path / name, answers)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert {name: values for _, name, values in shards.read_answers(tmp_path / "one")} == answers["k"]


def test_a_request_is_named_by_all_of_its_arguments() -> None:
    told: list[tuple[str, tuple[Any, ...]]] = [
        ("loglikelihood", ("a", "b")),
        ("loglikelihood", ("ab", "")),
        ("loglikelihood", ("a",)),
        # Half of a character, which broken data sets have.
        ("loglikelihood_rolling", ("\ud83d",)),
        ("generate_until", ("a", {"until": ["x"]})),
        ("generate_until", ("a", {"until": ["y"]})),
        ("loglikelihood_rolling", ("a",)),
    ]
    assert len({shards.request_name(kind, arguments) for kind, arguments in told}) == len(told)
    one, two = {"until": ["x"], "max_gen_toks": 1}, {"max_gen_toks": 1, "until": ["x"]}
    assert shards.request_name("generate_until", ("a", one)) == shards.request_name("generate_until", ("a", two))


def shard(folder: Path, number: int, of: int, settings: EngineSettings | None = None, **changes: Any) -> Path:
    path = folder / f"{number}-of-{of}.json"
    answers = path.with_suffix(".answers.jsonl.gz")
    shards.write_answers(answers, {"k": {f"request {number}": [number]}})
    result = ShardResult(
        run="r",
        shard=number,
        shards=of,
        rung=0,
        settings=settings or engine_settings(),
        score_levers=[],
        answered=ShardAnswers(units=[], provenance=provenance_record()),
        answers_sha256=sha256_file(answers),
        attempts=[],
        begin="2026-01-01T00:00:00+00:00",
        duration_s=1,
    )
    write_record(path, result.model_copy(update=changes))
    return path


def test_all_shards_of_one_division_are_read_in_their_order(tmp_path: Path) -> None:
    paths = [shard(tmp_path, number, 3) for number in (3, 1, 2)]
    found = merge.read_shards(paths, "r")
    assert [each.result.shard for each in found] == [1, 2, 3]
    assert set(merge.collect_answers(found)["k"]) == {"request 1", "request 2", "request 3"}
    with pytest.raises(merge.MergeError, match="expected shards 1 to 2"):
        merge.read_shards(paths[:2], "r")
    with pytest.raises(merge.MergeError, match="of other"):
        merge.read_shards(paths, "other")


def test_answers_that_are_not_those_of_the_record_are_named(tmp_path: Path) -> None:
    found = merge.read_shards([shard(tmp_path, 1, 1)], "r")
    shards.write_answers(found[0].answers, {"k": {"request 1": [2]}})
    with pytest.raises(merge.MergeError, match=r"1-of-1.answers.jsonl.gz: SHA-256 .* shard 1"):
        merge.collect_answers(found)
    found[0].answers.unlink()
    with pytest.raises(merge.MergeError, match=r"1-of-1.answers.jsonl.gz: cannot be read"):
        merge.collect_answers(found)


def test_shards_that_fell_to_different_settings_are_not_merged(tmp_path: Path) -> None:
    short = engine_settings(max_model_len=128, max_num_seqs=7)
    paths = [shard(tmp_path, 1, 2), shard(tmp_path, 2, 2, short, rung=3)]
    results = [each.result for each in merge.read_shards(paths, "r")]
    merge.check_alike(results, [["k"], ["k"]])  # A neutral lever, and so the same keys.
    with pytest.raises(merge.MergeError) as error:
        merge.check_alike(results, [["k"], ["other"]])
    text = str(error.value)
    assert "shard 1 ran on rung 0 with max_model_len 256" in text
    assert "shard 2 ran on rung 3 with max_model_len 128" in text
    assert "give the model max_model_len: 128 in the configuration" in text
    assert "shards: 1" in text


def test_what_went_which_way_is_added_up() -> None:
    one = {"a": ScoringPath(requests=4, suffix=3), "b": ScoringPath(requests=1)}
    two = {"a": ScoringPath(requests=2, cached=2)}
    assert merge.summed([one, two]) == {
        "a": ScoringPath(requests=6, suffix=3, cached=2),
        "b": ScoringPath(requests=1),
    }


def test_traces_are_joined_with_their_attempts_numbered_on(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    def trace(*gpus: int) -> Trace:
        found = Trace(gpu_bytes=tuple(type(Trace().host_bytes)("q", [used]) for used in gpus))
        found.t_s.append(0.5)
        found.host_bytes.append(7)
        found.phases.append("weights")
        return found

    write_trace(tmp_path / "one", Trace(), trace(1))  # An attempt of an earlier job has no trace any more.
    write_trace(tmp_path / "two", trace(2, 3))
    join_traces(tmp_path / "all", [(tmp_path / "one", 2), (tmp_path / "two", 1)])
    rows = pq.read_table(tmp_path / "all").to_pylist()
    assert [(row["attempt"], row["gpu0_bytes"], row["gpu1_bytes"]) for row in rows] == [(1, 1, None), (2, 2, 3)]
    assert {row["phase"] for row in rows} == {"weights"}


@pytest.mark.parametrize(
    ("generation", "tokens"),
    [
        ({}, 256),
        ({"max_gen_toks": 8}, 8),
        # Names by which transformers, vLLM and OpenAI know it, which lm-eval takes in a task's file.
        ({"max_new_tokens": 1024}, 1024),
        ({"max_tokens": 12, "max_gen_toks": None}, 12),
        ({"max_completion_tokens": 9, "max_gen_toks": 7}, 7),
    ],
)
def test_the_length_of_an_answer_by_any_of_its_names(generation: dict[str, Any], tokens: int) -> None:
    assert shards.answer_tokens(generation) == tokens
    assert shards.context_and_tokens("generate_until", ["text", generation]) == ("text", tokens)


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(errno.ENOSPC, FULL), f"results: {FULL}; mend that (make room, permit it), and start again"),
        (OSError(errno.ENOSPC, FULL, "/r/t"), f"/r/t: {FULL}; mend that (make room, permit it), and start again"),
        (TaskError("suites.s.tasks: t: no such task"), "suites.s.tasks: t: no such task"),
    ],
)
@pytest.mark.parametrize("where", ["merge", "write_record"])
def test_a_merge_that_ends_says_why(monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str, where: str) -> None:
    def fail(*_: object) -> None:
        raise raised

    for name in ("merge", "read_shards", "write_record"):
        monkeypatch.setattr(merge, name, lambda *_: [])
    monkeypatch.setattr(merge, where, fail)
    monkeypatch.setattr(merge, "read_record", lambda *_: run_file())
    monkeypatch.setattr(merge.memory, "join_traces", lambda *_: None)
    names = ("run", "facts", "plan", "manifest", "results", "out", "trace", "shards")
    monkeypatch.setattr(sys, "argv", ["merge", *(word for name in names for word in (f"--{name}", name))])
    with pytest.raises(SystemExit) as stopped:
        merge.main()
    assert str(stopped.value).startswith(f"reproval merge: {said}")
