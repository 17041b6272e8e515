"""Counts of tokens, kept for every model with the same tokenizer and every configuration with the same requests.

A unit's counts are one file under a key of what they were counted with and of its tasks' hashes. The hash of a task is
taken of its requests as text, so shots, limit, seed, chat template, task files, data sets and lm-eval's version are in
it as far as they change a request, and it is known before anything is tokenized, which takes most of the time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproval.files import RecordError, read_record, sha256_json, write_record
from reproval.records import CountedTasks, TaskFacts
from reproval.settings import Unit


@dataclass(frozen=True)
class Counted:
    """Files of counts in `folder`, of all that were counted with the same tokenizer (task_facts.counted_with).

    Jobs may use a folder at once: a file appears whole, and is the same whoever writes it.
    """

    folder: Path
    counted_with: Mapping[str, Any]

    def key(self, hashes: Mapping[str, str]) -> str:
        """SHA-256 of everything that decides the counts of tasks with these hashes, by task."""
        return sha256_json({"counted_with": self.counted_with, "tasks": hashes})

    def path(self, unit: Unit, hashes: Mapping[str, str]) -> Path:
        """FOLDER/TASK-KEY16.json; whatever a task is called, it names one file there."""
        task = re.sub(r"[^A-Za-z0-9_-]+", "_", unit.task)[:80]
        return self.folder / f"{task}-{self.key(hashes)[:16]}.json"

    def find(self, unit: Unit, hashes: Mapping[str, str]) -> list[TaskFacts] | None:
        """The kept counts, in the order of `hashes`; None if there are none or the file is not what was written."""
        try:
            kept = read_record(self.path(unit, hashes), CountedTasks)
        except RecordError:
            return None
        by_name = {task.task: task for task in kept.tasks}
        if kept != _record(self.key(hashes), kept.tasks) or {n: t.task_hash for n, t in by_name.items()} != hashes:
            return None
        # They may have been counted for another suite.
        return [by_name[name].model_copy(update={"suite": unit.suite, "unit": unit.task}) for name in hashes]

    def keep(self, unit: Unit, hashes: Mapping[str, str], tasks: list[TaskFacts]) -> None:
        """Write the counts. Raises OSError."""
        write_record(self.path(unit, hashes), _record(self.key(hashes), tasks))


def _record(key: str, tasks: list[TaskFacts]) -> CountedTasks:
    content = [task.model_dump(mode="json") for task in tasks]
    return CountedTasks(key=key, tasks=tasks, sha256=sha256_json([key, content]))
