"""Records of Every Eval Ever, schema 0.3.0 (https://github.com/evaleval/every_eval_ever): what others publish and join.

One record for each unit of each run, as data/COLLECTION/DEVELOPER/MODEL/UUID.json, the layout of its data store; the
collection is the task, group or tag. The same results make the same bytes: times are those of the evaluation, and the
UUID is made of the result's key.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from reproval.collect import (
    ModelData,
    UnitData,
    answers_ended_by_length,
    engine_settings,
    finite,
    is_mean,
    package_version,
    prompts_cut,
    score_interval,
    task_settings,
    thinking,
)
from reproval.files import sha256_file, sha256_json
from reproval.keep import SAMPLES
from reproval.manifests import Manifests
from reproval.records import Score
from reproval.scrub import scrub

SCHEMA_VERSION = "0.3.0"
RELATIONSHIPS = ("first_party", "third_party", "collaborative", "other")
# lm-eval's names for what its schema has a field for.
GENERATION = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_gen_toks": "max_tokens"}


@dataclass(frozen=True)
class Source:
    """Who evaluated."""

    organization: str
    url: str | None
    relationship: str


@cache
def metrics() -> dict[str, dict[str, Any]]:
    """metrics.yaml."""
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("metrics.yaml").read_text("utf-8"))
    return loaded


def strings(values: dict[str, Any]) -> dict[str, str]:
    """Details as the schema has them, text by name; what is not known is left out."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in values.items()
        if value is not None
    }


def model_id(model: ModelData, manifests: Manifests) -> str:
    """The Hub's id, or local/NAME for a folder."""
    manifest = manifests.models.get(model.evaluation.model)
    return manifest.hub_id if manifest and manifest.hub_id else f"local/{model.evaluation.model}"


def place(unit: UnitData, identity: str) -> str:
    """data/COLLECTION/DEVELOPER/MODEL/UUID without the extension."""
    developer, _, name = identity.partition("/")
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "_", part).rstrip(".") for part in (unit.result.task, developer, name)]
    raw = bytes.fromhex(sha256_json([unit.result.key, unit.result.begin])[:32])
    return "/".join(["data", *parts, str(uuid.UUID(bytes=raw, version=4))])


def _epoch(begin: str, after_s: float = 0.0) -> str:
    return str(int(datetime.fromisoformat(begin).timestamp() + after_s))


# --- one record ------------------------------------------------------------------------------------------------------


def record(model: ModelData, unit: UnitData, manifests: Manifests, source: Source) -> dict[str, Any]:
    """One unit of one run as an evaluation log, without its samples."""
    result, made = unit.result, unit.result.provenance
    identity = model_id(model, manifests)
    scores = [score for score in result.scores if math.isfinite(score.value)]
    left_out = [f"{s.task} {s.metric}" for s in result.scores if not math.isfinite(s.value)]
    box = made.container
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{result.task}/{identity}/{_epoch(result.begin)}_{result.key[:12]}",
        "evaluation_timestamp": _epoch(result.begin),
        "retrieved_timestamp": _epoch(result.begin, result.duration_s),
        "source_metadata": {
            "source_name": "reproval",
            "source_type": "evaluation_run",
            "source_organization_name": source.organization,
            **({"source_organization_url": source.url} if source.url else {}),
            "evaluator_relationship": source.relationship,
            "additional_details": strings(
                {
                    "reproval_version": made.reproval_version,
                    "git_commit": made.git_commit,
                    "git_dirty": made.git_dirty,
                    "run": model.evaluation.run,
                    "repeat": model.repeat or None,
                    "result_key": result.key,
                    "not_finite": left_out or None,
                }
            ),
        },
        "eval_library": {
            "name": "lm_eval",
            "version": package_version(made.packages, "lm_eval") or "unknown",
            "additional_details": strings(
                {
                    "lock": made.lock,
                    "container_digest": box.digest if box else None,
                    "sif_sha256": box.sif_sha256 if box else None,
                    "packages": made.packages,
                    "python": made.python,
                    "seeds": made.seeds,
                    "batch_invariant": made.batch_invariant,
                    "engine_variables": made.engine_variables or None,
                    "gpus": made.gpus or None,
                    "cpu": made.cpu,
                    "driver": made.driver,
                    "cuda": made.cuda,
                }
            ),
        },
        "model_info": _model_info(model, unit, manifests, identity),
        "evaluation_results": [_result(unit, score, manifests) for score in scores],
    }


def _model_info(model: ModelData, unit: UnitData, manifests: Manifests, identity: str) -> dict[str, Any]:
    manifest = manifests.models.get(model.evaluation.model)
    made = unit.result.provenance
    settings = engine_settings(unit, model.evaluation)
    return {
        "name": model.evaluation.model,
        "id": identity,
        "developer": identity.partition("/")[0],
        "inference_platform": "local",
        "inference_engine": {"name": "vllm", "version": package_version(made.packages, "vllm") or "unknown"},
        "additional_details": {
            "deployment_type": "self_deployed",
            "model_availability": "open_weights" if manifest and manifest.hub_id else "unknown",
            **strings(
                {
                    "revision": manifest.revision if manifest else None,
                    "files_sha256": unit.result.engine.get("model"),
                    "parameters": model.evaluation.plan.parameters,
                    **settings,
                    **thinking(unit),
                    "trust_remote_code": unit.result.engine.get("trust_remote_code"),
                    "score_changing_levers": [f"{v.lever}: {v.before} -> {v.after}" for v in unit.result.score_levers]
                    or None,
                }
            ),
        },
    }


