"""The snapshot of a configuration: every job takes its run out of it, and staging finds what it is asked for."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reproval import config, run_file
from reproval.run_file import RunFile
from reproval.settings import Config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def runs(**changes: Any) -> list[RunFile]:
    asked: dict[str, Any] = {
        "models": {"one": {"hub": "org/one", "revision": COMMIT}, "one-more": {"hub": "org/two", "revision": COMMIT}},
        "suites": {"core": {"tasks": ["arc_easy"]}, "mathematics": {"tasks": ["gsm8k"]}},
    }
    checked = Config.model_validate(asked | changes)
    return [
        run_file.run_file(run, checked, "lock") for run in config.runs(checked, config.BASE, config.BASE, "environment")
    ]


def test_a_job_takes_its_own_run_out_of_the_snapshot(tmp_path: Path) -> None:
    entries = runs()
    snapshot = run_file.write_snapshot(tmp_path, entries)
    assert list(run_file.every(snapshot)) == entries
    for entry in entries:
        assert run_file.from_snapshot(snapshot, entry.run.name) == entry
    with pytest.raises(KeyError):
        run_file.from_snapshot(snapshot, "one-000000000000")


def test_staging_finds_a_model_and_a_suite_by_their_keys(tmp_path: Path) -> None:
    entries = runs()
    snapshot = run_file.write_snapshot(tmp_path, entries)
    for entry in entries:
        assert run_file.of_model(snapshot, run_file.model_key(entry.run)) == entry
    for key in run_file.suite_keys(entries[1].run):
        found = run_file.first_of_suite(snapshot, key)
        assert key.rpartition("-")[0] in {unit.suite for unit in found.run.units}
    with pytest.raises(KeyError):
        run_file.of_model(snapshot, "one-000000000000")
    with pytest.raises(KeyError):
        run_file.first_of_suite(snapshot, "core-000000000000")


def test_what_is_staged_stays_staged_whatever_else_of_a_run_changes() -> None:
    """Another suite, setting or dtype makes another run; its files are the same, and the network may be gone."""
    before = runs()
    after = runs(
        suites={"core": {"tasks": ["arc_easy"]}, "mathematics": {"tasks": ["gsm8k"], "num_fewshot": 3}},
        models={"one": {"hub": "org/one", "revision": COMMIT, "dtype": "float16"}},
    )
    assert before[0].run.name != after[0].run.name
    assert run_file.model_key(before[0].run) == run_file.model_key(after[0].run)
    core, mathematics = run_file.suite_keys(before[0].run)
    assert run_file.suite_keys(after[0].run)[0] == core
    assert run_file.suite_keys(after[0].run)[1] != mathematics


def test_names_that_are_too_many_for_a_command_are_read_from_a_file(tmp_path: Path) -> None:
    names = [f"results/runs/a-model-with-a-long-name-{number:05d}-0123456789ab/plan.json" for number in range(3000)]
    assert sum(map(len, names)) > 128 * 1024
    listed = run_file.write_list(tmp_path, names)
    assert run_file.write_list(tmp_path, names) == listed
    # The command fails by the first file that is not there, and not before bash could start it.
    script = f'{shlex.quote(sys.executable)} -m reproval.plan table "@$LIST"'
    workflow = str(config.BASE / "workflow")
    environment = os.environ | {"LIST": str(listed), "PYTHONPATH": workflow}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert names[0] in done.stderr
