"""The child of `evaluate`: starts the engine once, runs lm-eval on every unit, keeps each result as soon as it is done.

It is told what to do by a file (ChildTask) and reports by events, one JSON object a line, to the file descriptor in
REPROVAL_EVENTS_FD. It decides nothing about memory: when it fails, its supervisor reads why and starts another.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from reproval import keep, loading, provenance
from reproval.files import atomic, read_record, sha256_bytes, sha256_file, sha256_json, write_record
from reproval.records import (
    EngineSettings,
    Part,
    Provenance,
    PulledLever,
    Record,
    Score,
    ScoringPath,
    ShardAnswers,
    ShardUnit,
    UnitResult,
)
from reproval.run_file import RunFile
from reproval.seeds import seeds
from reproval.settings import Unit
from reproval.shards import assign, request_name, write_answers
from reproval.tasks import all_requests, allow_code, chat_arguments, manager, named_template

Emit = Callable[..., None]

ANSWERED = "answered.json"
"""Beside the file that tells the child what to do: what it did as a shard (ShardAnswers)."""


class ChildUnit(Part):
    unit: Unit
    key: str
    made_of: dict[str, Any]
    folder: str
    tokens: int = Field(description="The unit's share of the work, for progress.")


class ShardTask(Part):
    """Which part of every unit to answer, and where the answers go."""

    shard: int = Field(description="1, 2, ... of `shards`.")
    shards: int
    answers: str


class ChildTask(Record):
    """What one start of the engine is to do."""

    run: RunFile
    settings: EngineSettings
    model_folder: str
    request_cache: str
    score_levers: list[PulledLever]
    units: list[ChildUnit]
    kept_tokens: int
    shard: ShardTask | None = None


def event_stream() -> Emit:
    """A function that writes an event to the supervisor, or nowhere when started by hand."""
    number = os.environ.get("REPROVAL_EVENTS_FD")
    if number is None:
        return lambda event, **fields: None
    stream = os.fdopen(int(number), "w", encoding="utf-8", buffering=1)

    def emit(event: str, **fields: Any) -> None:
        stream.write(json.dumps({"event": event, **fields}) + "\n")

    return emit


def environment(run: RunFile) -> dict[str, str]:
    """Variables that the engine reads at import, so that its supervisor has to set them."""
    chosen = {
        # One process: the order of requests, and with it every batch, is the same from run to run.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # With one thread, tokenizing takes longer than scoring. Nothing is forked after it.
        "TOKENIZERS_PARALLELISM": "true",
        # NVML's order, by which GPUs are claimed and measured. CUDA's own is by speed.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    if run.batch_invariant:
        chosen["VLLM_BATCH_INVARIANT"] = "1"
    if not run.hardware.gpus:
        # vLLM compiles a few small functions even in eager mode: on a CPU that needs a C++ compiler, and takes longer
        # than it can save.
        chosen["TORCH_COMPILE_DISABLE"] = "1"
    return chosen


def settings_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of vLLM's LLM() for these settings; what they leave open is left out."""
    asked = settings.model_dump(exclude={"submit_batch"})
    for name in ("gpu_memory_utilization", "kv_cache_memory_bytes"):
        if asked[name] is None:
            del asked[name]
    return asked


def engine_arguments(task: ChildTask) -> dict[str, Any]:
    """What lm-eval's model class passes on to LLM()."""
    model = {
        "pretrained": task.model_folder,
        "trust_remote_code": task.run.run.model.trust_remote_code,
        # Of a model that also takes images or sound neither towers nor processors; it means nothing to any other.
        "language_model_only": True,
        **task.run.run.model.thinking,
    }
    # Several nodes: a Ray cluster that is up, named as Ray's own programs find it. vLLM would not look for it.
    ray = {"distributed_executor_backend": "ray"} if os.environ.get("RAY_ADDRESS") else {}
    return model | settings_arguments(task.settings) | ray | loading.arguments(Path(task.model_folder))