def result_id(score: Score) -> str:
    return f"{score.task}:{score.metric}:{score.filter}"


def _result(unit: UnitData, score: Score, manifests: Manifests) -> dict[str, Any]:
    result = unit.result
    known = metrics().get(score.metric, {})
    low, high = known.get("range", (None, None))
    bounded = low is not None and high is not None and low <= score.value <= high
    unit_name = known.get("unit") or ("proportion" if [low, high] == [0, 1] else None)
    metric: dict[str, Any] = {
        "evaluation_description": score.metric + ("" if score.filter == "none" else f", filter {score.filter}"),
        "metric_id": known.get("id", f"lm-evaluation-harness.{score.metric}"),
        "metric_name": score.metric,
        "lower_is_better": score.higher_is_better is False,
        **({"metric_kind": known["kind"]} if "kind" in known else {}),
        **({"metric_unit": unit_name} if unit_name else {}),
        "additional_details": strings(
            {
                "filter": score.filter,
                "polarity": "unknown" if score.higher_is_better is None else None,
                "bounds_status": None if bounded else "unknown",
            }
        ),
    }
    if bounded:
        metric |= {"score_type": "continuous", "min_score": _bound(low), "max_score": _bound(high)}
    return {
        "evaluation_result_id": result_id(score),
        "evaluation_name": score.task if score.filter == "none" else f"{score.task}/{score.filter}",
        "source_data": _source_data(unit, score.task, manifests),
        "evaluation_timestamp": _epoch(result.begin),
        "metric_config": metric,
        "score_details": {
            "score": score.value,
            "uncertainty": _uncertainty(unit, score),
            "details": strings(
                {
                    "suite": result.suite,
                    "group": score.group,
                    "subtasks": result.group_subtasks.get(score.task),
                    "task_version": result.versions.get(score.task),
                    "task_hash": result.task_hashes.get(score.task),
                    "prompts_cut": prompts_cut(unit, score.task),
                    "answers_ended_by_length": answers_ended_by_length(unit, score.task),
                }
            ),
        },
        "generation_config": _generation(unit, score.task),
    }


def _bound(value: float) -> float | str:
    return "Infinity" if value == math.inf else value


def _uncertainty(unit: UnitData, score: Score) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if score.stderr is not None and math.isfinite(score.stderr):
        samples = unit.samples.get((score.task, score.filter))
        values = samples.values.get(score.metric) if samples else None
        mean = values is not None and is_mean(score, finite(values))
        how = "from those of the subtasks" if score.group else "analytic" if mean else "bootstrap"
        found["standard_error"] = {"value": score.stderr, "method": how}
    interval = score_interval(score, unit)
    if interval and math.isfinite(interval.low) and math.isfinite(interval.high):
        found["confidence_interval"] = {
            "lower": interval.low, "upper": interval.high, "confidence_level": 0.95, "method": interval.method,
        }  # fmt: skip
    if score.n is not None:
        found["num_samples"] = score.n
    return found


def _source_data(unit: UnitData, task: str, manifests: Manifests) -> dict[str, Any]:
    """Where the questions come from; of a group, what its tasks have in common."""
    leaves = unit.leaves(task)
    sources = [manifests.datasets.get((unit.result.suite, leaf)) for leaf in leaves]
    configs = [unit.result.lm_eval.get("configs", {}).get(leaf, {}) for leaf in leaves]
    repositories = {s.path for s in sources if s and s.path} or {
        str(p) for c in configs if (p := c.get("dataset_path"))
    }
    details = strings(
        {
            "configuration": sorted({s.name for s in sources if s and s.name}) or None,
            "revision": sorted({s.revision for s in sources if s and s.revision}) or None,
            "task_hashes": {leaf: unit.result.task_hashes.get(leaf) for leaf in leaves},
        }
    )
    named: dict[str, Any] = {"dataset_name": task, "additional_details": details}
    if len(repositories) != 1 or not re.fullmatch(r"[\w.-]+/[\w.-]+", next(iter(repositories))):
        return named | {"source_type": "other"}
    splits = {c.get("test_split") or c.get("validation_split") for c in configs} - {None}
    found: dict[str, Any] = {"source_type": "hf_dataset", "hf_repo": repositories.pop()}
    if len(splits) == 1:
        found["hf_split"] = splits.pop()
    if len(leaves) == 1 and (size := unit.result.lm_eval.get("n-samples", {}).get(task, {}).get("original")):
        found["samples_number"] = size
    return named | found


