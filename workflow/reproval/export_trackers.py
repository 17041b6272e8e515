"""Runs for experiment trackers: what an evaluation was asked, what it scored, and its memory over time.

A run is made once, as a `TrackedRun`; MLflow and Weights & Biases only store it. Both libraries write files here and
ask no server. They are no part of the controller's environment and are imported when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from reproval import report_facts
from reproval.collect import ModelData, engine_settings, rows, thinking
from reproval.manifests import Manifests
from reproval.scrub import scrub

EXPERIMENT = "reproval"
# What both take as the name of a metric.
_NOT_IN_NAMES = re.compile(r"[^\w./ -]")


@dataclass(frozen=True)
class TrackedRun:
    """One run of one model. Times are milliseconds since 1970; a point of the memory trace is (time, bytes by name)."""

    name: str
    label: str
    begin_ms: int
    end_ms: int
    parameters: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    memory: list[tuple[int, dict[str, int]]]
    files: dict[str, str]


def tracked(model: ModelData, manifests: Manifests, project: Path) -> TrackedRun:
    """What trackers are told of a run. Raises RecordError if its memory trace cannot be read."""
    evaluation, first = model.evaluation, model.units[0] if model.units else None
    begin = int(datetime.fromisoformat(evaluation.begin).timestamp() * 1000)
    metrics: dict[str, float] = {
        "duration_s": evaluation.duration_s,
        "memory/host_peak_bytes": evaluation.host_peak_bytes,
    }
    if evaluation.gpu_peak_bytes is not None:
        metrics["memory/gpu_peak_bytes"] = evaluation.gpu_peak_bytes
    table = rows([model])
    for row in table:
        # A dot before the filter: in MLflow's store a slash makes a folder, where METRIC is a file already.
        filtered = "" if row["filter"] == "none" else f".{row['filter']}"
        name = _NOT_IN_NAMES.sub("_", f"{row['suite']}/{row['task']}/{row['metric']}{filtered}")
        for suffix, key in (("", "value"), ("_stderr", "stderr"), ("_low", "interval_low"), ("_high", "interval_high")):
            if row[key] is not None:
                metrics[name + suffix] = row[key]
    manifest = manifests.models.get(evaluation.model)
    asked: dict[str, Any] = {
        "model": evaluation.model,
        "hub": manifest.hub_id if manifest else None,
        "revision": manifest.revision if manifest else None,
        "parameters": evaluation.plan.parameters,
        "tier": evaluation.plan.tier,
        "policy": evaluation.plan.policy,
        "repeat": evaluation.repeat,
        **(engine_settings(first, evaluation) | thinking(first) if first else {}),
        "tasks": ", ".join(f"{unit.result.suite}/{unit.result.task}" for unit in model.units),
    }
    facts: dict[str, str] = report_facts.facts_of(first) if first else {}
    levers = sorted({lever.lever for unit in model.units for lever in unit.result.score_levers})
    tags = {**facts, "run": evaluation.run, "score-changing levers": ", ".join(levers) or "none"}
    trace = report_facts.curve(model)
    started = {index: attempt.begin for index, attempt in enumerate(evaluation.attempts)}
    memory = []
    if trace:
        at = int(datetime.fromisoformat(started[trace.attempt]).timestamp() * 1000)
        memory = [
            (at + round(1000 * t), {f"memory/{name}_bytes": values[i] for name, values in trace.series.items()})
            for i, t in enumerate(trace.t_s)
        ]
    files = {"evaluation.json": evaluation.model_dump(mode="json"), "scores.json": table}
    told, _ = scrub([{k: str(v) for k, v in asked.items() if v is not None}, tags, files], project)
    return TrackedRun(
        name=evaluation.run,
        label=report_facts.run_name(model),
        begin_ms=begin,
        end_ms=begin + round(1000 * evaluation.duration_s),
        parameters=told[0],
        metrics=metrics,
        tags=told[1],
        memory=memory,
        files={name: json.dumps(content, indent=1, ensure_ascii=False) + "\n" for name, content in told[2].items()},
    )


def write_mlflow(runs: list[TrackedRun], folder: Path, name: Path) -> None:
    """MLflow's file store. `name` is what the folder will be called: it stands in the store, relative to the project.

    Raises ModuleNotFoundError without MLflow.
    """
    # MLflow prefers a database since 3.10 and asks for a word before it writes files. It reads and migrates them.
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=folder.resolve().as_uri())
    experiment = client.create_experiment(EXPERIMENT)
    for run in runs:
        made = client.create_run(experiment, start_time=run.begin_ms, run_name=run.label)
        identity = made.info.run_id
        # Longer values are refused.
        client.log_batch(
            identity,
            params=[Param(_NOT_IN_NAMES.sub("_", key), value[:6000]) for key, value in run.parameters.items()],
            tags=[RunTag(_NOT_IN_NAMES.sub("_", key), value[:8000]) for key, value in run.tags.items()],
        )
        entries = [Metric(key, value, run.end_ms, 0) for key, value in run.metrics.items()]
        entries += [
            Metric(key, value, at, step)
            for step, (at, values) in enumerate(run.memory)
            for key, value in values.items()
        ]
        for begin in range(0, len(entries), 1000):
            client.log_batch(identity, metrics=entries[begin : begin + 1000])
        for file, text in run.files.items():
            client.log_text(identity, text, file)
        client.set_terminated(identity, "FINISHED", end_time=run.end_ms)
    _make_relative(folder, name)


def _make_relative(folder: Path, name: Path) -> None:
    """The store's own notes of where it lies: relative to where `mlflow` is started, so that it can be copied."""
    here, there = folder.resolve().as_uri(), os.path.relpath(name)
    for path in folder.rglob("meta.yaml"):
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = {key: value.replace(here, there) if isinstance(value, str) else value for key, value in meta.items()}
        path.write_text(yaml.safe_dump(changed), encoding="utf-8")


def write_wandb(runs: list[TrackedRun], folder: Path, name: Path) -> None:
    """Offline runs of Weights & Biases, one folder each, for `wandb sync`. Raises ModuleNotFoundError without it."""
    scratch = folder / ".scratch"
    # What the caller has set for runs of his own (user, entity, notes) has nothing to do with these.
    for variable in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[variable]
    for kind in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
        os.environ[f"WANDB_{kind}_DIR"] = str(scratch)
    import wandb

    for run in runs:
        settings = wandb.Settings(
            mode="offline",
            root_dir=str(scratch),
            console="off",
            silent=True,
            symlink=False,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_start_time=run.begin_ms / 1000,
        )
        made = wandb.init(
            project=EXPERIMENT,
            id=hashlib.sha256(run.name.encode()).hexdigest()[:16],
            name=run.label,
            group=run.parameters["model"],
            job_type="evaluation",
            config=run.parameters | {"provenance": run.tags},
            settings=settings,
        )
        for file, text in run.files.items():
            (Path(made.dir) / file).write_text(text, encoding="utf-8")
            made.save(str(Path(made.dir) / file), base_path=made.dir, policy="end")
        made.define_metric("t_s")
        made.define_metric("memory/*", step_metric="t_s")
        for at, values in run.memory:
            made.log({"t_s": (at - run.memory[0][0]) / 1000, **values})
        made.summary.update(run.metrics)
        made.finish()
        (written,) = scratch.glob("wandb/offline-run-*")
        target = folder / f"offline-run-{written.name.split('-', 2)[2]}"
        target.mkdir()
        # Its logs and notes are about this machine; the run is in one file and what it was given.
        for kept in (next(written.glob("*.wandb")), written / "files"):
            kept.rename(target / kept.name)
        shutil.rmtree(scratch)
