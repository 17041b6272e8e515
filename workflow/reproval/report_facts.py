"""The parts of a report that are read from one model's records: what was done to it, memory, time, cuts, provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from reproval import collect
from reproval.collect import ModelData, UnitData, thinking
from reproval.files import RecordError
from reproval.manifests import Manifests
from reproval.records import Attempt, ModelManifest, Provenance, ScoringPath, UnitResult
from reproval.report_content import Curve, Cut, Fit, Memory, ReportProvenance, TaskProvenance, TaskTime, Timing
from reproval.task_facts import sampled_unasked

CURVE_POINTS = 240


def _last(model: ModelData) -> Attempt | None:
    """The attempt that made the scores; of several shards', the one that took the most memory."""
    attempts = model.evaluation.attempts
    finished = [a for a in attempts if a.outcome == "finished"]
    if model.evaluation.shards > 1 and finished:
        return max(finished, key=lambda a: (a.gpu_peak_bytes or 0, a.host_peak_bytes))
    return finished[-1] if finished else attempts[-1] if attempts else None


def run_name(model: ModelData) -> str:
    """A run as people read it."""
    return f"{model.label}, repeat {model.repeat}" if model.repeat else model.label


def fit(model: ModelData) -> Fit:
    plan, attempt = model.evaluation.plan, _last(model)
    rung = attempt.rung if attempt else 0
    ladder = plan.ladder[: rung + 1]
    levers = [*plan.levers, *(lever for step in ladder[1:] for lever in step.levers)]
    kept = list({(v.lever, v.before, v.after): v for v in levers}.values())
    of_units = {(v.lever, v.before, v.after): v for u in model.units for v in u.result.score_levers}
    kept += [lever for key, lever in of_units.items() if key not in {(v.lever, v.before, v.after) for v in kept}]
    hardware = plan.hardware
    where = (
        f"{hardware.gpus} x {hardware.gpu_name or 'GPU'} ({hardware.gpu_memory_bytes / 2**30:.1f} GiB)"
        if hardware.gpus
        else f"CPU, {hardware.cpus} cores, {hardware.host_memory_bytes / 2**30:.0f} GiB"
    )
    return Fit(
        model=model.label,
        parameters=plan.parameters,
        tier=plan.tier,
        policy=plan.policy,
        hardware=where,
        fits=plan.fits,
        advice=plan.advice,
        rung=rung,
        rungs=len(plan.ladder),
        levers=kept,
        changes_scores=any(lever.changes_scores for lever in kept),
        settings=attempt.settings.model_dump() if attempt else {},
        reasons=plan.reasons,
    )


def thin(
    t_s: Sequence[float], series: dict[str, Sequence[int]], points: int
) -> tuple[list[float], dict[str, list[int]]]:
    """At most about 2 * `points` samples: of every slice the first and the highest sum, so that no peak goes."""
    n = len(t_s)
    if n <= 2 * points:
        return list(t_s), {name: list(v) for name, v in series.items()}
    total = np.sum([np.asarray(v) for v in series.values()], axis=0)
    kept: set[int] = {n - 1}
    for part in np.array_split(np.arange(n), points):
        kept.update((int(part[0]), int(part[total[part].argmax()])))
    # A peak of one GPU need not be a peak of the sum.
    kept.update(int(np.argmax(np.asarray(v))) for v in series.values())
    order = sorted(kept)
    return [t_s[i] for i in order], {name: [int(v[i]) for i in order] for name, v in series.items()}


def curve(model: ModelData) -> Curve | None:
    """The trace beside evaluation.json. None if there is none. Raises RecordError if it cannot be read."""
    path = model.folder / "memory.parquet"
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
        attempts = np.asarray(table["attempt"])
        last = _last(model)
        number = model.evaluation.attempts.index(last) if last else 0
        table = table.filter(attempts == number)
        names = [c for c in table.column_names if c.endswith("_bytes")]
        columns: dict[str, Sequence[int]] = {
            name.removesuffix("_bytes"): [v or 0 for v in table[name].to_pylist()] for name in names
        }
        times = table["t_s"].to_pylist()
    except (OSError, KeyError, ValueError) as error:
        raise RecordError(f"{path}: not readable as a memory trace ({error}). Evaluate again") from error
    if not times:
        return None
    t_s, series = thin(times, columns, CURVE_POINTS)
    return Curve(attempt=number, t_s=[round(t, 2) for t in t_s], series=series)