def _generation(unit: UnitData, task: str) -> dict[str, Any]:
    given = unit.result.lm_eval.get("configs", {}).get(task, {}).get("generation_kwargs") or {}
    arguments = {field: given[name] for name, field in GENERATION.items() if given.get(name) is not None}
    others = {name: value for name, value in given.items() if name not in GENERATION}
    details = strings({**others, **task_settings(unit), "num_fewshot": unit.result.n_shot.get(task)})
    return {"generation_args": arguments, "additional_details": details}


# --- samples ----------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _choices(line: dict[str, Any]) -> list[str] | None:
    """The continuations of a multiple-choice question: several requests with one context."""
    arguments = line["arguments"]
    if len(arguments) < 2 or any(len(a) < 2 or not isinstance(a[1], str) for a in arguments):
        return None
    return [a[1] for a in arguments]


def _answer(line: dict[str, Any], choices: list[str] | None) -> tuple[list[str], str, str]:
    """What the model said, the answer taken from it, and how."""
    filtered = line["filtered_resps"]
    if choices:
        likelihoods = [response[0] for response in filtered[: len(choices)]]
        chosen = choices[max(range(len(likelihoods)), key=likelihoods.__getitem__)]
        return [chosen], chosen, "highest log-likelihood"
    said = [_text(response) for responses in line["resps"] for response in responses]
    taken = _text(filtered[0] if filtered else "")
    return said or [""], taken, "none" if line["filter"] == "none" else line["filter"]


def _references(line: dict[str, Any], prompt: str, choices: list[str] | None) -> list[str]:
    target = line.get("target")
    if target == prompt:  # the text of a perplexity is no answer to itself
        return []
    targets = target if isinstance(target, list) else [target]
    return [
        choices[t] if choices and isinstance(t, int) and not isinstance(t, bool) and 0 <= t < len(choices) else _text(t)
        for t in targets
        if t not in (None, "")
    ]


def _value(value: Any, metric: str) -> float | None:
    """A document's own score: (log-likelihood, weight) pairs become the document's perplexity or bits."""
    if isinstance(value, bool | int | float):
        found = float(value)
    elif isinstance(value, list) and len(value) == 2 and value[1]:
        rate = -value[0] / value[1]
        found = rate / math.log(2) if metric == "bits_per_byte" else math.exp(min(rate, 700))
    else:
        return None
    return found if math.isfinite(found) else None


def samples(lines: Iterator[dict[str, Any]], log: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each question and each result that it counts for; `lines` are those of samples.jsonl.gz."""
    results = {result["evaluation_result_id"]: result for result in log["evaluation_results"]}
    for line in lines:
        choices = _choices(line)
        said, taken, how = _answer(line, choices)
        prompt = _text(line["arguments"][0][0])
        reference = _references(line, prompt, choices)
        joined = json.dumps({"raw": prompt, "reference": reference}, sort_keys=True, separators=(",", ":"))
        for metric in line["metrics"]:
            identity = f"{line['task']}:{metric}:{line['filter']}"
            value = _value(line.get(metric), metric)
            if identity not in results or value is None:
                continue
            yield {
                "schema_version": SCHEMA_VERSION,
                "evaluation_id": log["evaluation_id"],
                "model_id": log["model_info"]["id"],
                "evaluation_name": results[identity]["evaluation_name"],
                "evaluation_result_id": identity,
                "sample_id": str(line["doc_id"]),
                "sample_hash": hashlib.sha256(joined.encode()).hexdigest(),
                "interaction_type": "single_turn",
                "input": {"raw": prompt, "reference": reference, **({"choices": choices} if choices else {})},
                "output": {"raw": said},
                "answer_attribution": [
                    {
                        "turn_idx": 0,
                        "source": "output.raw",
                        "extracted_value": taken,
                        "extraction_method": how,
                        "is_terminal": True,
                    }
                ],
                "evaluation": {"score": value, "is_correct": value == 1.0},
                "metadata": {name: line[name] for name in ("doc_hash", "prompt_hash", "target_hash") if name in line},
            }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


# --- writing ----------------------------------------------------------------------------------------------------------


def write(
    folder: Path, models: list[ModelData], manifests: Manifests, source: Source, project: Path, results: Path | None
) -> None:
    """Write data/... below `folder`; with the results folder, every question too. Raises OSError."""
    for model in models:
        for unit in model.units:
            log, _ = scrub(record(model, unit, manifests, source), project)
            name = place(unit, log["model_info"]["id"])
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if results is not None:
                path, rows = folder / f"{name}_samples.jsonl", 0
                with path.open("w", encoding="utf-8") as stream:
                    for row in samples(_lines(results / unit.reference.folder / SAMPLES), log):
                        stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                        rows += 1
                if rows:
                    log["detailed_evaluation_results"] = {
                        "format": "jsonl",
                        "file_path": f"{name}_samples.jsonl",
                        "hash_algorithm": "sha256",
                        "checksum": sha256_file(path),
                        "total_rows": rows,
                    }
                else:
                    path.unlink()
            text = json.dumps(log, indent=1, ensure_ascii=False, allow_nan=False)
            (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
