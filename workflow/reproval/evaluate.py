"""The stage `evaluate`: all tasks of one model in one job, until they are done or no rung of the ladder is left.

This process never touches CUDA. It starts the engine as a child (engine.py) under supervise.py, on the rungs of the
plan, and keeps what is finished: after an interruption, or on a later rung, only what is missing is computed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from reproval import keep, memory, resources, store, supervise, supervise_ladder
from reproval.engine import ANSWERED, ChildTask, ChildUnit, ShardTask, environment
from reproval.files import RecordError, mend_of, read_record, sha256_file, sha256_json, write_record
from reproval.gpu_claims import claimed
from reproval.local_copy import LocalCopyError, copied
from reproval.progress import FILE, Progress, ProgressFile
from reproval.records import (
    Attempt,
    Attempts,
    EngineSettings,
    Evaluation,
    Facts,
    ModelManifest,
    Plan,
    PulledLever,
    Runner,
    ShardAnswers,
    ShardResult,
    TaskFacts,
    UnitReference,
)
from reproval.run_file import RunFile
from reproval.scrub import SECRET_NAME
from reproval.settings import Unit
from reproval.shards import write_answers


class EvaluateError(Exception):
    """The evaluation cannot be started, or ended without all its results."""


def child_environment(parent: Mapping[str, str], run: RunFile, runner: Runner) -> dict[str, str]:
    """The child's variables: the caller's without anything that looks like a secret, and what the engine is to read."""
    # What plan and configuration decide: a result's key and the report say what they say, whatever the caller has.
    decided = {"VLLM_USE_V2_MODEL_RUNNER", "VLLM_BATCH_INVARIANT"}
    left_out = {name for name in parent if SECRET_NAME.search(name)} | decided
    chosen = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if runner == "v1" and run.hardware.gpus else {}
    return {name: value for name, value in parent.items() if name not in left_out} | environment(run) | chosen


def deadlines(silence_limit_h: str) -> supervise.Deadlines:
    """How long the engine may take to end, and how long it may be silent, which the configuration may limit."""
    return supervise.Deadlines(idle_s=3600 * float(silence_limit_h))


def gpus_here(gpus: int, visible: int, env: Mapping[str, str]) -> int:
    """Of a job's GPUs those on this node, which alone can be claimed and measured: on a Ray cluster not all.

    `visible` is 0 where NVML does not tell. Raises EvaluateError if there are fewer than the job's.
    """
    if env.get("RAY_ADDRESS"):
        return min(gpus, visible)
    if 0 < visible < gpus:
        raise EvaluateError(
            f"the job needs {gpus} GPUs, and sees {visible} (CUDA_VISIBLE_DEVICES is "
            f"{env.get('CUDA_VISIBLE_DEVICES', 'not set')}); let it see {gpus}, or set hardware.gpus to {visible} and "
            "plan again"
        )
    return gpus


def score_levers(plan: Plan, rung: int) -> list[PulledLever]:
    """Score-changing levers in force on a rung: those of the plan, and of every rung up to this one."""
    pulled = plan.levers + [lever for step in plan.ladder[1 : rung + 1] for lever in step.levers]
    return [lever for lever in pulled if lever.changes_scores]


def cost_tokens(tasks: list[TaskFacts], unit: Unit) -> int:
    """Tokens that a unit makes the engine compute at most; the unit of progress."""
    return sum(
        task.context_tokens + task.continuation_tokens + task.generation_tokens
        for task in tasks
        if (task.suite, task.unit) == (unit.suite, unit.task)
    )


def child_units(run: RunFile, facts: Facts, settings: EngineSettings, results: Path) -> list[ChildUnit]:
    """Every unit with its key and folder under these settings."""
    units = []
    for unit in run.run.units:
        made_of = keep.made_of(unit, run, facts, settings)
        key = sha256_json(made_of)
        folder = keep.unit_folder(results, run.run.model_name, unit, key)
        tokens = cost_tokens(facts.tasks, unit)
        units.append(ChildUnit(unit=unit, key=key, made_of=made_of, folder=str(folder), tokens=tokens))
    return units


def unfinished(units: list[ChildUnit]) -> list[ChildUnit]:
    return [entry for entry in units if keep.find(Path(entry.folder), entry.key) is None]


@dataclass(frozen=True)
class Job:
    """What one job is told, as records, and where it works."""

    run: RunFile
    facts: Facts
    plan: Plan
    manifest: ModelManifest
    results: Path
    log: Path
    gpus: int = 0
    shard: ShardTask | None = None
    deadlines: supervise.Deadlines = field(default_factory=supervise.Deadlines)
    local_copy: str | None = None

    @property
    def work(self) -> Path:
        """What outlives a killed job lies here."""
        folder = self.results / "work" / self.run.run.name
        return folder / f"{self.shard.shard}-of-{self.shard.shards}" if self.shard else folder

    @property
    def name(self) -> str:
        name = self.run.run.name
        return f"{name} {self.shard.shard}/{self.shard.shards}" if self.shard else name

    def units(self, settings: EngineSettings) -> list[ChildUnit]:
        """Every unit with its key and folder under these settings."""
        return child_units(self.run, self.facts, settings, self.results)


@dataclass(frozen=True)
class Ended:
    """How the engine's part of a job ended: on which rung, after which attempts of this and of earlier jobs."""

    rung: int
    history: list[Attempt]
    attempts: list[Attempt]
    traces: list[memory.Trace]