def resolved_arguments(config: Any) -> dict[str, Any]:
    """What the engine made of its arguments: scalars of a VllmConfig by their names there."""
    wanted = {
        "model_config": ("dtype", "max_model_len", "quantization", "seed", "enforce_eager", "trust_remote_code"),
        "cache_config": (
            "block_size",
            "cache_dtype",
            "enable_prefix_caching",
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
            "num_gpu_blocks",
        ),
        "scheduler_config": ("max_num_batched_tokens", "max_num_seqs", "enable_chunked_prefill", "async_scheduling"),
        "parallel_config": ("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend"),
        "load_config": ("load_format", "safetensors_load_strategy"),
        "device_config": ("device_type",),
    }
    found: dict[str, Any] = {}
    for section, names in wanted.items():
        for name in names:
            value = getattr(getattr(config, section, None), name, None)
            found[f"{section}.{name}"] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
    return found


def scores_of(results: dict[str, Any]) -> list[Score]:
    """Every number of lm-eval's results as a Score, in lm-eval's order, groups included."""
    groups = set(results.get("groups") or {})
    scores = []
    for task, values in results["results"].items():
        sizes = (results.get("n-samples") or {}).get(task) or {}
        better = (results.get("higher_is_better") or {}).get(task) or {}
        for name, value in values.items():
            metric, comma, filter_name = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            if not isinstance(value, (int, float)):
                print(f"{task}: {name} is no number, so it is in lm-eval's results and no score", file=sys.stderr)
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None,
                    n=sizes.get("effective") or values.get("sample_len"),
                    higher_is_better=better.get(metric),
                    group=task in groups,
                )
            )
    return scores


