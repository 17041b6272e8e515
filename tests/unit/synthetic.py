"""Evaluations as the pipeline leaves them, made up but consistent: scores follow from their samples.

Used by the tests of collect and report and by the benchmark. The numbers are drawn from seeded generators.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reproval import records as r
from reproval.files import sha256_bytes, sha256_file, sha256_json, write_record

GIB = 2**30


@dataclass(frozen=True)
class Task:
    """kind: choice (acc, acc_norm), generation (exact_match, 2 filters), rolling (perplexities), group (of choice)."""

    name: str
    kind: str = "choice"
    documents: int = 100
    subtasks: int = 0
    suite: str = "demo"
    shots: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    name: str
    skill: float = 0.5
    parameters: int = 134_515_008
    gpus: int = 0
    dtype: str = "bfloat16"
    levers: tuple[r.PulledLever, ...] = ()
    failures: tuple[str, ...] = ()
    cut: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    remote_code: bool = False
    thinking: dict[str, Any] = field(default_factory=dict)
    repeat: int = 0
    flips: float = 0.05  # share of the questions that a repeat answers otherwise


@dataclass(frozen=True)
class Project:
    results: Path
    evaluations: list[Path]


DEMO_TASKS = (
    Task("capitals", documents=48, shots=3),
    Task("physics_sentences", documents=40),
    Task("sums", "generation", documents=60, shots=2),
    Task("essays", "rolling", documents=24),
)
CAP = r.PulledLever(
    lever="max_model_len",
    before="8192",
    after="2048",
    reason="the longest request needs 5.1 GiB of logits for its prompt, and 3.2 GiB are left",
    changes_scores=True,
    requests_cut=7,
)
UTILIZATION = r.PulledLever(
    lever="gpu_memory_utilization",
    before="0.92",
    after="0.70",
    reason="the profile leaves out 9.1 GiB of prompt logprobs",
    changes_scores=False,
)
DEMO_MODELS = (Model("smollm2-135m", 0.62), Model("smollm2-135m-fp32", 0.62, dtype="float32"))
GPU_MODELS = (
    Model("qwen3-4b", 0.70, 4_022_468_096, 1),
    Model("llama-3-8b", 0.66, 8_030_261_248, 1, levers=(UTILIZATION,), failures=("running",)),
    Model("qwen3-14b", 0.74, 14_768_307_200, 1, levers=(UTILIZATION, CAP), failures=("no_kv_room", "running"), cut=7),
)


def _seed(*parts: object) -> np.random.Generator:
    return np.random.default_rng(int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:12], 16))


def _stderr(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _hash(*parts: object) -> str:
    return sha256_bytes("/".join(map(str, parts)).encode())


def _lines(model: Model, task: Task, name: str) -> list[dict[str, Any]]:
    """One line per document and filter, as lm-eval logs them, plus the task."""
    hard, mine = _seed("difficulty", name), _seed("answers", model.name, name)
    again = _seed("again", model.name, name, model.repeat)
    out: list[dict[str, Any]] = []
    for i in range(task.documents):
        level = hard.uniform(-0.35, 0.35)
        doc = {"id": i, "question": f"{name} question {i}", "answer": "A"}
        line: dict[str, Any] = {
            "task": name,
            "doc_id": i,
            "doc": doc,
            "target": "A",
            "arguments": [[f"{name} question {i}", {"until": ["\n"]}]],
            "resps": [["A, I think"]],
            "filtered_resps": ["A"],
            "doc_hash": _hash(name, i),
            "prompt_hash": _hash("prompt", name, task.shots, i),
            "target_hash": _hash("A"),
        }
        right = float(mine.uniform() < model.skill + level)
        if model.repeat and again.uniform() < model.flips:
            right = 1.0 - right
        if task.kind == "generation":
            lenient = float(right or mine.uniform() < 0.1)
            for name_of_filter, value in (("strict-match", right), ("flexible-extract", lenient)):
                out.append({**line, "filter": name_of_filter, "metrics": ["exact_match"], "exact_match": value})
        elif task.kind == "rolling":
            words = int(hard.integers(120, 400))
            bits = -words * (3.4 - model.skill) * (1 + 0.3 * level) * (1 + 0.01 * mine.standard_normal())
            bits *= 1 + (0.01 * again.standard_normal() if model.repeat else 0.0)
            out.append(
                {
                    **line,
                    "filter": "none",
                    "metrics": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
                    "resps": [[bits]],
                    "filtered_resps": [bits],
                    "word_perplexity": [bits, words],
                    "byte_perplexity": [bits, 6 * words],
                    "bits_per_byte": [bits, 6 * words],
                }
            )
        else:
            norm = right if mine.uniform() < 0.85 else float(mine.uniform() < model.skill + level)
            likelihoods = [[-1.25, True], [-2.5, False]] if right else [[-2.5, False], [-1.25, True]]
            asked = {
                "arguments": [[f"{name} question {i}", choice] for choice in (" A", " B")],
                "resps": [[likelihood] for likelihood in likelihoods],
                "filtered_resps": likelihoods,
                "target": 0,
            }
            metrics = {"metrics": ["acc", "acc_norm"], "acc": right, "acc_norm": norm}
            out.append({**line, **asked, "filter": "none", **metrics})
    return out


def _scores(lines: list[dict[str, Any]], name: str) -> list[r.Score]:
    found = []
    keys = dict.fromkeys((metric, line["filter"]) for line in lines for metric in line["metrics"])
    for metric, filter_name in keys:
        values = [line[metric] for line in lines if line["filter"] == filter_name]
        if isinstance(values[0], list):
            ratio = sum(v[0] for v in values) / sum(v[1] for v in values)
            value = -ratio / math.log(2) if metric == "bits_per_byte" else math.exp(-ratio)
            stderr = None
        else:
            value, stderr = sum(values) / len(values), _stderr(values)
        found.append(
            r.Score(
                task=name,
                metric=metric,
                filter=filter_name,
                value=value,
                stderr=stderr,
                n=len(values),
                higher_is_better=not isinstance(values[0], list),
            )
        )
    return found


def _group(name: str, leaves: list[list[r.Score]]) -> list[r.Score]:
    found = []
    for position, first in enumerate(leaves[0]):
        scores = [leaf[position] for leaf in leaves]
        sizes = [s.n or 0 for s in scores]
        total = sum(sizes)
        pooled = sum((n - 1) * n * (s.stderr or 0.0) ** 2 for n, s in zip(sizes, scores, strict=True))
        found.append(
            first.model_copy(
                update={
                    "task": name,
                    "value": sum(s.value * n for s, n in zip(scores, sizes, strict=True)) / total,
                    "stderr": math.sqrt(pooled / (total - len(sizes)) / total),
                    "n": total,
                    "group": True,
                }
            )
        )
    return found


def _settings(model: Model, rung: int) -> r.EngineSettings:
    cap = any(lever.lever == "max_model_len" for lever in model.levers)
    return r.EngineSettings(
        dtype=model.dtype,  # type: ignore[arg-type]
        max_model_len=2048 if cap else 8192,
        max_num_batched_tokens=8192 >> rung,
        max_num_seqs=256,
        gpu_memory_utilization=0.92 - 0.1 * rung if model.gpus else None,
        kv_cache_memory_bytes=None if model.gpus else 2 * GIB,
        enforce_eager=True,
        tensor_parallel_size=max(model.gpus, 1),
        submit_batch=512,
    )


def _predicted(model: Model) -> r.MemoryPrediction:
    weights = model.parameters * (4 if model.dtype == "float32" else 2)
    kv = 24 * GIB if model.gpus else 2 * GIB
    parts = {
        "weights_bytes": weights,
        "kv_cache_bytes": kv,
        "activations_bytes": int(weights * 0.12),
        "prompt_logprobs_bytes": int(0.9 * GIB if model.gpus else 0.4 * GIB),
        "sampler_bytes": int(0.2 * GIB),
        "cuda_graphs_bytes": 0,
        "context_bytes": int(0.5 * GIB) if model.gpus else 0,
    }
    host = int(6.5 * GIB) if model.gpus else sum(parts.values()) + int(1.4 * GIB)
    return r.MemoryPrediction(**parts, peak_bytes=sum(parts.values()), host_bytes=host)


def _trace(
    model: Model, attempt: int, phases: list[tuple[str, float]], peak: float
) -> tuple[list[dict[str, Any]], list[r.PhasePeak]]:
    rng = _seed("trace", model.name, attempt)
    level = {"start": 0.04, "weights": 0.30, "profile": 0.42, "kv_cache": 0.80, "capture": 0.82, "end": 0.10}
    rows: list[dict[str, Any]] = []
    peaks = []
    t, before = 0.0, 0.02
    for phase, seconds in phases:
        goal = level.get(phase, 0.93)
        first = len(rows)
        for step in np.arange(0, seconds, 0.5):
            ramp = before + (goal - before) * min(1.0, step / max(seconds * (1.0 if phase == "weights" else 0.2), 0.5))
            share = ramp + (0.05 * rng.random() if phase.startswith("task:") else 0.0)
            row: dict[str, Any] = {"attempt": attempt, "t_s": t + float(step), "phase": phase}
            row["host_bytes"] = int((5 * GIB * (0.7 + 0.3 * share)) if model.gpus else share * peak)
            for gpu in range(model.gpus):
                row[f"gpu{gpu}_bytes"] = int(share * peak)
            rows.append(row)
        t, before = t + seconds, goal
        mine = rows[first:]
        peaks.append(
            r.PhasePeak(
                phase=phase,
                begin_s=t - seconds,
                end_s=t,
                gpu_peak_bytes=max(row["gpu0_bytes"] for row in mine) if model.gpus else None,
                host_peak_bytes=max(row["host_bytes"] for row in mine),
            )
        )
    return rows, peaks


def write_project(
    root: Path,
    models: Sequence[Model] = DEMO_MODELS,
    tasks: Sequence[Task] = DEMO_TASKS,
    full_documents: bool = True,
    trace: bool = True,
) -> Project:
    """Write results/ as the evaluate stage leaves it."""
    results, evaluations = root / "results", []
    for number, model in enumerate(models):
        first = f"{model.name}-{_hash('run', model.name)[:12]}"
        run = f"{model.name}-{_hash('run', model.name, model.repeat)[:12]}" if model.repeat else first
        hardware = r.Hardware(
            gpus=model.gpus,
            gpu_memory_bytes=int(79.6 * GIB) if model.gpus else 0,
            gpu_name="NVIDIA H100 80GB HBM3" if model.gpus else None,
            compute_capability="9.0" if model.gpus else None,
            host_memory_bytes=24 * GIB,
            cpus=2,
        )
        predicted = _predicted(model)
        ladder = [
            r.Rung(settings=_settings(model, rung), levers=list(model.levers), predicted=predicted) for rung in range(3)
        ]
        plan = r.Plan(
            run=run,
            model=model.name,
            hardware=hardware,
            policy="auto",
            tier="below 7B" if model.parameters < 7e9 else "7B to 13B" if model.parameters < 13e9 else "above 13B",
            parameters=model.parameters,
            fits=True,
            levers=list(model.levers),
            reasons=[
                r.Reason(setting="enforce_eager", value="true", text="the tier starts eager"),
                r.Reason(
                    setting="max_num_batched_tokens",
                    value="8192",
                    text="8,192 tokens x 49,152 logits x 2 bytes = 0.8 GiB, which the free memory holds",
                ),
            ],
            ladder=ladder,
            time=r.TimeEstimate(engine_start_s=38.0, work_s=20.0 * len(tasks), gpu_hours=0.02 * model.gpus),
        )  # fmt: skip
        rung = len(model.failures)
        provenance = r.Provenance(
            **{
                "reproval_version": "0.1.0",
                "git_commit": _hash("commit")[:40],
                "git_dirty": False,
                "lock": f"gpu.lock {_hash('lock')}" if model.gpus else f"cpu.lock {_hash('lock')}",
                "container": r.Container(
                    image=f"docker://ghcr.io/example/reproval@sha256:{_hash('image')}",
                    digest=f"sha256:{_hash('image')}",
                    sif_sha256=_hash("sif"),
                    runtime="apptainer 1.4.5",
                    network="off",
                )
                if model.gpus
                else None,
                "packages": {"vllm": "0.32.0", "lm_eval": "0.4.13", "torch": "2.13.0", "transformers": "5.17.0"},
                "python": "3.11.9",
                "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
                "cpu": "AMD EPYC 7R13",
                "cpus": 2,
                "gpus": ["NVIDIA H100 80GB HBM3, 79.6 GiB"] * model.gpus,
                "driver": "580.65.06" if model.gpus else None,
                "cuda": "13.0" if model.gpus else None,
                "slurm_job": f"{418200 + number}" if model.gpus else None,
                "seeds": {"engine": 1234 + model.repeat, "fewshot": 1234 + model.repeat},
                "batch_invariant": False,
                "engine_arguments": {
                    "model_config.dtype": f"torch.{model.dtype}",
                    "model_config.max_model_len": _settings(model, rung).max_model_len,
                    "model_config.enforce_eager": True,
                    "model_config.revision": _hash("revision", model.name)[:40],
                    "cache_config.gpu_memory_utilization": _settings(model, rung).gpu_memory_utilization,
                    "scheduler_config.max_num_batched_tokens": _settings(model, rung).max_num_batched_tokens,
                    "scheduler_config.max_num_seqs": _settings(model, rung).max_num_seqs,
                },
                **model.provenance,
            }
        )
        references, seconds = [], {}
        for task in tasks:
            names = [f"{task.name}_{i:02d}" for i in range(task.subtasks)] if task.kind == "group" else [task.name]
            lines = [_lines(model, task, name) for name in names]
            leaves = [_scores(rows, name) for rows, name in zip(lines, names, strict=True)]
            scores = [score for leaf in leaves for score in leaf]
            if task.kind == "group":
                scores = [*_group(task.name, leaves), *scores]
            score_levers = [lever for lever in model.levers if lever.changes_scores]
            made_of = {
                "engine": {
                    "model": _hash("model", model.name),
                    "environment": "lock",
                    "device": "cuda" if model.gpus else "cpu",
                    "dtype": model.dtype,
                    "quantization": None,
                    "kv_cache_dtype": "auto",
                    "max_model_len": _settings(model, 0).max_model_len,
                    "trust_remote_code": model.remote_code,
                    "seed": 1234,
                    "batch_invariant": False,
                    **model.thinking,
                },
                "suite": task.suite,
                "task": task.name,
                "settings": {"num_fewshot": task.shots, **task.settings},
                "seed": 1234 + model.repeat,
                "tasks": {name: _hash("task", name) for name in names},
            }
            key = sha256_json(made_of)
            folder = results / "tasks" / model.name / f"{task.suite}.{task.name}-{key[:12]}"
            folder.mkdir(parents=True)
            samples = folder / "samples.jsonl.gz"
            with gzip.open(samples, "wt", compresslevel=1) as stream:
                for rows in lines:
                    for line in rows:
                        kept = line if full_documents else {k: v for k, v in line.items() if k not in ("doc", "resps")}
                        stream.write(json.dumps(kept) + "\n")
            seconds[f"{task.suite}/{task.name}"] = 6.0 + 0.05 * task.documents * len(names)
            result = r.UnitResult(
                key=key,
                made_of=made_of,
                model=model.name,
                suite=task.suite,
                task=task.name,
                scores=scores,
                versions=dict.fromkeys(names, 1.0),
                n_shot=dict.fromkeys({task.name, *names}, task.shots),
                paths={
                    name: r.ScoringPath(
                        requests=task.documents * (4 if task.kind in ("choice", "group") else 1),
                        suffix=task.documents * 4 if model.gpus and task.kind == "choice" else 0,
                        stock=0 if model.gpus and task.kind == "choice" else task.documents,
                        cut=model.cut if task.kind == "generation" else 0,
                    )
                    for name in names
                },
                group_subtasks={task.name: names} if task.kind == "group" else {},
                task_hashes={name: _hash("task", name) for name in names},
                score_levers=score_levers,
                begin="2026-11-20T10:04:00Z",
                duration_s=seconds[f"{task.suite}/{task.name}"],
                provenance=provenance,
                samples_sha256=sha256_file(samples),
                lm_eval={},
            )
            write_record(folder / "result.json", result)
            references.append(
                r.UnitReference(
                    suite=task.suite, task=task.name, folder=str(folder.relative_to(results)), key=key, reused=False
                )
            )
        attempts, rows_of_trace, begin = [], [], 0.0
        peak = predicted.peak_bytes * (0.94 if model.gpus else 1.0)
        for index in range(rung + 1):
            failed = index < rung
            start = [("start", 4.0), ("weights", 9.0), ("profile", 6.0), ("kv_cache", 3.0)]
            work = [] if failed else [*((f"task:{name}", s) for name, s in seconds.items()), ("end", 2.0)]
            phases = [*start, *work]
            if trace:
                rows_of_attempt, peaks = _trace(model, index, phases, peak)
            else:
                rows_of_attempt, peaks = [], []
            rows_of_trace += rows_of_attempt
            duration = sum(s for _, s in phases)
            attempts.append(
                r.Attempt(
                    rung=index,
                    settings=_settings(model, index),
                    outcome="failed" if failed else "finished",
                    failure=model.failures[index] if failed else None,  # type: ignore[arg-type]
                    message="torch.OutOfMemoryError: Tried to allocate 4.53 GiB." if failed else None,
                    begin=f"2026-11-20T10:0{index}:00Z",
                    duration_s=duration,
                    gpu_peak_bytes=max((p.gpu_peak_bytes or 0 for p in peaks), default=0) if model.gpus else None,
                    host_peak_bytes=max((p.host_peak_bytes for p in peaks), default=0),
                    phases=peaks,
                )
            )  # fmt: skip
            begin += duration + 3
        evaluation = r.Evaluation(
            run=run,
            model=model.name,
            repeat=model.repeat,
            repeat_of=first if model.repeat else None,
            plan=plan,
            units=references,
            attempts=attempts,
            begin="2026-11-20T10:00:00Z",
            duration_s=begin,
            host_peak_bytes=max(a.host_peak_bytes for a in attempts),
            gpu_peak_bytes=max(a.gpu_peak_bytes or 0 for a in attempts) if model.gpus else None,
        )
        home = results / "runs" / run
        write_record(home / "evaluation.json", evaluation)
        if trace:
            pq.write_table(pa.Table.from_pylist(rows_of_trace), home / "memory.parquet")
        evaluations.append(home / "evaluation.json")
        _write_facts(home, run, model, tasks)
    return Project(results, evaluations)


def _write_facts(home: Path, run: str, model: Model, tasks: Sequence[Task]) -> None:
    types = {"generation": "generate_until", "rolling": "loglikelihood_rolling"}
    record = r.Facts(
        run=run,
        model=model.name,
        model_digest=_hash("model", model.name),
        model_facts=r.ModelFacts(
            architecture="LlamaForCausalLM",
            model_type="llama",
            parameters=model.parameters,
            checkpoint_bytes=2 * model.parameters,
            tensors=[],
            linear_parameters=model.parameters // 2,
            checkpoint_dtype="bfloat16",
            layers=30,
            hidden_size=576,
            intermediate_size=1536,
            attention_heads=9,
            kv_heads=3,
            head_dim=64,
            vocab_size=49152,
            max_position_embeddings=8192,
            tied_embeddings=True,
            cache=[],
        ),
        tasks=[
            r.TaskFacts(
                suite=task.suite,
                unit=task.name,
                task=name,
                request_type=types.get(task.kind, "loglikelihood"),  # type: ignore[arg-type]
                documents=task.documents,
                requests=task.documents,
                context_tokens=120 * task.documents,
                continuation_tokens=4 * task.documents,
                generation_tokens=32 * task.documents if task.kind == "generation" else 0,
                longest_request_tokens=2310 if model.cut and task.kind == "generation" else 310,
                lengths={120: task.documents},
                task_hash=_hash("task", name),
            )
            for task in tasks
            for name in (
                [f"{task.name}_{i:02d}" for i in range(task.subtasks)] if task.kind == "group" else [task.name]
            )
        ],
    )
    write_record(home / "facts.json", record)