def climb(job: Job) -> Ended:
    """Run the engine, on the rungs of the plan, until it has done what is not kept already. Raises EvaluateError."""
    told = ProgressFile(job.work / FILE, len(job.run.run.units))
    with told.kept():
        try:
            return _climb(job, told)
        except LocalCopyError as error:
            raise EvaluateError(str(error)) from error


def _climb(job: Job, told: ProgressFile) -> Ended:
    plan, run, gpus = job.plan, job.run, job.gpus
    if not plan.fits:
        raise EvaluateError(f"{plan.model} cannot run: {plan.advice}")
    if wrong := store.troubles(Path(job.manifest.folder), job.manifest.files):
        raise EvaluateError(store.message(wrong))
    history = resources.read_history(job.work)
    first = resources.first_rung(plan, history)
    end = resources.end_rung(plan, first, gpus) if run.hardware.gpus else len(plan.ladder)
    if first >= end:
        needed = plan.ladder[first].settings.tensor_parallel_size
        raise EvaluateError(f"{plan.model}: needs {needed} GPUs, and the job has {gpus}")
    if not unfinished(job.units(plan.ladder[first].settings)):
        return Ended(first, history, [], [])
    traces: list[memory.Trace] = []
    seen: list[Attempt] = []
    variables = dict(os.environ)
    # Without NVML nothing tells one GPU from another, and CUDA's own choice stays.
    uuids = memory.gpu_uuids(os.environ) if gpus else {}
    here = gpus_here(gpus, len(uuids), os.environ)
    folder = job.manifest.folder

    def note(*attempts: Attempt) -> None:
        write_record(job.work / "attempts.json", Attempts(attempts=[*history, *attempts]))

    def start_child(settings: EngineSettings, rung: int) -> supervise.ChildOutcome:
        units = job.units(settings)
        pending = unfinished(units)
        task = ChildTask(
            run=run,
            settings=settings,
            model_folder=folder,
            request_cache=str(job.results / "requests"),
            score_levers=score_levers(plan, rung),
            units=pending,
            kept_tokens=sum(entry.tokens for entry in units if entry not in pending),
            shard=job.shard,
        )
        write_record(job.work / "child.json", task)
        # A job that is killed leaves this behind.
        note(*seen, numbered(supervise_ladder.cut_off(rung, settings), job))
        progress = Progress(job.name, len(units), kept=len(units) - len(pending))
        told.follow(progress)
        outcome = supervise.run_child(
            [sys.executable, "-m", "reproval.engine", str(job.work / "child.json")],
            child_environment(variables, run, plan.runner),
            job.log,
            progress.event,
            gpus=here,
            deadlines=job.deadlines,
        )
        traces.append(outcome.trace)
        seen.append(numbered(supervise_ladder.attempt(rung, settings, outcome), job))
        note(*seen)
        return outcome

    with ExitStack() as stack:
        folder = stack.enter_context(copied(job.manifest, job.local_copy))
        if uuids:
            claim = claimed(job.results / "work/gpus", uuids, here, plan.jobs_per_gpu)
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(stack.enter_context(claim))
        attempts, finished = supervise_ladder.climb(
            plan.ladder[:end],
            start_child,
            first=first,
            on_cpu=run.hardware.gpus == 0,
            holders=lambda: memory.gpu_holders(here, variables),
        )
    attempts = [numbered(attempt, job) for attempt in attempts]
    note(*attempts)
    last = attempts[-1]
    if not finished:
        more = resources.gpus(plan, [*history, *attempts])
        again = f"; the next attempt (--retries) asks for {more} GPUs" if more > gpus else ""
        raise EvaluateError(f"{plan.model}: {last.failure}: {last.message}; its log is {job.log}{again}")
    return Ended(last.rung, history, attempts, traces)


