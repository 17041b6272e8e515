"""The stage `evaluate`: all tasks of one model in one job, until they are done or no rung of the ladder is left.

This process never touches CUDA. It starts the engine as a child (engine.py) under supervise.py, on the rungs of the
plan, and keeps what is finished: after an interruption, or on a later rung, only what is missing is computed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from reproval import keep, memory, resources, supervise
from reproval.engine import ChildTask, ChildUnit, environment
from reproval.files import RecordError, read_record, sha256_json, write_record
from reproval.progress import Progress
from reproval.records import (
    Attempt,
    Attempts,
    EngineSettings,
    Evaluation,
    Facts,
    ModelManifest,
    Plan,
    PulledLever,
    TaskFacts,
    UnitReference,
)
from reproval.run_file import RunFile
from reproval.settings import Unit

SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)


class EvaluateError(Exception):
    """The evaluation cannot be started, or ended without all its results."""


def child_environment(parent: Mapping[str, str], run: RunFile) -> dict[str, str]:
    """The child's variables: the caller's without anything that looks like a secret, and what the engine is to read."""
    return {name: value for name, value in parent.items() if not SECRET.search(name)} | environment(run)


def missing_files(manifest: ModelManifest) -> list[str]:
    """Files of the manifest that are absent or of another size. Content was checked when they were staged."""
    wrong = []
    for entry in manifest.files:
        path = Path(manifest.folder) / entry.path
        try:
            size = path.stat().st_size
        except OSError:
            wrong.append(f"{path}: missing")
            continue
        if size != entry.size_bytes:
            wrong.append(f"{path}: {size} bytes, staged with {entry.size_bytes}")
    return wrong


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


def evaluate(
    run: RunFile, facts: Facts, plan: Plan, manifest: ModelManifest, results: Path, log: Path, gpus: int
) -> tuple[Evaluation, list[memory.Trace]]:
    """Evaluate every unit that is not kept already, on so many GPUs. Raises EvaluateError, with what is done kept."""
    if not plan.fits:
        raise EvaluateError(f"{plan.model} does not fit this hardware: {plan.advice}")
    if wrong := missing_files(manifest):
        raise EvaluateError("the store is not as it was staged; run `snakemake stage` again: " + "; ".join(wrong[:5]))
    begin, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    work = results / "work" / run.run.name
    history = resources.read_history(work)
    first = resources.first_rung(plan, history)
    end = resources.end_rung(plan, first, gpus) if run.hardware.gpus else len(plan.ladder)
    if first >= end:
        needed = plan.ladder[first].settings.tensor_parallel_size
        raise EvaluateError(f"{plan.model}: needs {needed} GPUs, and the job has {gpus}")
    traces: list[memory.Trace] = []
    # Rungs that differ by neutral levers share their keys; looking for a result reads all its samples.
    folders = {
        entry.key: Path(entry.folder)
        for step in plan.ladder
        for entry in child_units(run, facts, step.settings, results)
    }
    before = {key for key, folder in folders.items() if keep.find(folder, key)}

    def start_child(settings: EngineSettings, rung: int) -> supervise.ChildOutcome:
        units = child_units(run, facts, settings, results)
        pending = unfinished(units)
        task = ChildTask(
            run=run,
            settings=settings,
            model_folder=manifest.folder,
            request_cache=str(results / "requests"),
            score_levers=score_levers(plan, rung),
            units=pending,
            kept_tokens=sum(entry.tokens for entry in units if entry not in pending),
        )
        write_record(work / "child.json", task)
        progress = Progress(run.run.name, len(units), kept=len(units) - len(pending))
        outcome = supervise.run_child(
            [sys.executable, "-m", "reproval.engine", str(work / "child.json")],
            child_environment(os.environ, run),
            log,
            progress.event,
            gpus=gpus,
        )
        traces.append(outcome.trace)
        return outcome

    attempts: list[Attempt] = []
    rung = first
    if unfinished(child_units(run, facts, plan.ladder[first].settings, results)):
        attempts, finished = supervise.climb(
            plan.ladder[:end],
            start_child,
            first=first,
            on_cpu=run.hardware.gpus == 0,
            holders=lambda: memory.gpu_holders(gpus, os.environ),
        )
        write_record(work / "attempts.json", Attempts(attempts=[*history, *attempts]))
        last = attempts[-1]
        if not finished:
            more = resources.gpus(plan, [*history, *attempts])
            again = f"; the next attempt (--retries) asks for {more} GPUs" if more > gpus else ""
            raise EvaluateError(f"{plan.model}: {last.failure}: {last.message}; its log is {log}{again}")
        rung = last.rung

    units = child_units(run, facts, plan.ladder[rung].settings, results)
    if absent := unfinished(units):
        names = ", ".join(entry.unit.name for entry in absent)
        raise EvaluateError(f"{plan.model}: the engine ended as done, but nothing is kept of {names}; see {log}")
    evaluation = Evaluation(
        run=run.run.name,
        model=run.run.model_name,
        plan=plan,
        units=[
            UnitReference(
                suite=entry.unit.suite,
                task=entry.unit.task,
                folder=Path(entry.folder).relative_to(results).as_posix(),
                key=entry.key,
                reused=entry.key in before,
            )
            for entry in units
        ],
        attempts=[*history, *attempts],
        begin=begin,
        duration_s=time.monotonic() - clock,
        host_peak_bytes=max((attempt.host_peak_bytes for attempt in attempts), default=0),
        gpu_peak_bytes=max((a.gpu_peak_bytes for a in attempts if a.gpu_peak_bytes is not None), default=None),
    )
    return evaluation, traces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "facts", "plan", "manifest", "results", "log", "out", "trace"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="That the job has been given.")
    options = parser.parse_args()
    try:
        evaluation, traces = evaluate(
            read_record(options.run, RunFile),
            read_record(options.facts, Facts),
            read_record(options.plan, Plan),
            read_record(options.manifest, ModelManifest),
            options.results,
            options.log,
            options.gpus,
        )
    except (EvaluateError, RecordError) as error:
        sys.exit(f"reproval evaluate: {error}")
    memory.write_trace(options.trace, *traces)
    write_record(options.out, evaluation)


if __name__ == "__main__":
    main()