def write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """One line a sample with its task, gzip; the same samples make the same bytes."""
    from lm_eval.utils import handle_non_serializable

    with atomic(path, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream:
        for task, rows in samples.items():
            for row in sorted(rows, key=lambda row: (row["doc_id"], row["filter"])):
                line = json.dumps({"task": task, **row}, default=handle_non_serializable, ensure_ascii=False)
                stream.write(line.encode("utf-8") + b"\n")


def scored_by_lm_eval(model: Any, unit: Unit, run: RunFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run one unit through lm-eval: its results as JSON holds them, and its samples."""
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    settings = unit.settings
    allow_code(unit)
    with named_template(model, unit):
        results = simple_evaluate(
            model=model,
            tasks=[unit.task],
            task_manager=manager(unit.include_path),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            gen_kwargs=dict(settings.generation) if settings.generation else None,
            confirm_run_unsafe_code=unit.unsafe_code,
            log_samples=True,
            **chat_arguments(settings),
            **seeds(run.seed),
        )
    assert results is not None
    samples = results.pop("samples")
    # Of lm-eval's own environment dump only what is not the machine's business stays.
    for private in ("pretty_env_info", "upper_git_hash", "git_hash", "config"):
        results.pop(private, None)
    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    if settings.apply_chat_template and (template := model.chat_template(settings.apply_chat_template)):
        # As lm-eval's own tracker names it, which is not asked here.
        plain["chat_template_sha"] = sha256_bytes(template.encode())
    return plain, samples


def keep_unit(
    entry: ChildUnit,
    model: str,
    results: dict[str, Any],
    samples: dict[str, Any],
    *,
    paths: dict[str, ScoringPath],
    score_levers: list[PulledLever],
    begin: str,
    duration_s: float,
    provenance: Provenance,
    shards: list[Provenance] | None = None,
) -> None:
    """Keep what lm-eval made of one unit under its key."""
    with keep.new_folder(Path(entry.folder)) as part:
        write_samples(part / keep.SAMPLES, samples)
        write_record(
            part / keep.RESULT,
            UnitResult(
                key=entry.key,
                made_of=entry.made_of,
                model=model,
                suite=entry.unit.suite,
                task=entry.unit.task,
                scores=scores_of(results),
                versions=results["versions"],
                n_shot=results["n-shot"],
                paths=paths,
                group_subtasks={name: list(tasks) for name, tasks in results.get("group_subtasks", {}).items()},
                task_hashes=entry.made_of["tasks"],
                score_levers=score_levers,
                begin=begin,
                duration_s=duration_s,
                provenance=provenance,
                shards=shards or [],
                samples_sha256=sha256_file(part / keep.SAMPLES),
                lm_eval=results,
            ),
        )


def evaluate_unit(model: Any, entry: ChildUnit, task: ChildTask, made_with: Provenance) -> None:
    """Run one unit through lm-eval and keep its result under its key."""
    begin, clock = now(), time.monotonic()
    model.reset_paths()
    results, samples = scored_by_lm_eval(model, entry.unit, task.run)
    keep_unit(
        entry,
        task.run.run.model_name,
        results,
        samples,
        paths=dict(model.paths),
        score_levers=task.score_levers,
        begin=begin,
        duration_s=time.monotonic() - clock,
        provenance=made_with,
    )


def answer_unit(model: Any, entry: ChildUnit, run: RunFile, shard: ShardTask) -> tuple[ShardUnit, dict[str, list[Any]]]:
    """Answer this shard's requests of one unit; the answers by the names of the requests."""
    begin, clock = now(), time.monotonic()
    model.reset_paths()
    answers: dict[str, list[Any]] = {}
    for kind, requests in all_requests(entry.unit, run.seed, model).items():
        places = assign(kind, [request.args for request in requests], shard.shards)
        mine = [request for request, place in zip(requests, places, strict=True) if place == shard.shard - 1]
        for request, answer in zip(mine, getattr(model, kind)(mine), strict=True):
            answers.setdefault(request_name(kind, request.args), []).append(answer)
    unit = ShardUnit(
        suite=entry.unit.suite,
        task=entry.unit.task,
        key=entry.key,
        paths=dict(model.paths),
        begin=begin,
        duration_s=time.monotonic() - clock,
    )
    return unit, answers


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def run(task: ChildTask, folder: Path, emit: Emit) -> None:
    """Start the engine and evaluate every unit. Whatever it raises ends the child with a traceback in its log."""
    from reproval.scoring import ReprovalVLLM

    total = task.kept_tokens + sum(entry.tokens for entry in task.units)
    finished = task.kept_tokens
    tokens = 0

    def on_progress(done: int, of: int) -> None:
        emit("progress", done=finished + tokens * done / max(of, 1), total=total)

    model = ReprovalVLLM(
        **engine_arguments(task),
        submit_batch=task.settings.submit_batch,
        request_cache=Path(task.request_cache),
        cache_key=sha256_json(task.units[0].made_of["engine"]),
        on_progress=on_progress,
    )
    arguments = resolved_arguments(model.model.llm_engine.vllm_config)
    emit("engine", arguments=arguments)
    made_with = provenance.collect(task.run.container, seeds(task.run.seed), task.run.batch_invariant, arguments)
    answered: list[tuple[ShardUnit, dict[str, list[Any]]]] = []
    for entry in task.units:
        tokens = entry.tokens
        emit("unit_started", unit=entry.unit.name)
        if task.shard:
            answered.append(answer_unit(model, entry, task.run, task.shard))
        else:
            evaluate_unit(model, entry, task, made_with)
        finished += tokens
        emit("progress", done=finished, total=total)
        emit("unit_done", unit=entry.unit.name)
    if model.request_cache is not None:
        model.request_cache.close()
    if task.shard:
        write_answers(Path(task.shard.answers), {unit.key: answers for unit, answers in answered})
        record = ShardAnswers(units=[unit for unit, _ in answered], provenance=made_with)
        write_record(folder / ANSWERED, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Path, help="a ChildTask record")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    emit = event_stream()
    try:
        run(read_record(options.task, ChildTask), options.task.parent, emit)
    except BaseException as error:
        # First, since writing to the log may fail as well, and its supervisor then still ends this process.
        emit("failed", message=f"{type(error).__name__}: {error}".splitlines()[0])
        traceback.print_exc()
        leave(1)
    emit("done")
    leave(0)


def leave(code: int) -> NoReturn:
    """End at once. What is finished is on disk, and an engine's own shutdown may wait for ever with the GPU held."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