def numbered(attempt: Attempt, job: Job) -> Attempt:
    return attempt.model_copy(update={"shard": job.shard.shard}) if job.shard else attempt


def references(units: list[ChildUnit], results: Path, kept_before: set[str]) -> list[UnitReference]:
    return [
        UnitReference(
            suite=entry.unit.suite,
            task=entry.unit.task,
            folder=Path(entry.folder).relative_to(results).as_posix(),
            key=entry.key,
            reused=entry.key in kept_before,
        )
        for entry in units
    ]


def evaluate(job: Job) -> tuple[Evaluation, list[memory.Trace]]:
    """Evaluate every unit that is not kept already. Raises EvaluateError, with what is done kept."""
    begin, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    # Rungs that differ by neutral levers share their keys; looking for a result reads all its samples.
    folders = {entry.key: Path(entry.folder) for step in job.plan.ladder for entry in job.units(step.settings)}
    before = {key for key, folder in folders.items() if keep.find(folder, key)}
    ended = climb(job)
    units = job.units(job.plan.ladder[ended.rung].settings)
    if absent := unfinished(units):
        names = ", ".join(entry.unit.name for entry in absent)
        raise EvaluateError(
            f"{job.plan.model}: the engine ended as done, but nothing is kept of {names}; see {job.log}"
        )
    evaluation = Evaluation(
        run=job.run.run.name,
        model=job.run.run.model_name,
        repeat=job.run.run.repeat,
        repeat_of=job.run.run.repeat_of,
        plan=job.plan,
        units=references(units, job.results, before),
        attempts=[*ended.history, *ended.attempts],
        begin=begin,
        duration_s=time.monotonic() - clock,
        host_peak_bytes=max((attempt.host_peak_bytes for attempt in ended.attempts), default=0),
        gpu_peak_bytes=max((a.gpu_peak_bytes for a in ended.attempts if a.gpu_peak_bytes is not None), default=None),
    )
    return evaluation, [memory.Trace() for _ in ended.history] + ended.traces


def evaluate_shard(job: Job, shard: ShardTask) -> tuple[ShardResult, list[memory.Trace]]:
    """Answer one shard's requests of every unit that is not kept already. Raises EvaluateError."""
    begin, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    ended = climb(job)
    answers = Path(shard.answers)
    answered = read_record(job.work / ANSWERED, ShardAnswers) if ended.attempts else None
    if answered is None:
        write_answers(answers, {})
    result = ShardResult(
        run=job.run.run.name,
        shard=shard.shard,
        shards=shard.shards,
        rung=ended.rung,
        settings=job.plan.ladder[ended.rung].settings,
        score_levers=score_levers(job.plan, ended.rung),
        answered=answered,
        answers_sha256=sha256_file(answers),
        attempts=[*ended.history, *ended.attempts],
        begin=begin,
        duration_s=time.monotonic() - clock,
    )
    return result, [memory.Trace() for _ in ended.history] + ended.traces


def _end(message: str, log: Path) -> NoReturn:
    """Leave with a message that stands in the log too, which Snakemake shows of a job that failed on another node."""
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream:
            print(message, file=stream)
    sys.exit(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "facts", "plan", "manifest", "results", "log", "out", "trace"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="That the job has been given.")
    parser.add_argument("--shard", type=int, help="1, 2, ...: answer this shard's requests, for merge.py.")
    parser.add_argument("--shards", type=int, help="How many there are.")
    parser.add_argument("--answers", type=Path, help="Where a shard's answers go.")
    parser.add_argument("--silence-limit-h", type=deadlines, dest="deadlines", default=supervise.Deadlines())
    parser.add_argument("--local-copy", help="As in the configuration.")
    options = parser.parse_args()
    try:
        job = Job(
            read_record(options.run, RunFile),
            read_record(options.facts, Facts),
            read_record(options.plan, Plan),
            read_record(options.manifest, ModelManifest),
            options.results,
            options.log,
            options.gpus,
            deadlines=options.deadlines,
            local_copy=options.local_copy,
        )
        record: Evaluation | ShardResult
        if options.shard is None:
            record, traces = evaluate(job)
        else:
            shard = ShardTask(shard=options.shard, shards=options.shards, answers=str(options.answers))
            record, traces = evaluate_shard(replace(job, shard=shard), shard)
        memory.write_trace(options.trace, *traces)
        write_record(options.out, record)
    except (EvaluateError, RecordError) as error:
        _end(f"reproval evaluate: {error}", options.log)
    except OSError as error:
        traceback.print_exc()
        _end(f"reproval evaluate: {mend_of(error, options.results)}: what is finished is kept", options.log)


if __name__ == "__main__":
    main()
