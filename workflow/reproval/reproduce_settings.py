"""What made a score on either side: which settings were not the same, the most telling first."""

from __future__ import annotations

from typing import Any

from reproval.collect import ModelData, UnitData, package_version, prompts_cut
from reproval.files import read_record
from reproval.reference import PublishedScore, Reference
from reproval.reproduce_content import Unlike
from reproval.run_file import RunFile

PROMPTS = "task and its prompts"


def settings_of(unit: UnitData, task: str) -> dict[str, Any]:
    """What made a task's scores, the most telling first; what is not known is None."""
    result, engine = unit.result, unit.result.engine
    asked, made = result.made_of.get("settings", {}), result.provenance
    leaves = unit.leaves(task)
    had = made.engine_arguments
    return {
        "model": f"files {engine.get('model', '?')[:12]}",
        "dtype": engine.get("dtype"),
        "quantization": engine.get("quantization"),
        "KV cache dtype": engine.get("kv_cache_dtype"),
        "task version": {leaf: result.versions.get(leaf) for leaf in leaves},
        "few-shot examples": {leaf: result.n_shot.get(leaf) for leaf in leaves},
        "chat template": asked.get("apply_chat_template") or False,
        "thinking": engine.get("enable_thinking"),
        "end of thoughts": engine.get("think_end_token"),
        "chat template arguments": engine.get("chat_template_args"),
        "few-shot as multiturn": asked.get("fewshot_as_multiturn"),
        "system instruction": asked.get("system_instruction"),
        "generation": asked.get("generation"),
        "limit": asked.get("limit"),
        "seed": result.made_of.get("seed"),
        PROMPTS: {leaf: result.task_hashes.get(leaf, "")[:12] for leaf in leaves},
        "prompts cut to fit": prompts_cut(unit, task),
        "longest request": engine.get("max_model_len"),
        "lm-eval": package_version(made.packages, "lm_eval"),
        "vLLM": package_version(made.packages, "vllm"),
        "torch": package_version(made.packages, "torch"),
        "transformers": package_version(made.packages, "transformers"),
        "batch invariant": made.batch_invariant,
        # That one is told as the setting that it is.
        "vLLM's variables": {k: v for k, v in made.engine_variables.items() if k != "VLLM_BATCH_INVARIANT"},
        "container": made.container.digest if made.container else None,
        "environment": engine.get("environment"),
        "GPUs": made.gpus,
        "CPU": made.cpu if not made.gpus else None,
        "tokens in a batch": had.get("scheduler_config.max_num_batched_tokens"),
        "sequences in a batch": had.get("scheduler_config.max_num_seqs"),
        "eager mode": had.get("model_config.enforce_eager"),
        "GPUs for one model": had.get("parallel_config.tensor_parallel_size"),
        "reproval": made.reproval_version,
    }


def published_settings(reference: Reference, score: PublishedScore) -> dict[str, Any]:
    """The same of a published score, as far as its source says; the rest is left out."""
    own = score.made_with
    made = reference.made_with.model_copy(update=own.model_dump(exclude_unset=True) if own else {})
    known = {
        "model": _model_name(reference.models[score.model].hub, reference.models[score.model].revision),
        "dtype": made.dtype,
        "quantization": made.quantization,
        "task version": score.task_version,
        "few-shot examples": score.num_fewshot,
        "chat template": made.chat_template,
        "harness": _with_version(made.harness, made.harness_version),
        "engine": _with_version(made.engine, made.engine_version),
        "hardware": made.hardware,
    }
    return {key: value for key, value in known.items() if value is not None}


def _model_name(hub: str | None, revision: str | None) -> str | None:
    return f"{hub} at {revision}" if hub else None


def _with_version(name: str | None, version: str | None) -> str | None:
    return None if name is None else f"{name} {version}" if version else name


def against_published(reference: Reference, score: PublishedScore, model: ModelData, unit: UnitData) -> list[Unlike]:
    """What differs from a published score in settings, by what both sides know."""
    here = settings_of(unit, score.task)
    run = _run_file(model)
    asked = run.run.model if run else None
    here["model"] = (_model_name(asked.hub, asked.revision) if asked else None) or f"a local folder, {here['model']}"
    here["quantization"] = here["quantization"] or "none"
    for name in ("task version", "few-shot examples"):
        values = set(here[name].values())
        here[name] = values.pop() if len(values) == 1 else sorted(map(str, values))
    here["harness"] = f"lm-eval {here['lm-eval']}"
    here["engine"] = f"vLLM {here['vLLM']}"
    here["hardware"] = ", ".join(here["GPUs"]) or here["CPU"]
    # None stands for all documents, and says something.
    limit = reference.suites[score.suite].setting_of(unit.result.task, "limit")
    found = []
    for name, value in (published_settings(reference, score) | {"limit": limit}).items():
        ours = here.get(name)
        if name in ("task version", "limit"):
            same = _number(value) == _number(ours)
        elif name in ("harness", "engine"):
            same = _meets(str(ours), value)
        elif name == "chat template":
            # The source says whether there was one, and not which.
            same = value == bool(ours)
        else:
            same = value == ours
        if not same:
            found.append(Unlike(what=name, reference=_shown(value), here=_shown(ours)))
    return found


def _meets(ours: str, said: str) -> bool:
    """Whether a name with its version is what a source says: the same, the name alone, or less of the version."""
    return f"{ours} ".casefold().startswith(tuple(f"{said}{end}".casefold() for end in " .+"))


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _run_file(model: ModelData) -> RunFile | None:
    path = model.folder / "run.json"
    return read_record(path, RunFile) if path.exists() else None


def between_runs(a: UnitData, b: UnitData, task: str) -> list[Unlike]:
    """What differs between two runs' settings of a task, the most telling first."""
    theirs, ours = settings_of(a, task), settings_of(b, task)
    found = []
    for name, value in theirs.items():
        other = ours[name]
        if value == other:
            continue
        if isinstance(value, dict) or isinstance(other, dict):
            value, other = value or {}, other or {}
            key = next((key for key in {**value, **other} if value.get(key) != other.get(key)), None)
            if key is None:
                continue
            value, other, name = value.get(key), other.get(key), name if key == task else f"{name}: {key}"
        found.append(Unlike(what=name, reference=_shown(value), here=_shown(other)))
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
