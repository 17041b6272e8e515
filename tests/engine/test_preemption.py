"""Jobs that are killed at random points and started again leave what an uninterrupted one leaves.

Two kills; REPROVAL_KILLS=20 makes twenty, some of them while the engine starts, and REPROVAL_KILL_SEED other points.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from demo_project import MODEL, Job, Project

from reproval.files import read_record
from reproval.guardian import descendants
from reproval.records import Evaluation

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="needs the demo's model: make model"),
    pytest.mark.timeout(3600),
]

KILLS = int(os.environ.get("REPROVAL_KILLS", "2"))
SEED = int(os.environ.get("REPROVAL_KILL_SEED", "1"))
KILL_WAIT_S = 30.0
"""Slurm's, from SIGTERM to SIGKILL."""


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """As a batch system ends a job: SIGKILL to all of its processes, or SIGTERM to all and SIGKILL after a while."""
    everyone = [process.pid, *descendants(process.pid)]
    if number % 2:
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_WAIT_S)
    for pid in everyone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in everyone):
        assert time.monotonic() < deadline, "a process outlived its job"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state != b"Z"


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [each for part in value for each in flat(part)] if isinstance(value, list) else [value]


def test_a_job_that_is_killed_and_started_again_leaves_what_an_uninterrupted_one_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(limit=max(8, 2 * KILLS))
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = Job(tmp_path / "whole", project), Job(tmp_path / "killed", project)
    assert whole.start().wait(900) == 0, (whole.folder / "job.log").read_text()[-3000:]
    total = len(whole.answers())

    generator = random.Random(SEED)
    points = sorted(generator.sample(range(total), KILLS))
    for number, drawn in enumerate(points):
        # Not before this job has finished a request of its own.
        point = max(drawn, len(killed.answers()) + 1)
        process = killed.start()
        if KILLS > 4 and generator.random() < 0.15:  # While the engine starts.
            time.sleep(generator.uniform(0, 10))
        else:
            while len(killed.answers()) < point and process.poll() is None:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.3))
        before = len(set(killed.answers()))
        end(process, number)
        assert len(set(killed.answers())) >= before, "a finished request was lost"
        print(f"kill {number + 1}: after {before} of {total} requests, SIG{'TERM' if number % 2 else 'KILL'}")
    assert killed.start().wait(900) == 0, (killed.folder / "job.log").read_text()[-3000:]

    twice = {digest: times for digest, times in Counter(killed.answers()).items() if times > 1}
    assert twice == {}, "a finished request was computed again"
    assert len(set(killed.answers())) == total

    evaluation = read_record(killed.folder / "evaluation.json", Evaluation)
    outcomes = [attempt.outcome for attempt in evaluation.attempts]
    print("attempts:", Counter(outcomes))
    assert outcomes[-1] == "finished"
    assert set(outcomes[:-1]) <= {"interrupted", "finished"}

    monkeypatch.chdir(whole.folder)
    expected = project.results(Path("results"))
    monkeypatch.chdir(killed.folder)
    found = project.results(Path("results"))
    first, second = whole.samples(project), killed.samples(project)
    differences = [
        (a, b) for task in first for a, b in zip(flat(first[task]), flat(second[task]), strict=True) if a != b
    ]
    print(f"values of samples that differ: {len(differences)} of {sum(len(flat(rows)) for rows in first.values())}")
    for task, result in expected.items():
        for score, other in zip(result.scores, found[task].scores, strict=True):
            assert other.value == pytest.approx(score.value, rel=1e-5), score
            assert (other.stderr or 0) == pytest.approx(score.stderr or 0, rel=1e-5), score
    assert all(isinstance(a, float) and a == pytest.approx(b, rel=1e-4, abs=1e-5) for a, b in differences)
