"""Which metric stands for a task, and which models may be compared on it: what is refused, and what is tested how."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reproval import compare, statistics
from reproval.compare import Side
from reproval.records import Score
from reproval.report_content import Headline, Pair
from reproval.samples import TaskSamples

ALPHA = 0.05


def side(values: Any, sizes: list[int] | None = None, score: float | None = None, weights: Any = None) -> Side:
    """One model's values by document; the score is their mean unless it is given."""
    found = np.asarray(values, dtype=np.float64)
    return Side(
        score=Score(
            task="t",
            metric="acc",
            filter="none",
            value=float(np.nanmean(found)) if score is None else score,
            stderr=0.01,
            n=found.size,
            higher_is_better=True,
            group=sizes is not None,
        ),
        sizes=sizes or [found.size],
        documents=np.arange(found.size, dtype=np.uint64),
        prompts=np.arange(found.size, dtype=np.uint64),
        values=found,
        weights=None if weights is None else np.asarray(weights, dtype=np.float64),
        binary=statistics.is_binary(found[~np.isnan(found)]),
    )


def compared(a: Side, b: Side) -> statistics.Comparison:
    found = compare.compare(a, b, ALPHA)
    assert isinstance(found, statistics.Comparison), found
    return found


RIGHT = [1.0] * 30 + [0.0] * 10
BETTER = [1.0] * 38 + [0.0] * 2
LIKELIHOODS = -np.linspace(100, 300, 40)
WORDS = np.linspace(40, 120, 40)
PERPLEXITY = math.exp(-LIKELIHOODS.sum() / WORDS.sum())


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (side(RIGHT, score=math.nan), side(BETTER), "not a number"),
        (side(RIGHT), side(BETTER, score=math.inf), "not a number"),
        (side(RIGHT), side(BETTER[:39]), "not the same documents: 40 and 39, 39 of them shared"),
        (
            side(RIGHT),
            replace(side(BETTER), documents=np.arange(1, 41, dtype=np.uint64)),
            "not the same documents: 40 and 40, 39 of them shared",
        ),
        # The same documents, of which another task has the one in the middle.
        (side(RIGHT, [20, 20]), side(BETTER, [21, 19]), "not the same documents"),
        (
            side(LIKELIHOODS, score=PERPLEXITY, weights=WORDS),
            side(LIKELIHOODS, score=PERPLEXITY, weights=WORDS + 1),
            "different lengths",
        ),
        (side(LIKELIHOODS, score=PERPLEXITY, weights=WORDS), side(LIKELIHOODS), "different lengths"),
        (side(LIKELIHOODS), side(LIKELIHOODS, score=PERPLEXITY, weights=WORDS), "different lengths"),
        (side(RIGHT, score=0.123), side(BETTER), "not a mean of its samples"),
        (side([0.6]), side([0.4]), "not a mean of its samples"),
        (side([math.nan] * 3 + [1.0]), side([1.0] * 3 + [math.nan]), "not a mean of its samples"),
        # A group whose value is no mean of its tasks, and one of perplexities.
        (side(RIGHT, [20, 20], score=0.123), side(BETTER, [20, 20]), "not a mean of its samples"),
        (
            side(LIKELIHOODS, [20, 20], weights=WORDS),
            side(LIKELIHOODS, [20, 20], weights=WORDS),
            "not a mean of its samples",
        ),
    ],
)
def test_what_cannot_be_compared_says_why(a: Side, b: Side, said: str) -> None:
    found = compare.compare(a, b, ALPHA)
    assert isinstance(found, str)
    assert said in found


def test_each_kind_of_score_has_the_test_that_suits_it() -> None:
    binary = compared(side(BETTER), side(RIGHT))
    assert (binary.method, binary.n, binary.effect) == ("McNemar, exact", 40, pytest.approx(0.2))
    fractions = np.linspace(0.2, 0.8, 40)
    for a, b in ((fractions, fractions[::-1]), (np.asarray(RIGHT), fractions), (fractions, np.asarray(RIGHT))):
        assert compared(side(a), side(b)).method == "paired t"
    ratio = compared(
        side(LIKELIHOODS, score=PERPLEXITY, weights=WORDS), side(LIKELIHOODS + 1, score=PERPLEXITY, weights=WORDS)
    )
    assert (ratio.method, ratio.scale) == ("paired ratio", "ratio")
    assert ratio.effect > 1
    # A perplexity by document has no weights: every document counts the same.
    plain = math.exp(-LIKELIHOODS.mean())
    assert compared(side(LIKELIHOODS, score=plain), side(LIKELIHOODS + 1, score=plain)).scale == "ratio"