def memory(model: ModelData) -> Memory:
    evaluation, attempt = model.evaluation, _last(model)
    plan, gpus = evaluation.plan, evaluation.plan.hardware.gpus
    predicted = plan.ladder[attempt.rung].predicted if attempt and attempt.rung < len(plan.ladder) else None
    host = predicted.host_bytes if predicted else None
    measured = attempt.host_peak_bytes if attempt else evaluation.host_peak_bytes
    return Memory(
        model=model.label,
        device="GPU" if gpus else "host",
        jobs_per_gpu=plan.jobs_per_gpu,
        predicted_bytes=(predicted.peak_bytes if gpus else host) if predicted else None,
        measured_bytes=(attempt.gpu_peak_bytes if attempt else evaluation.gpu_peak_bytes) if gpus else measured,
        capacity_bytes=plan.hardware.gpu_memory_bytes if gpus else plan.hardware.host_memory_bytes,
        host_predicted_bytes=host,
        host_measured_bytes=measured,
        prediction=predicted,
        phases=attempt.phases if attempt else [],
        curve=curve(model),
    )


def _sum(paths: Iterable[ScoringPath]) -> ScoringPath:
    totals = dict.fromkeys(ScoringPath.model_fields, 0)
    for path in paths:
        for name in totals:
            totals[name] += getattr(path, name)
    return ScoringPath(**totals)


def timing(model: ModelData) -> Timing:
    tasks = []
    for unit in model.units:
        result = unit.result
        paths = _sum(result.paths.values())
        entries = [
            t
            for t in (model.facts.tasks if model.facts else [])
            if (t.suite, t.unit) == (result.suite, result.task)
        ]  # fmt: skip
        tokens = sum(t.context_tokens + t.continuation_tokens for t in entries)
        # What an interrupted run or another entry had kept took no time here, and its tokens are not known apart.
        seconds, computed = result.duration_s, paths.requests - paths.cached
        tasks.append(
            TaskTime(
                suite=result.suite,
                task=result.task,
                duration_s=seconds,
                reused=unit.reference.reused,
                paths=paths,
                requests_per_s=computed / seconds if computed and seconds > 0 else None,
                tokens_per_s=tokens / seconds if tokens and not paths.cached and seconds > 0 else None,
            )
        )
    attempt = _last(model)
    first = next((p.begin_s for p in (attempt.phases if attempt else []) if p.phase.startswith("task")), None)
    return Timing(
        model=run_name(model),
        begin=model.evaluation.begin,
        duration_s=model.evaluation.duration_s,
        shards=model.evaluation.shards,
        startup_s=first,
        predicted=model.evaluation.plan.time,
        tasks=tasks,
    )


def cuts(model: ModelData) -> list[Cut]:
    longest = {(t.suite, t.task): t.longest_request_tokens for t in (model.facts.tasks if model.facts else [])}
    return [
        Cut(
            model=run_name(model),
            suite=unit.result.suite,
            task=task,
            cut=path.cut,
            ended_by_length=path.ended_by_length,
            requests=path.requests,
            max_model_len=collect.engine_settings(unit, model.evaluation)["max_model_len"],
            longest_request_tokens=longest.get((unit.result.suite, task)),
        )
        for unit in model.units
        for task, path in unit.result.paths.items()
        if path.cut or path.ended_by_length
    ]


def marked(models: Iterable[ModelData], holds: Callable[[UnitResult], object]) -> list[str]:
    """Models with a result of which this holds, each once."""
    return list(dict.fromkeys(m.label for m in models if any(holds(u.result) for u in m.units)))


def without_numbers(result: UnitResult) -> bool:
    """Whether a log-probability is NaN. An accuracy made of such looks like any other."""
    return any(path.not_a_number for path in result.paths.values())


def with_remote_code(result: UnitResult) -> bool:
    """Whether the model's own Python code was allowed to run."""
    return bool(result.engine.get("trust_remote_code"))


