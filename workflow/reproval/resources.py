"""What a job of `evaluate` asks the scheduler for: GPUs, host memory, time; and which rungs it may then try.

Pure functions of a plan and of what earlier jobs of the run found. docs/clusters.md says how the margins were chosen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from reproval.failures import answers
from reproval.files import RecordError, read_record
from reproval.records import Attempt, Attempts, Plan

MIB = 2**20

HOST_MARGIN = 1.25
"""On the predicted host memory."""
SNAKEMAKE_BYTES = 2**30
"""A job is itself a Snakemake, at times two, beside what is predicted: the process tree of the engine."""
RAISE = 1.5
"""Host memory of an attempt, relative to the one before."""

SETUP_S = 900.0
"""Before and beside the engine: the image is hashed, weights come from a busy file system, a rung or two fail."""
BUSY_S = 600.0
"""How long a GPU that a neighbour holds is waited for in all (supervise_ladder.py). Without it in the limit, the
scheduler would end a short job before it can name the neighbour."""
TIME_MARGIN = 2.0
"""On the estimated time, of whose constants most are assumed."""

UNFIT_MIB = 1024


def read_plan(path: str) -> Plan:
    """The plan as it is now, read once for all resources of its jobs.

    Raises FileNotFoundError with `path` as it was given, by which Snakemake knows that it is still to come, and
    RecordError.
    """
    return _read_plan(path, os.stat(path).st_mtime_ns)  # noqa: PTH116  Path.stat puts a Path into the error


@lru_cache(maxsize=4096)
def _read_plan(path: str, _mtime_ns: int) -> Plan:
    return read_record(Path(path), Plan)


def read_history(work: Path) -> list[Attempt]:
    """Attempts of earlier jobs of a run, which were interrupted or failed. Of another version: forgotten."""
    try:
        return read_record(work / "attempts.json", Attempts).attempts
    except RecordError:
        return []


def first_rung(plan: Plan, history: Sequence[Attempt]) -> int:
    """The rung that the next job of a run begins with: the first, unless earlier jobs needed more GPUs.

    `history` are the attempts of all jobs so far. Those of another plan do not count.
    """
    if not history or not plan.ladder:
        return 0
    last = history[-1]
    if last.rung >= len(plan.ladder) or plan.ladder[last.rung].settings != last.settings:
        return 0
    held = last.settings.tensor_parallel_size
    if last.failure is not None and last.outcome == "failed":
        later = range(last.rung + 1, len(plan.ladder))
        on_cpu = plan.hardware.gpus == 0
        helps = (n for n in later if answers(last.failure, last.settings, plan.ladder[n].settings, on_cpu=on_cpu))
        step = next(helps, None)
        if step is not None and step >= end_rung(plan, last.rung, held):
            return step
    return next(n for n, rung in enumerate(plan.ladder) if rung.settings.tensor_parallel_size == held)


def end_rung(plan: Plan, first: int, gpus: int) -> int:
    """Where a job with so many GPUs stops: at the first rung that needs more, which is the next job's to try.

    Rungs behind it that would need no more change scores, and come only after more GPUs.
    """
    later = range(first, len(plan.ladder))
    return next((n for n in later if gpus < plan.ladder[n].settings.tensor_parallel_size), len(plan.ladder))


def gpus(plan: Plan, history: Sequence[Attempt] = ()) -> int:
    """GPUs of the next job; 0 on a CPU machine, and for a model that does not fit: its job only says so."""
    if plan.hardware.gpus == 0 or not plan.ladder:
        return 0
    return plan.ladder[first_rung(plan, history)].settings.tensor_parallel_size


def cpus(plan: Plan, history: Sequence[Attempt] = ()) -> int:
    """Cores of the next job: the share that its GPUs are of all, so that jobs run side by side; without GPUs all."""
    hardware = plan.hardware
    if hardware.gpus == 0:
        return hardware.cpus
    return max(1, hardware.cpus * gpus(plan, history) // (hardware.gpus * plan.jobs_per_gpu))


def mem_mib(plan: Plan, attempt: int = 1) -> int:
    """Host memory in MiB, as Slurm reads `mem_mb`: the most that any rung is predicted to need, with a margin.

    Each attempt asks for more, and none for more than the configuration allows a job: the plan is made to fit that.
    """
    if not plan.ladder:
        return UNFIT_MIB
    predicted = max(rung.predicted.host_bytes for rung in plan.ladder)
    wanted = (predicted * HOST_MARGIN + SNAKEMAKE_BYTES) * RAISE ** (attempt - 1)
    return min(math.ceil(wanted / MIB), plan.hardware.host_memory_bytes // MIB)


def runtime_min(plan: Plan, attempt: int = 1, shards: int = 1) -> int:
    """Time limit in minutes: the estimate with a margin and what comes before the engine, as often as attempts.

    What an attempt has finished is kept, so the next one has less to do and more time for it. Each of several `shards`
    has its part of the work.
    """
    estimated = plan.time.engine_start_s + plan.time.work_s / shards if plan.time else 0.0
    busy = BUSY_S if gpus(plan) else 0.0
    return math.ceil((SETUP_S + busy + TIME_MARGIN * estimated) / 60) * attempt
