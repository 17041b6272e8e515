"""What ran, runs, failed and waits, and how long is left: what `snakemake status` prints.

It reads files alone, so it tells the same on a head node, while another Snakemake works in the folder, and after
everything was killed. Judging (`judge`, `render`) is pure; `look` gathers what they judge.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from reproval import store
from reproval.files import RecordError, file_time, read_record
from reproval.progress import ENGINE_START, FILE, WRITE_S
from reproval.records import Attempt, Attempts, Evaluation, JobProgress, Plan, Record
from reproval.run_file import RunFile, every
from reproval.text_table import text_table
from reproval.words import count, duration

SILENCE_S = 9 * WRITE_S
"""A job that has not written its progress for so long has ended without a word, or its node has."""

R = TypeVar("R", bound=Record)
State = Literal["done", "running", "failed", "interrupted", "vanished", "waiting", "cannot run", "to be planned"]
ORDER: tuple[State, ...] = (
    "running",
    "failed",
    "vanished",
    "interrupted",
    "cannot run",
    "waiting",
    "to be planned",
    "done",
)


@dataclass(frozen=True)
class Job:
    """What one job of `evaluate` left in its folder of results/work."""

    progress: JobProgress | None
    silent_s: float
    attempts: Sequence[Attempt] = ()


@dataclass(frozen=True)
class Seen:
    """What the results folder and the store tell of one run. `shards` is 1 where the work is not divided."""

    run: str
    evaluation: Evaluation | None = None
    plan: Plan | None = None
    facts: bool = False
    staged: bool = False
    weights: bool = True
    shards: int = 1
    jobs: Sequence[Job] = field(default_factory=tuple)


@dataclass(frozen=True)
class Line:
    """One run as it stands. `left_s` is job time: of its jobs one after another; None if nothing tells."""

    run: str
    state: State
    share: float | None
    left_s: float | None
    gpus: int
    running: int
    attempts: int
    note: str


def judge(seen: Seen, pace: float = 1.0) -> Line:
    """The state of one run. `pace` is how much longer than estimated the finished runs took."""
    attempts = sum(len(job.attempts) for job in seen.jobs)
    if seen.evaluation is not None:
        done = seen.evaluation
        again = f", {len(done.attempts)} attempts" if len(done.attempts) > 1 else ""
        note = f"{len(done.units)} tasks in {duration(done.duration_s)}{again}"
        return Line(seen.run, "done", 1.0, 0.0, _gpus(done.plan), 0, len(done.attempts), note)
    plan = seen.plan
    if plan is None:
        missing = "its plan" if seen.facts else "its facts" if seen.staged else "files in the store: snakemake stage"
        return Line(seen.run, "to be planned", None, None, 0, 0, attempts, f"needs {missing}")
    if not plan.fits:
        return Line(seen.run, "cannot run", None, 0.0, 0, 0, attempts, plan.advice or "see its plan")
    live = [job for job in seen.jobs if job.progress and job.progress.state == "running" and job.silent_s <= SILENCE_S]
    share, left = _left(seen, plan, live, pace)
    base = (seen.run, share, left, _gpus(plan), len(live), attempts)
    if live:
        return _line("running", base, "; ".join(_doing(job) for job in live) + _shards(seen))
    if (ended := _ended(seen.jobs)) is not None:
        return _line(ended[0], base, ended[1] + _shards(seen))
    if not seen.weights:
        return _line("waiting", base, "needs its weights in the store: snakemake stage" + _shards(seen))
    begun = f"{100 * share:.0f} % kept from before" if share else ""
    return _line("waiting", base, begun + _shards(seen))


def _line(state: State, base: tuple[str, float, float | None, int, int, int], note: str) -> Line:
    run, share, left, gpus, running, attempts = base
    return Line(run, state, share, left, gpus, running, attempts, note.removeprefix("; "))


def _gpus(plan: Plan) -> int:
    return plan.ladder[0].settings.tensor_parallel_size if plan.hardware.gpus and plan.ladder else 0


def _shards(seen: Seen) -> str:
    if seen.shards == 1:
        return ""
    done = sum(job.progress is not None and job.progress.state == "finished" for job in seen.jobs)
    return f"; {done} of {seen.shards} shards done"


def _doing(job: Job) -> str:
    assert job.progress is not None
    told = job.progress
    where = f"job {told.slurm_job}: " if told.slurm_job else ""
    attempt = f", attempt {len(job.attempts)}" if len(job.attempts) > 1 else ""
    return f"{where}{told.doing}, {told.tasks_done} of {told.tasks} tasks{attempt}"


def _ended(jobs: Sequence[Job]) -> tuple[State, str] | None:
    """How the last job ended that ended badly; None if none did."""
    bad = [job for job in jobs if job.progress is not None and job.progress.state != "finished"]
    if not bad:
        return None
    job = min(bad, key=lambda job: job.silent_s)
    assert job.progress is not None
    if job.progress.state == "running":
        return "vanished", f"no sign of life for {duration(job.silent_s)}; if its job is not queued, start again"
    last = job.attempts[-1] if job.attempts else None
    if last is not None and last.failure == "interrupted":
        return "interrupted", "goes on where it stopped when its job runs again"
    failure = f"{last.failure}: " if last is not None and last.failure else ""
    return "failed", f"{failure}{(job.progress.message or 'see its log')}"[:300]


def _left(seen: Seen, plan: Plan, live: Sequence[Job], pace: float) -> tuple[float, float | None]:
    """Share of the work that is done, and seconds of jobs that are left."""
    told = [job.progress for job in seen.jobs if job.progress is not None]
    # One whose tasks were all kept from before computes nothing.
    shares = (1.0 if progress.state == "finished" else progress.share for progress in told)
    share = min(sum(shares) / seen.shards, 1.0)
    if plan.time is None:
        return share, None
    start, work = plan.time.engine_start_s * pace, plan.time.work_s * pace / seen.shards
    running = [job.progress for job in live]
    left = (start + work) * max(seen.shards - len(told), 0)
    for progress in told:
        if progress.state == "finished":
            continue
        rest = (1.0 - progress.share) * work
        if progress not in running or progress.doing == ENGINE_START:
            rest += start
        left += progress.left_s if progress in running and progress.left_s is not None else rest
    return share, left


def pace(seen: Sequence[Seen]) -> float:
    """How much longer than estimated finished runs took: the median, of those that computed everything in one go."""
    ratios = [
        run.evaluation.duration_s / (time_of.engine_start_s + time_of.work_s)
        for run in seen
        if run.evaluation is not None
        and (time_of := run.evaluation.plan.time) is not None
        and len(run.evaluation.attempts) == 1
        and not any(unit.reused for unit in run.evaluation.units)
        and time_of.engine_start_s + time_of.work_s > 0
    ]
    return statistics.median(ratios) if ratios else 1.0


def render(lines: Sequence[Line], factor: float, *, most: int = 40) -> str:
    """The table for people, what runs and what failed first; of more than `most` runs, those alike are counted."""
    ordered = sorted(lines, key=lambda line: ORDER.index(line.state))
    shown = ordered
    if len(ordered) > most:
        loud = [line for line in ordered if line.state not in ("waiting", "to be planned", "done")]
        shown = loud[:most] or ordered[:most]
    rows = [
        (
            line.run,
            line.state,
            "-" if line.share is None else f"{100 * line.share:.0f} %",
            "-" if not line.left_s else duration(line.left_s),
            line.note,
        )
        for line in shown
    ]
    text = [text_table(("run", "state", "done", "left", ""), rows)] if rows else []
    if len(shown) < len(ordered):
        text += ["", f"{len(ordered) - len(shown):,} more, in the counts below"]
    return "\n".join([*text, "", summary(lines, factor)])


def summary(lines: Sequence[Line], factor: float) -> str:
    """Counts by state, and the time that is left: job time, GPU time, and at as many jobs at once as run now."""
    by_state = {state: sum(line.state == state for line in lines) for state in ORDER}
    said = ", ".join(f"{number:,} {state}" for state, number in by_state.items() if number)
    unknown = sum(line.left_s is None for line in lines)
    left = sum(line.left_s or 0.0 for line in lines)
    running = sum(line.running for line in lines)
    text = [f"{count(len(lines), 'run')}: {said}."]
    if left:
        # Of a running job no more can be saved by others beside it.
        longest = max((line.left_s or 0.0) / max(line.running, 1) for line in lines)
        at_once = max(running, 1)
        wall = max(left / at_once, longest)
        beside = f"{at_once} at a time, as now" if running else "one at a time"
        text.append(f"Left: {duration(left)} of jobs; about {duration(wall)} with {beside}.")
        if gpu_s := sum((line.left_s or 0.0) * line.gpus for line in lines):
            text.append(f"Left on GPUs: {gpu_s / 3600:,.1f} GPU hours.")
        if factor != 1.0:
            text.append(f"Estimates of plans are taken times {factor:.2f}, as finished runs took.")
    if unknown:
        text.append(f"Not in these times: {unknown:,} without a plan.")
    return "\n".join(text)


# --- gathering -------------------------------------------------------------------------------------------------------


def look(run: RunFile, results: Path, now: float) -> Seen:
    """Everything that `judge` needs to know of one run. A record of another version counts as not there."""
    name = run.run.name
    folder, work = results / "runs" / name, results / "work" / name
    evaluation = _optional(folder / "evaluation.json", Evaluation)
    if evaluation is not None:
        return Seen(name, evaluation)
    jobs = _shard_folders(work) or [work]
    return Seen(
        name,
        plan=_optional(folder / "plan.json", Plan),
        facts=(folder / "facts.json").is_file(),
        staged=all(path.is_file() for path in store.manifests([run])),
        weights=all(path.is_file() for path in store.weights_notes([run])),
        shards=int(jobs[0].name.rpartition("-")[2]) if jobs != [work] else 1,
        jobs=[_job(path, now) for path in jobs],
    )


def _shard_folders(work: Path) -> list[Path]:
    """Folders N-of-M of the division that was worked on last; a run may have been divided otherwise before."""
    folders = [path for path in work.glob("*-of-*") if (path / FILE).is_file()]
    if not folders:
        return []
    newest = max(folders, key=lambda path: (path / FILE).stat().st_mtime)
    return sorted(path for path in folders if path.name.partition("-")[2] == newest.name.partition("-")[2])


def _job(work: Path, now: float) -> Job:
    attempts = _optional(work / "attempts.json", Attempts)
    progress = _optional(work / FILE, JobProgress)
    silent = now - (work / FILE).stat().st_mtime if progress is not None else 0.0
    return Job(progress, max(silent, 0.0), attempts.attempts if attempts else ())


def _optional(path: Path, kind: type[R]) -> R | None:
    try:
        return read_record(path, kind) if path.is_file() else None
    except (RecordError, OSError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshot", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    work = options.results / "work"
    now = file_time(work) or time.time()
    seen = [look(entry, options.results, now) for entry in every(options.snapshot)]
    factor = pace(seen)
    print(render([judge(run, factor) for run in seen], factor))


if __name__ == "__main__":
    main()