def with_endless_thoughts(result: UnitResult) -> bool:
    """Whether a model that thinks was ended by the length of its answer, perhaps in a thought."""
    return bool(result.engine.get("think_end_token")) and any(p.ended_by_length for p in result.paths.values())


def sampled(models: Iterable[ModelData]) -> dict[str, bool]:
    """Tasks with answers that were drawn at random, and whether anybody asked for that: the task or the suite."""
    found: dict[str, bool] = {}
    for unit in (unit for model in models for unit in model.units):
        for task, path in unit.result.paths.items():
            if path.sampled:
                kwargs = unit.result.lm_eval.get("configs", {}).get(task, {}).get("generation_kwargs") or {}
                found[f"{unit.result.suite}/{task}"] = not sampled_unasked(kwargs)
    return found


def with_changed_workflow(result: UnitResult) -> bool:
    """Whether it was made by a workflow that differed from its commit."""
    return any(made.git_dirty for made in result.made_with)


# --- provenance ----------------------------------------------------------------------------------------------------


def _task_settings(unit: UnitData) -> dict[str, str]:
    """What the configuration set for lm-eval, by its own names; shots have a column of their own."""
    given = collect.task_settings(unit)
    return {name.replace("_", " "): str(value) for name, value in given.items() if value is not None}


def _special_tokens(lm_eval: dict[str, Any]) -> str:
    """The tokenizer's own, as lm-eval found them: kind, text and number."""
    kinds = {kind: lm_eval.get(f"tokenizer_{kind}_token") for kind in ("bos", "eos", "pad")}
    return ", ".join(f"{kind} {' = '.join(map(str, found))}" for kind, found in kinds.items() if found)


def facts_of(unit: UnitData) -> dict[str, str]:
    """Where and with what a unit was made, by the words of the report."""
    return _merge(_made_with(unit, provenance) for provenance in unit.result.made_with)


def _made_with(unit: UnitData, p: Provenance) -> dict[str, str]:
    engine, box = unit.result.engine, p.container
    given: dict[str, Any] = {
        "reproval": p.reproval_version,
        "Git commit": p.git_commit,
        "Git work tree": None if p.git_dirty is None else "changed since the commit" if p.git_dirty else "clean",
        "container image": box.image if box else "none; ran in the environment of the lock",
        "container digest": box.digest if box else None,
        "SIF SHA-256": box.sif_sha256 if box else None,
        "container runtime": box.runtime if box else None,
        "container network": box.network if box else None,
        "lock": p.lock,
        "model digest": engine.get("model"),
        **{f"package {name}": version for name, version in sorted(p.packages.items())},
        "Python": p.python,
        "platform": p.platform,
        "CPU": f"{p.cpu}, {p.cpus} cores",
        "GPUs": ", ".join(p.gpus) or "none",
        "driver": p.driver,
        "CUDA": p.cuda,
        "Slurm job": p.slurm_job,
        "node": p.node,
        "seeds": ", ".join(f"{k}={v}" for k, v in sorted(p.seeds.items())),
        "batch invariant": "yes" if p.batch_invariant else "no",
        **{f"variable {name}": value for name, value in p.engine_variables.items()},
        **{name.replace("_", " "): value for name, value in thinking(unit).items()},
        "chat template SHA-256": unit.result.lm_eval.get("chat_template_sha"),
        "special tokens": _special_tokens(unit.result.lm_eval),
    }
    return {name: str(value) for name, value in given.items() if value not in (None, "")}


def _merge(parts: Iterable[dict[str, str]]) -> dict[str, str]:
    merged: dict[str, dict[str, None]] = {}
    for part in parts:
        for name, value in part.items():
            merged.setdefault(name, {})[value] = None
    return {name: " / ".join(values) for name, values in merged.items()}


