"""Kept counts are found for the same tokenizer and the same requests, and under no other circumstance.

tests/engine/test_task_facts.py shows what the stage makes of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from examples import UNIT, task_facts

from reproval.counted import Counted
from reproval.records import TaskFacts

WITH = {"tokenizer.json": "1" * 64, "lock": "cpu.txt"}
HASHES = {"second": "2" * 64, "first": "1" * 64}


def tasks(**changes: Any) -> list[TaskFacts]:
    """Counts in another order than that of HASHES."""
    return [task_facts(suite="core", unit="arc", task=n, task_hash=HASHES[n], **changes) for n in ("first", "second")]


def kept(folder: Path) -> Counted:
    found = Counted(folder, WITH)
    found.keep(UNIT, HASHES, tasks())
    return found


def test_counts_are_found_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    assert kept(tmp_path).find(UNIT, HASHES) == tasks()[::-1]
    # Another process, and facts that were made in another order.
    assert Counted(tmp_path, dict(reversed(WITH.items()))).find(UNIT, dict(reversed(HASHES.items()))) == tasks()


def test_counts_of_another_tokenizer_or_of_other_requests_are_not_found(tmp_path: Path) -> None:
    kept(tmp_path)
    assert Counted(tmp_path, WITH | {"tokenizer.json": "3" * 64}).find(UNIT, HASHES) is None
    assert Counted(tmp_path, WITH).find(UNIT, HASHES | {"first": "3" * 64}) is None
    assert Counted(tmp_path, WITH).find(UNIT, {"first": HASHES["first"]}) is None


def test_counts_that_another_suite_left_are_those_of_the_suite_that_asks(tmp_path: Path) -> None:
    kept(tmp_path)
    found = Counted(tmp_path, WITH).find(UNIT.model_copy(update={"suite": "more"}), HASHES)
    assert found is not None
    assert {(each.suite, each.unit) for each in found} == {("more", "arc")}


@pytest.mark.parametrize("change", [('"requests": 100', '"requests": 101'), ('"first"', '"third"'), ("}", "")])
def test_a_file_that_is_not_what_was_written_is_not_found(tmp_path: Path, change: tuple[str, str]) -> None:
    counted = kept(tmp_path)
    [path] = tmp_path.iterdir()
    path.write_text(path.read_text().replace(*change))
    assert counted.find(UNIT, HASHES) is None


def test_counts_moved_to_the_name_of_others_are_not_taken_for_them(tmp_path: Path) -> None:
    counted = kept(tmp_path)
    other = HASHES | {"first": "3" * 64}
    counted.path(UNIT, HASHES).rename(counted.path(UNIT, other))
    assert counted.find(UNIT, other) is None


@pytest.mark.parametrize("task", ["../../etc/passwd", "/abs", "a/b", ".", "x" * 500])
def test_whatever_a_task_is_called_its_counts_are_one_file_of_the_folder(tmp_path: Path, task: str) -> None:
    counted, unit = Counted(tmp_path / "counts", WITH), UNIT.model_copy(update={"task": task})
    counted.keep(unit, HASHES, tasks())
    assert list(tmp_path.iterdir()) == [tmp_path / "counts"]
    assert len(list((tmp_path / "counts").iterdir())) == 1
