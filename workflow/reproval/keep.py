"""Finished results, kept under a key of everything that decides their scores.

An interrupted job, or a configuration that grew by a task, finds here what is already done; a result made with another
model, setting, prompt or environment has another key and is never taken for it.
"""

from __future__ import annotations

import glob
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reproval.files import RecordError, part_of, read_record, sha256_file, sha256_json
from reproval.records import EngineSettings, Facts, UnitResult
from reproval.run_file import RunFile
from reproval.settings import Unit

RESULT = "result.json"
SAMPLES = "samples.jsonl.gz"
LEFT_S = 24 * 3600.0


SCORING = 1
"""To be raised when a changed version of this workflow would give the same request another answer (CHANGELOG, Scores):
what an older one has kept is then not used."""


def engine_identity(run: RunFile, facts: Facts, settings: EngineSettings) -> dict[str, Any]:
    """What decides the answer to any one request. Neutral levers, which change rounding at most, are not in it."""
    return {
        "model": facts.model_digest,
        "scoring": SCORING,
        "environment": run.environment,
        "device": "cuda" if run.hardware.gpus else "cpu",
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "max_model_len": settings.max_model_len,
        "trust_remote_code": run.run.model.trust_remote_code,
        "seed": settings.seed,
        "batch_invariant": run.batch_invariant,
        **run.run.model.thinking,
    }


def made_of(unit: Unit, run: RunFile, facts: Facts, settings: EngineSettings) -> dict[str, Any]:
    """What decides a unit's scores: the engine's identity, the unit's settings, its tasks with every document and
    prompt, and the files beside the tasks, since the code of a metric may use any of them.
    """
    tasks = {
        entry.task: entry.task_hash for entry in facts.tasks if (entry.suite, entry.unit) == (unit.suite, unit.task)
    }
    return {
        "engine": engine_identity(run, facts, settings),
        "suite": unit.suite,
        "task": unit.task,
        "settings": unit.settings.model_dump(exclude_none=True),
        "include": unit.include_sha256,
        "seed": run.seed,
        "tasks": tasks,
    }


def unit_folder(results: Path, model: str, unit: Unit, key: str) -> Path:
    """RESULTS/tasks/MODEL/SUITE.TASK-KEY12; whatever a task is called, it names one folder there."""
    task = re.sub(r"[^A-Za-z0-9_-]+", "_", unit.task)[:80]
    return results / "tasks" / model / f"{unit.suite}.{task}-{key[:12]}"


def find(folder: Path, key: str) -> UnitResult | None:
    """The kept result if it is whole, of this key, and its samples are those that it was made with; else None."""
    try:
        result = read_record(folder / RESULT, UnitResult)
        samples = sha256_file(folder / SAMPLES)
    except (RecordError, OSError):
        return None
    whole = result.key == key and sha256_json(result.made_of) == key and result.samples_sha256 == samples
    return result if whole else None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its name on success and vanishes on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        # Of a job that was killed. Not of one that is writing now: that takes seconds.
        if time.time() - left.stat().st_mtime > LEFT_S:
            shutil.rmtree(left, ignore_errors=True)
    part = part_of(folder)
    part.mkdir()
    try:
        yield part
        if folder.exists():  # damaged, or `find` would have returned it
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        if part.exists():
            shutil.rmtree(part)
