"""Samples in columns are the samples line by line, whatever the lines look like."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import synthetic

from reproval import samples
from reproval.samples import SampleKey, TaskSamples

TASKS = (*synthetic.DEMO_TASKS, synthetic.Task("mmlu", "group", 30, 4))


def line(number: int, **changes: Any) -> dict[str, Any]:
    hashed = {"doc_hash": f"{number:02x}" * 32, "prompt_hash": "cd" * 32}
    return {"task": "t", "filter": "none", "doc_id": number, **hashed, "metrics": ["acc"], "acc": 1.0} | changes


def packed(*lines: dict[str, Any]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in lines).encode()


def same(a: dict[SampleKey, TaskSamples], b: dict[SampleKey, TaskSamples]) -> None:
    assert a.keys() == b.keys()
    for key, x in a.items():
        y = b[key]
        assert x.documents.dtype == y.documents.dtype == np.uint64
        assert np.array_equal(x.documents, y.documents)
        assert np.array_equal(x.prompts, y.prompts)
        assert x.values.keys() == y.values.keys()
        assert x.weighted.keys() == y.weighted.keys()
        for name in x.values:
            assert np.array_equal(x.values[name], y.values[name], equal_nan=True)
        for name in x.weighted:
            assert all(np.array_equal(p, q) for p, q in zip(x.weighted[name], y.weighted[name], strict=True))


def test_what_is_read_by_column_is_what_is_read_line_by_line(tmp_path: Path) -> None:
    project = synthetic.write_project(tmp_path, synthetic.DEMO_MODELS[:1], TASKS)
    files = list(project.results.rglob("samples.jsonl.gz"))
    assert len(files) == len(TASKS)
    for path in files:
        text = gzip.decompress(path.read_bytes())
        same(samples.by_column(text), samples.by_line(text))


@pytest.mark.parametrize(
    "lines",
    [
        [line(0), line(1, acc=None), line(2, acc=0)],
        [line(3, doc={"text": "x" * 2_000_000}), line(1)],
        [line(0, target=1), line(1, target="A"), line(2, target=[1, 2], arguments=[["a", "b"], [1]])],
    ],
    ids=["a value that is missing", "a long line", "keys of many types"],
)
def test_lines_that_columns_can_hold(lines: list[dict[str, Any]]) -> None:
    text = packed(*lines)
    same(samples.by_column(text), samples.by_line(text))


@pytest.mark.parametrize(
    "lines",
    [
        [line(0), line(1, acc=True)],
        [line(0), line(1, metrics=["acc", "f1"], f1=[["a"], "b"])],
        [line(0), line(1, filter="other", metrics=["f1"], f1=0.5)],
        [line(0, acc=[-1.5, 3]), line(1, acc=[-1.5, 3, 4])],
        [line(0), line(0, doc_id=1)],
        [line(0, acc=float("nan")), line(1)],
    ],
    ids=["a truth value", "no number", "another metric", "no pair", "equal documents", "not a number"],
)
def test_lines_that_columns_cannot_hold_are_read_one_by_one(
    lines: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = packed(*lines)
    path = tmp_path / "samples.jsonl.gz"
    path.write_bytes(gzip.compress(text))
    same(samples.read_samples(path, samples.sha256_bytes(path.read_bytes())), samples.by_line(text))


def test_equal_documents_of_one_task_are_told_apart() -> None:
    text = packed(line(0), line(0, doc_id=1))
    with pytest.raises((samples._Irregular, pa.ArrowException)):
        samples.by_column(text)
    assert np.unique(samples.by_line(text)[("t", "none")].documents).size == 2


def test_the_order_of_the_lines_does_not_matter() -> None:
    lines = [line(i, doc_hash=hashed * 32, acc=float(i)) for i, hashed in enumerate(["ab", "ef", "ab"])]
    same(samples.by_line(packed(*lines)), samples.by_line(packed(*lines[::-1])))
    lines = lines[:2]
    same(samples.by_column(packed(*lines)), samples.by_column(packed(*lines[::-1])))