def test_a_group_is_compared_as_it_was_weighted() -> None:
    """30 questions of one task and 10 of another: by size one table, by task each difference counts half."""
    a, b = side(BETTER, [30, 10]), side(RIGHT, [30, 10])
    assert compared(a, b).method == "McNemar, exact"
    first, second = np.mean(BETTER[:30]), np.mean(BETTER[30:])
    by_task = side(BETTER, [30, 10], score=float(first + second) / 2)
    found = compared(by_task, b)
    assert found.method == "stratified"
    assert found.effect == pytest.approx((0 + 0.8) / 2)
    # 0/1 on one side alone are no table.
    mixed = compared(a, side(np.linspace(0.2, 0.8, 40), [30, 10]))
    assert mixed.method == "stratified"


def test_a_document_without_a_number_on_either_side_is_left_out_of_its_task() -> None:
    a, b = np.asarray(BETTER), np.asarray(RIGHT)
    a[0], b[35] = math.nan, math.nan
    # The score is the mean of the documents that both have.
    both = float(np.delete(a, [0, 35]).mean())
    assert compared(side(a, score=both), side(b)).n == 38
    grouped = compared(side(a, [30, 10], score=both), side(b, [30, 10]))
    assert grouped == compared(side(np.delete(BETTER, [0, 35]), [29, 9]), side(np.delete(RIGHT, [0, 35]), [29, 9]))


def row(model: str, metric: str, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": model,
        "suite": "s",
        "entry": "t",
        "task": "t",
        "metric": metric,
        "filter": "none",
        "top": True,
        "group": False,
        "higher_is_better": True,
        "n_shot": 0,
        "limit": None,
        "value": 0.5,
        "interval_low": 0.4,
        "interval_high": 0.6,
        "interval_method": "Wilson",
        "stderr": 0.05,
        "n": 100,
        "score_levers": "",
        "prompts_cut": 0,
        "repeats": 1,
        "repeat_sd": None,
    }
    return fields | changes


def test_the_metric_that_every_model_has_stands_for_a_task_and_then_the_preferred_one() -> None:
    preference = ["acc_norm", "acc"]
    both = [row(model, metric) for model in ("a", "b") for metric in ("odd", "acc", "acc_norm")]
    [line] = compare.headlines(both, ["a", "b"], preference)
    assert line.metric == "acc_norm"
    one_only = [each for each in both if (each["model"], each["metric"]) != ("b", "acc_norm")]
    [line] = compare.headlines(one_only, ["a", "b"], preference)
    assert line.metric == "acc"
    assert [cell and cell.model for cell in line.cells] == ["a", "b"]
    [line] = compare.headlines([row("b", "odd")], ["a", "b"], preference)
    assert [cell and cell.model for cell in line.cells] == [None, "b"]


def test_a_group_stands_for_its_subtasks() -> None:
    table = [
        row("a", "acc", entry="mmlu", task="mmlu", group=True),
        row("a", "acc", entry="mmlu", task="mmlu_law", top=False),
        row("a", "acc", entry="mmlu", task="mmlu_law", top=False, filter="other"),
        row("a", "acc", entry="mmlu", task="mmlu_math", top=False),
    ]
    [line] = compare.headlines(table, ["a"], ["acc"])
    assert (line.task, line.group, line.subtasks) == ("mmlu", True, 2)


# --- what one model brings -----------------------------------------------------------------------------------------


def samples(values: list[float] | None = None, weighted: bool = False) -> TaskSamples:
    count = 3 if values is None else len(values)
    numbers, ids = np.asarray(values or [], dtype=np.float64), np.arange(count, dtype=np.uint64)
    return TaskSamples(
        documents=ids,
        prompts=ids,
        values={} if values is None or weighted else {"acc": numbers},
        weighted={"acc": (numbers, np.ones(count))} if weighted else {},
    )


def brought(found: dict[str, TaskSamples], task: str = "g", suite: str = "s") -> Side | str:
    """What a model with a group g of the tasks t1 and t2 brings to the comparison of it, or of one task."""
    score = Score(
        task=task, metric="acc", filter="none", value=0.5, stderr=None, n=6, higher_is_better=True, group=task == "g"
    )
    unit = SimpleNamespace(
        result=SimpleNamespace(suite="s", scores=[score]),
        top_tasks={task},
        leaves={"g": ["t1", "t2"]}.get,
        samples={(name, "none"): each for name, each in found.items()},
    )
    model: Any = SimpleNamespace(label="m", units=[unit])
    [line] = compare.headlines([row("m", "acc", suite=suite, entry=task, task=task, group=task == "g")], ["m"], [])
    return compare.side(model, line)


