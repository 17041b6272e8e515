"""What `snakemake status` says of runs in every state, from nothing but what they left on disk."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from examples import engine_settings, run_file

from reproval import status
from reproval.files import read_record, write_record
from reproval.progress import FILE, Progress, ProgressFile
from reproval.records import (
    Attempt,
    Attempts,
    Evaluation,
    Hardware,
    JobProgress,
    MemoryPrediction,
    Plan,
    Rung,
    TimeEstimate,
    UnitReference,
)
from reproval.status import Job, Seen, judge

PREDICTED = MemoryPrediction(**dict.fromkeys(MemoryPrediction.model_fields, 2**30))


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "run": "m-000000000000",
        "model": "m",
        "hardware": Hardware(gpus=2, gpu_memory_bytes=2**36, host_memory_bytes=2**36, cpus=8),
        "policy": "auto",
        "tier": "small",
        "parameters": 10**9,
        "fits": True,
        "levers": [],
        "reasons": [],
        "ladder": [Rung(settings=engine_settings(tensor_parallel_size=2), levers=[], predicted=PREDICTED)],
        "time": TimeEstimate(engine_start_s=100, work_s=1000, gpu_hours=0.6),
    }
    return Plan(**(fields | changes))


def progress(**changes: Any) -> JobProgress:
    fields: dict[str, Any] = {
        "state": "running",
        "doing": "core/arc",
        "tasks": 4,
        "tasks_done": 1,
        "share": 0.25,
        "left_s": None,
        "begin": "2026-11-23T03:00:00+00:00",
        "slurm_job": "4711",
    }
    return JobProgress(**(fields | changes))


def attempt(**changes: Any) -> Attempt:
    fields: dict[str, Any] = {
        "rung": 0,
        "settings": engine_settings(),
        "outcome": "failed",
        "failure": "running",
        "begin": "2026-11-23T03:00:00+00:00",
        "duration_s": 10,
        "gpu_peak_bytes": None,
        "host_peak_bytes": 0,
        "phases": [],
    }
    return Attempt(**(fields | changes))


def evaluation(duration_s: float, **changes: Any) -> Evaluation:
    unit = UnitReference(suite="core", task="arc", folder="f", key="0" * 64, reused=False)
    fields: dict[str, Any] = {
        "run": "m-000000000000",
        "model": "m",
        "plan": plan(),
        "units": [unit],
        "attempts": [attempt(outcome="finished", failure=None)],
        "begin": "2026-11-23T03:00:00+00:00",
        "duration_s": duration_s,
        "host_peak_bytes": 0,
        "gpu_peak_bytes": None,
    }
    return Evaluation(**(fields | changes))


@pytest.mark.parametrize(
    ("seen", "state", "said"),
    [
        (Seen("r"), "to be planned", "snakemake stage"),
        (Seen("r", staged=True), "to be planned", "its facts"),
        (Seen("r", staged=True, facts=True), "to be planned", "its plan"),
        (Seen("r", plan=plan()), "waiting", ""),
        (Seen("r", plan=plan(fits=False, ladder=[], advice="use 4 GPUs")), "cannot run", "use 4 GPUs"),
        (Seen("r", plan=plan(), jobs=[Job(progress(), 5)]), "running", "job 4711: core/arc, 1 of 4 tasks"),
        (Seen("r", plan=plan(), jobs=[Job(progress(), 3000)]), "vanished", "50 min"),
        (
            Seen("r", plan=plan(), jobs=[Job(progress(state="failed", message="out of memory"), 5, [attempt()])]),
            "failed",
            "running: out of memory",
        ),
        (
            Seen(
                "r",
                plan=plan(),
                jobs=[Job(progress(state="failed"), 5, [attempt(outcome="interrupted", failure="interrupted")])],
            ),
            "interrupted",
            "goes on",
        ),
        (Seen("r", evaluation(3600)), "done", "1 tasks in 60 min"),
    ],
)
def test_every_state_is_told_with_what_to_know_of_it(seen: Seen, state: str, said: str) -> None:
    line = judge(seen)
    assert line.state == state
    assert said in line.note


def test_the_time_left_is_that_of_the_work_that_is_left() -> None:
    assert judge(Seen("r", plan=plan())).left_s == 1100
    assert judge(Seen("r", plan=plan(), jobs=[Job(progress(), 5)])).left_s == 750
    measured = Job(progress(left_s=42.0), 5)
    assert judge(Seen("r", plan=plan(), jobs=[measured])).left_s == 42
    starting = Job(progress(doing="engine start", share=0, tasks_done=0), 5)
    assert judge(Seen("r", plan=plan(), jobs=[starting])).left_s == 1100
    # Killed: the engine has to start again, and what it had done is kept.
    assert judge(Seen("r", plan=plan(), jobs=[Job(progress(left_s=42.0), 3000)])).left_s == 850
    assert judge(Seen("r", evaluation(5))).left_s == 0
    assert judge(Seen("r")).left_s is None


def test_shards_are_counted_together() -> None:
    done = Job(progress(state="finished", share=1.0, tasks_done=4), 500)
    line = judge(Seen("r", plan=plan(), shards=4, jobs=[done, Job(progress(share=0.5), 5)]))
    assert line.state == "running"
    assert "1 of 4 shards done" in line.note
    assert line.share == pytest.approx(1.5 / 4)
    # Half a shard, and two that have not begun.
    assert line.left_s == pytest.approx(125 + 2 * (100 + 250))


def test_estimates_are_corrected_by_what_finished_runs_took() -> None:
    finished = [Seen("a", evaluation(2200)), Seen("b", evaluation(3300)), Seen("c", evaluation(2200))]
    assert status.pace(finished) == pytest.approx(2)
    # What was kept, or took two attempts, tells nothing of the pace.
    assert status.pace([Seen("a", evaluation(9, attempts=[attempt(), attempt()]))]) == 1
    assert judge(Seen("r", plan=plan()), 2.0).left_s == 2200


def test_the_table_names_what_needs_somebody_first_and_adds_up_the_time() -> None:
    seen = [
        Seen("done-1", evaluation(1100)),
        Seen("waits-1", plan=plan()),
        Seen("runs-1", plan=plan(), jobs=[Job(progress(left_s=550.0), 1)]),
        Seen("runs-2", plan=plan(), jobs=[Job(progress(left_s=550.0), 1)]),
        Seen("failed-1", plan=plan(), jobs=[Job(progress(state="failed", share=0), 1, [attempt()])]),
    ]
    text = status.render([judge(run) for run in seen], 1.0)
    order = [text.index(name) for name in ("runs-1", "failed-1", "waits-1", "done-1")]
    assert order == sorted(order)
    assert "5 runs: 2 running, 1 failed, 1 waiting, 1 done." in text
    assert "Left: 55 min 00 s of jobs; about 27 min 30 s with 2 at a time, as now." in text
    assert "1.8 GPU hours" in text


def test_of_a_thousand_runs_the_table_shows_those_that_need_somebody() -> None:
    lines = [judge(Seen(f"waits-{number}", plan=plan())) for number in range(1000)]
    lines.append(judge(Seen("failed-1", plan=plan(), jobs=[Job(progress(state="failed"), 1, [attempt()])])))
    text = status.render(lines, 1.0)
    assert "failed-1" in text
    assert "waits-7" not in text
    assert "1,000 waiting" in text
    assert len(text.splitlines()) < 20


# --- what is read from disk ------------------------------------------------------------------------------------------


def test_what_jobs_leave_on_disk_is_found(tmp_path: Path) -> None:
    entry = run_file(store=str(tmp_path / "store"))
    entry = entry.model_copy(
        update={"run": entry.run.model_copy(update={"identity": {"model": {"hub": "o/m"}, "units": []}})}
    )
    name, results = entry.run.name, tmp_path / "results"
    assert judge(status.look(entry, results, time.time())).state == "to be planned"
    write_record(results / "runs" / name / "plan.json", plan())
    assert judge(status.look(entry, results, time.time())).state == "waiting"
    work = results / "work" / name
    write_record(work / FILE, progress())
    write_record(work / "attempts.json", Attempts(attempts=[attempt()]))
    seen = status.look(entry, results, time.time())
    assert judge(seen).state == "running"
    assert judge(seen).attempts == 1
    old = time.time() - 3600
    os.utime(work / FILE, (old, old))
    assert judge(status.look(entry, results, time.time())).state == "vanished"
    # Divided over three jobs since then.
    write_record(work / "2-of-3" / FILE, progress(share=0.5))
    seen = status.look(entry, results, time.time())
    assert (seen.shards, len(seen.jobs)) == (3, 1)
    write_record(results / "runs" / name / "evaluation.json", evaluation(10))
    assert judge(status.look(entry, results, time.time())).state == "done"


def test_a_job_tells_how_far_it_is_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / FILE
    noted = ProgressFile(path, tasks=2, every_s=0.02)
    followed = Progress("m", 2)

    def reads(**expected: Any) -> bool:
        found = read_record(path, JobProgress).model_dump()
        return all(found[key] == value for key, value in expected.items())

    with noted.kept():
        assert reads(state="running", doing="engine start", tasks=2)
        noted.follow(followed)
        followed.event({"event": "unit_started", "unit": "core/arc"})
        followed.event({"event": "progress", "done": 30, "total": 100})
        followed.event({"event": "unit_done", "unit": "core/arc"})
        end = time.monotonic() + 10
        while not reads(doing="core/arc", share=0.3, tasks_done=1) and time.monotonic() < end:
            time.sleep(0.01)
        assert reads(state="running", doing="core/arc", share=0.3, tasks_done=1)
    assert reads(state="finished")
    assert json.loads(path.read_text())["kind"] == "job-progress"
    with pytest.raises(ValueError, match="full"), ProgressFile(path, tasks=2).kept():
        raise ValueError("the disk is full")
    assert reads(state="failed", message="the disk is full")
    assert list(tmp_path.iterdir()) == [path]


def test_a_job_whose_progress_cannot_be_written_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with ProgressFile(tmp_path / "file" / FILE, tasks=1).kept():
        pass
    assert "snakemake status" in capfd.readouterr().err