def _dataset(unit: UnitData, task: str, manifests: Manifests) -> str | None:
    """Repository, configuration and commit: as staged, where a manifest has it, else as the task asked for it.

    A task that makes its documents itself has the hash of its suite's files.
    """
    staged, suite = manifests.datasets.get((unit.result.suite, task)), manifests.suites.get(unit.result.suite)
    config = unit.result.lm_eval.get("configs", {}).get(task, {})
    path, name = config.get("dataset_path"), config.get("dataset_name")
    revision = (config.get("dataset_kwargs") or {}).get("revision")
    if staged:
        path, name, revision = staged.path or path, staged.name or name, staged.revision or revision
    if not path:
        return f"task files of the suite, SHA-256 {suite.digest}" if suite and suite.task_files else None
    return str(path) + (f", {name}" if name else "") + (f" @ {revision}" if revision else "")


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")


def _staged_facts(manifest: ModelManifest) -> dict[str, str]:
    """What a model's manifest says of it, by the words of the report."""
    hashes = {f.path: f.sha256 for f in manifest.files}
    tokenizer = next((name for name in TOKENIZER_FILES if name in hashes), None)
    given = {
        "model source": manifest.hub_id or "local folder",
        "model commit": manifest.revision,
        "tokenizer SHA-256": f"{hashes[tokenizer]} ({tokenizer})" if tokenizer else None,
    }
    return {name: value for name, value in given.items() if value}


def provenance(models: Sequence[ModelData], manifests: Manifests) -> ReportProvenance:
    staged = {m.label: found for m in models if (found := manifests.models.get(m.evaluation.model))}
    by_model = {
        label: _merge(facts_of(unit) for m in models if m.label == label for unit in m.units)
        | (_staged_facts(staged[label]) if label in staged else {})
        for label in dict.fromkeys(m.label for m in models)
    }
    names = list(dict.fromkeys(name for facts in by_model.values() for name in facts))
    common = {
        name: values.pop()
        for name in names
        if len(values := {facts.get(name) for facts in by_model.values()}) == 1 and None not in values
    }
    arguments: dict[str, dict[str, str]] = {}
    tasks: dict[tuple[str, str], dict[str, Any]] = {}
    for m in models:
        for unit in m.units:
            for name, value in [pair for p in unit.result.made_with for pair in p.engine_arguments.items()]:
                had = arguments.setdefault(name, {}).setdefault(m.label, str(value))
                if str(value) not in had.split(" / "):
                    arguments[name][m.label] = f"{had} / {value}"
            for task, hashed in unit.result.task_hashes.items():
                version = unit.result.versions.get(task)
                entry = tasks.setdefault(
                    (unit.result.suite, task),
                    {
                        "version": None if version is None else str(version),
                        "n_shot": unit.result.n_shot.get(task),
                        "dataset": _dataset(unit, task, manifests),
                        "settings": [],
                        "hashes": {},
                    },
                )
                entry["settings"].append(_task_settings(unit))
                entry["hashes"].setdefault(hashed, {})[m.label] = None
    return ReportProvenance(
        common={name: str(value) for name, value in common.items()},
        by_model={m: {k: v for k, v in facts.items() if k not in common} for m, facts in by_model.items()},
        engine_arguments=dict(sorted(arguments.items())),
        tasks=[
            TaskProvenance(
                suite=suite, task=task, version=e["version"], n_shot=e["n_shot"], dataset=e["dataset"],
                settings=_merge(e["settings"]),
                hashes={h: ", ".join(found) for h, found in e["hashes"].items()},
            )
            for (suite, task), e in tasks.items()
        ],
        files={label: {f.path: f.sha256 for f in manifest.files} for label, manifest in staged.items()},
    )  # fmt: skip


def commands(models: Sequence[ModelData]) -> list[str]:
    """What evaluates the same again elsewhere and judges it, with the bundle of these results."""
    made = [p for model in models for unit in model.units for p in unit.result.made_with]
    commits = sorted({p.git_commit for p in made if p.git_commit})
    boxed = any(p.container for p in made)
    engine = "gpu" if any(model.evaluation.plan.hardware.gpus for model in models) else "cpu"
    others = f"  # some results were made at {', '.join(commits[1:])}" if len(commits) > 1 else ""
    return [
        *(f"git checkout {commit}{others}" for commit in commits[:1]),
        "envs/install controller" + ("" if boxed else f" {engine}"),
        ".env/controller/bin/snakemake --cores 8 reproduce --config bundle=bundle.zip"
        + (" --use-singularity" if boxed else ""),
    ]