def test_a_model_brings_the_documents_of_all_tasks_of_a_group() -> None:
    found = brought({"t1": samples([1.0, 0.0]), "t2": samples([1.0, 1.0, 0.0])})
    assert isinstance(found, Side)
    assert (found.sizes, found.values.tolist(), found.binary) == ([2, 3], [1.0, 0.0, 1.0, 1.0, 0.0], True)
    alone = brought({"t1": samples([0.5, 0.25]), "t2": samples([1.0])}, task="t1")
    assert isinstance(alone, Side)
    assert (alone.sizes, alone.values.tolist(), alone.binary) == ([2], [0.5, 0.25], False)
    weighted = brought({"t1": samples([-3.0, -4.0], True), "t2": samples([-5.0], True)})
    assert isinstance(weighted, Side)
    assert weighted.weights is not None
    assert weighted.values.tolist() == [-3.0, -4.0, -5.0]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "m has no samples with filter none"),
        ({"t1": samples([1.0, 0.0])}, "m has no samples with filter none"),
        ({"t1": samples([1.0, 0.0]), "t2": samples()}, "not made of numbers by document"),
        ({"t1": samples([-3.0], True), "t2": samples()}, "not made of numbers by document"),
    ],
)
def test_a_group_of_which_a_part_is_missing_is_not_compared_by_the_rest(
    found: dict[str, TaskSamples], said: str
) -> None:
    told = brought(found)
    assert isinstance(told, str)
    assert said in told


def test_a_task_of_another_suite_is_another_task() -> None:
    assert brought({"t1": samples([1.0]), "t2": samples([1.0])}, suite="other") == "m was not evaluated on it"


# --- all pairs -----------------------------------------------------------------------------------------------------


def evaluated(label: str, tasks: dict[str, Side]) -> Any:
    """A model with these tasks, each by itself."""
    scores = [each.score.model_copy(update={"task": name}) for name, each in tasks.items()]
    found = {
        (name, "none"): TaskSamples(
            documents=each.documents,
            prompts=each.prompts,
            values={"acc": each.values} if each.weights is None else {},
            weighted={} if each.weights is None else {"acc": (each.values, each.weights)},
        )
        for name, each in tasks.items()
    }
    unit = SimpleNamespace(
        result=SimpleNamespace(suite="s", scores=scores),
        top_tasks=set(tasks),
        leaves=lambda task: [task],
        samples=found,
    )
    return SimpleNamespace(label=label, units=[unit])


def lines(tasks: list[str], models: list[str], **changes: Any) -> list[Headline]:
    table = [row(model, "acc", entry=task, task=task, **changes) for task in tasks for model in models]
    return compare.headlines(table, models, [])


def test_a_difference_that_is_one_of_many_tests_has_to_be_larger() -> None:
    """Six answers of forty that changed one way: p = 2 / 2^6, below 5 % alone and above it among three tests."""
    worse, better = side([1.0] * 24 + [0.0] * 16), side([1.0] * 30 + [0.0] * 10)
    found: dict[int, Pair] = {}
    for count in (1, 3):
        tasks = [f"t{n}" for n in range(count)]
        models = [evaluated("a", dict.fromkeys(tasks, worse)), evaluated("b", dict.fromkeys(tasks, better))]
        pairs, untested = compare.comparisons(models, lines(tasks, ["a", "b"]))
        assert untested == []
        assert len(pairs) == count
        found[count] = pairs[0]
    alone, many = found[1], found[3]
    assert alone.p_value == many.p_value == pytest.approx(2 / 2**6)
    assert (alone.significant, alone.better) == (True, "b")
    assert (many.p_holm, many.significant, many.better) == (pytest.approx(6 / 2**6), False, None)
    assert (alone.detectable or 0) < (many.detectable or 0)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_the_lower_perplexity_is_better_in_whatever_order_models_stand(order: tuple[str, str]) -> None:
    rng = np.random.default_rng(2)
    likelihoods = {"a": LIKELIHOODS, "b": LIKELIHOODS - 20 - rng.random(40)}
    models = [
        evaluated(name, {"t": side(each, score=math.exp(-each.sum() / WORDS.sum()), weights=WORDS)})
        for name, each in ((name, likelihoods[name]) for name in order)
    ]
    [pair] = compare.comparisons(models, lines(["t"], list(order), higher_is_better=False))[0]
    assert pair.scale == "ratio"
    assert pair.better == "a"
    [unknown] = compare.comparisons(models, lines(["t"], list(order), higher_is_better=None))[0]
    assert (unknown.significant, unknown.better) == (True, None)


def test_the_levers_of_both_models_stand_at_their_pair() -> None:
    models = [evaluated(name, {"t": side(RIGHT)}) for name in ("a", "b")]
    table = [row("a", "acc", score_levers="dtype"), row("b", "acc", score_levers="quantization,max_model_len")]
    [pair] = compare.comparisons(models, compare.headlines(table, ["a", "b"], []))[0]
    assert pair.score_levers == ["a: dtype", "b: quantization", "b: max_model_len"]


def test_the_most_certain_difference_stands_first() -> None:
    base, some, more = (side([1.0] * n + [0.0] * (40 - n)) for n in (20, 27, 35))
    tasks = {"a": base, "b": base, "c": base}, {"a": some, "b": more, "c": base}
    models = [evaluated(name, each) for name, each in zip(("x", "y"), tasks, strict=True)]
    pairs, _ = compare.comparisons(models, lines(["a", "b", "c"], ["x", "y"]))
    assert [pair.task for pair in pairs] == ["b", "a", "c"]
