"""From configuration files to runs: read, check, and say what is wrong so that it can be mended.

By hand:

    python -m reproval.config check config/config.yaml     the same checks that Snakemake's start makes
    python -m reproval.config schema                       the JSON Schema that is workflow/schemas/config.schema.yaml
    python -m reproval.config keys                         the tables of config/README.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from reproval import checks
from reproval.config_schema import (
    WORDS,
    branches,
    choices_of,
    describe,
    fits,
    keys_of,
    keys_text,
    required_of,
    schema,
    schema_at,
    schema_text,
)
from reproval.files import sha256_json
from reproval.folders import model_digest, resolve, tree_digest
from reproval.problems import (
    ABSENT,
    ConfigError,
    Problem,
    Report,
    dotted,
    listing,
    lookup,
    nearest,
    show,
)
from reproval.settings import (
    Config,
    ExportConfig,
    Generation,
    ModelConfig,
    Run,
    SuiteConfig,
    TaskEntry,
    TaskSettings,
    Unit,
)
from reproval.strictyaml import Document, KeyPath, YamlError, read

__all__ = ["ConfigError", "load", "merge", "resolve", "runs", "schema"]

BASE = Path(__file__).resolve().parents[2]

# What people write who know lm-eval, vLLM or transformers by other names.
ELSEWHERE = {
    **dict.fromkeys(
        (
            "tensor_parallel_size",
            "gpu_memory_utilization",
            "enforce_eager",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_dtype",
            "batch_size",
            "data_parallel_size",
        ),
        "delete it: the plan decides it, by the policy in tiers.yaml",
    ),
    **dict.fromkeys(("max_new_tokens", "max_tokens", "max_completion_tokens"), "write max_gen_toks"),
    **dict.fromkeys(("stop", "stop_sequences", "stop_strings"), "write until"),
    **dict.fromkeys(("pretrained", "model_id", "repo", "repo_id"), "write hub for a Hub id, path for a local folder"),
    **dict.fromkeys(("gen_kwargs", "generation_kwargs"), "write generation"),
    "model_args": "delete it: path or hub of models.NAME says which model, and the plan decides how the engine runs",
    **dict.fromkeys(("log_samples", "write_out"), "delete it: the samples of every task are kept"),
    "predict_only": "delete it: answers are kept in the samples of every task, beside their scores",
    **dict.fromkeys(("use_cache", "cache_requests"), "delete it: finished requests are kept by themselves"),
    "confirm_run_unsafe_code": "write unsafe_code",
    "tokenizer": "delete it: the tokenizer is that of the model's folder; a folder of links can join the two",
    **dict.fromkeys(
        ("peft", "lora", "adapter", "lora_local_path", "delta"),
        "delete it, and merge the adapter: peft's model.merge_and_unload().save_pretrained(FOLDER)",
    ),
    **dict.fromkeys(("token", "hf_token", "HF_TOKEN"), "delete it, and set HF_TOKEN in the environment"),
    **dict.fromkeys(
        ("results", "output", "output_path", "output_dir"),
        "delete it: results go to the folder results; snakemake --directory moves them all",
    ),
}

NAME_WORDS = "a name of a-z, A-Z, digits and . _ -, which begins with a letter or digit and has at most 64 characters"


def load(merged: dict[str, Any], files: list[Path], base: Path, workdir: Path) -> Config:
    """Check a configuration and return it.

    `merged` is Snakemake's configuration, `files` the configfiles that it comes from, the last of which wins;
    what they do not give came by `--config`. `base` is the workflow's folder. Raises ConfigError with everything
    that is wrong, and nothing else.
    """
    report = Report(_plain(merged), [])
    readable = True
    for number, file in enumerate(files):
        try:
            document, unreadable = read(workdir / file), None
        except OSError as error:
            mend = "correct the name (relative to the working directory)"
            document, unreadable = Document({}), YamlError(None, str(error.strerror), mend)
        except YamlError as error:
            document, unreadable = Document({}), error
        report.documents.append((_display(file, workdir), document))
        if unreadable is None and not isinstance(document.data, Mapping):
            unreadable = YamlError(1, show(document.data), "write `key: value` lines at the top level")
            report.documents[-1] = (_display(file, workdir), Document({}))
        if unreadable is not None:
            readable = False
            report.add_at(
                number,
                unreadable.line,
                (),
                found=unreadable.found,
                expected="YAML with the keys of a configuration",
                mend=unreadable.mend,
            )
        for duplicate in document.duplicates:
            first, second = duplicate.lines
            report.add_at(
                number,
                second,
                duplicate.path,
                found=f"the key for the second time (first: line {first})",
                expected="each key once: YAML takes the last and drops the first without a word",
                mend="delete one of them, or join what is below them",
            )
    if readable:
        _read_command_line(report)
        checks.secrets(report)
        _shape(report)
        checks.check(report, base, workdir)
    if problems := report.problems():
        raise ConfigError(problems)
    return Config.model_validate(report.merged, strict=True)


def merge(into: dict[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one configuration over another as Snakemake does: mappings key by key, everything else as a whole."""
    result = dict(into)
    for key, value in overlay.items():
        below = result.get(key)
        if isinstance(value, Mapping):
            value = merge(below if isinstance(below, dict) else {}, value)
        result[key] = value
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _display(file: Path, workdir: Path) -> str:
    path = workdir / file
    return str(path.relative_to(workdir)) if path.is_relative_to(workdir) else str(file)


def _read_command_line(report: Report) -> None:
    """Give the values of `--config KEY={...}` their types: inside braces Snakemake leaves everything text."""
    for path, kind in _all_violations(report.merged).items():
        value = lookup(report.merged, path)
        if kind == "value" and isinstance(value, str) and report.from_command_line(path):
            lookup(report.merged, path[:-1])[path[-1]] = _reading(value)


def _reading(text: str) -> Any:
    """What YAML makes of a text without quotes, or numbers such as 1e-3 that YAML 1.1 takes for text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return text
    return value


# --- keys and types -------------------------------------------------------------------------------------------------


def _violations(model: type[BaseModel], data: Any, at: KeyPath) -> dict[KeyPath, str]:
    """Where `data` breaks the types of `model`, and how: unknown, missing, name, or value."""
    try:
        model.model_validate(data, strict=True)
    except ValidationError as error:
        found: dict[KeyPath, str] = {}
        # Of a union every branch complains. Those that took the value apart know more than those that did not.
        whole: set[KeyPath] = set()
        for entry in error.errors(include_url=False, include_input=False, include_context=False):
            path, kind, in_union = _locate(entry["loc"], entry["type"], data)
            found.setdefault((*at, *path), kind)
            if in_union:
                whole.add((*at, *path))
        taken_apart = {path[:length] for path in found for length in range(len(path))}
        return {path: kind for path, kind in found.items() if path not in whole & taken_apart}
    return {}


def _all_violations(merged: dict[Any, Any]) -> dict[KeyPath, str]:
    found = _violations(Config, merged, ())
    for path in _generations(merged):
        found = {other: kind for other, kind in found.items() if other[: len(path)] != path}
        found |= _violations(Generation, lookup(merged, path), path)
    return found


def _locate(location: tuple[int | str, ...], error: str, data: Any) -> tuple[KeyPath, str, bool]:
    """The path of the data in pydantic's location, which also names the branches of unions."""
    path: list[Any] = []
    in_union = False
    for part in location:
        if part == "[key]":
            return tuple(path), "name", False
        # Pydantic gives the key False (YAML's `no`) as 0, and 2.5 or a date as Python writes it.
        keys = list(data) if isinstance(data, Mapping) else []
        key = next((key for key in keys if key == part), next((key for key in keys if repr(key) == part), part))
        inner = lookup(data, (key,))
        if inner is not ABSENT:
            path.append(key)
            data = inner
        elif error == "missing" and part == location[-1]:
            path.append(part)
        else:
            in_union = True
    kinds = {"extra_forbidden": "unknown", "missing": "missing", "invalid_key": "name"}
    return tuple(path), kinds.get(error, "value"), in_union


def _shape(report: Report) -> None:
    """Add unknown keys, missing keys and wrong types to the report, and mark them as faults."""
    found = _all_violations(report.merged)
    # A misspelled key explains the key that is missing, so it comes first.
    order = ["unknown", "name", "value", "missing"]
    for path, kind in sorted(found.items(), key=lambda item: order.index(item[1])):
        if kind == "unknown":
            _unknown(report, path)
        elif kind == "missing":
            report.add(
                path,
                found="nothing",
                expected=describe(schema_at(path)),
                mend=f"add {path[-1]}:",
                reads=[path],
                fault=True,
            )
        elif kind == "name":
            _name(report, path)
        else:
            value = lookup(report.merged, path)
            expected = WORDS.get(str(path[-1])) or describe(schema_at(path))
            report.add(
                path,
                found=show(value),
                expected=expected,
                mend=_mend(path, value, expected, report.written(path)),
                reads=[path],
                fault=True,
            )


def _generations(merged: Mapping[Any, Any]) -> Iterator[KeyPath]:
    """Paths of the mappings that `Generation` describes; in Config they are plain dictionaries."""
    suites = merged.get("suites")
    for name, suite in suites.items() if isinstance(suites, Mapping) else []:
        if not isinstance(suite, Mapping):
            continue
        if isinstance(suite.get("generation"), Mapping):
            yield ("suites", name, "generation")
        tasks = suite.get("tasks")
        for index, entry in enumerate(tasks if isinstance(tasks, list) else []):
            if isinstance(entry, Mapping) and isinstance(entry.get("generation"), Mapping):
                yield ("suites", name, "tasks", index, "generation")


def _unknown(report: Report, path: KeyPath) -> None:
    key, parent = str(path[-1]), path[:-1]
    keys = keys_of(schema_at(parent))
    near = nearest(key, keys)
    home = _home(key)
    if key in ELSEWHERE:
        mend = ELSEWHERE[key]
    elif near:
        mend = f"write {near}"
    elif home is not None:
        mend = f"move it to {home}, where {key} belongs"
    else:
        mend = "delete it"
    where = dotted(parent) or "the top level"
    report.add(
        path,
        found=f"{key}, unknown here",
        expected=f"a key of {where}: {listing(keys, 30)}",
        mend=mend,
        reads=[path],
        fault=True,
    )
    if near and lookup(report.merged, (*parent, near)) is ABSENT:
        report.faults.add((*parent, near))


def _home(key: str) -> str | None:
    """The section that a key belongs to, if it is the key of one."""
    sections: list[tuple[str, type[BaseModel]]] = [
        ("the top level", Config),
        ("models.NAME", ModelConfig),
        ("suites.NAME", SuiteConfig),
        ("hardware", Config.model_fields["hardware"].default.__class__),
        ("suites.NAME.generation", Generation),
        ("export", ExportConfig),
    ]
    return next((name for name, model in sections if key in model.model_fields), None)


def _name(report: Report, path: KeyPath) -> None:
    name = path[-1]
    if not isinstance(name, str):
        mend = "put the name in quotes" if len(path) > 1 else "delete it"
    else:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:64]
        mend = f"write {plain}" if plain else "choose another name"
    report.add(path, found=show(name), expected=NAME_WORDS, mend=mend, reads=[path])


def _mend(path: KeyPath, value: Any, expected: str, written: str | None) -> str:
    """How to make a value fit its schema, which `expected` gives in words. Every value that it proposes fits."""
    allowed = list(branches(schema_at(path)))
    if value in (None, "", [], {}):
        required = path[-1] in required_of(schema_at(path[:-1])) or isinstance(path[-1], int)
        return "give it a value" + ("" if required else ", or delete the line")
    if isinstance(value, str):
        reading = _reading(value)
        if reading != value and any(fits(reading, branch) for branch in allowed):
            return f"write {json.dumps(reading)} without quotes"
        choices = [str(choice) for branch in allowed for choice in choices_of(branch)]
        if near := nearest(value, choices, cutoff=0.5):
            return f"write {near}"
        if str(path[-1]).endswith("_gib") and (amount := re.fullmatch(r"([\d.]+) *Gi?B?", value, re.IGNORECASE)):
            return f"write {amount[1]}"
        if path[-1] == "quantization":
            return f"delete it if the checkpoint is quantized already, which needs nothing; else write {expected}"
        if any(branch.get("type") == "array" for branch in allowed) and value:
            return f"write a list: [{value}]"
        if path[-1] == "hub" and value.startswith((".", "/", "~")):
            return f"write path: {value} for a local folder"
        if path[-1] == "hub" and "huggingface.co/" in value:
            return f"write {value.partition('huggingface.co/')[2].strip('/')}"
    text = written if written is not None else str(value)
    if not isinstance(value, str | dict | list) and any(fits(text, branch) for branch in allowed):
        return f'write it in quotes: "{text}"'
    if isinstance(value, float) and value.is_integer() and any(fits(int(value), branch) for branch in allowed):
        return f"write {int(value)}"
    return f"write {expected}"


# --- runs -----------------------------------------------------------------------------------------------------------


def runs(config: Config, base: Path, workdir: Path, environment: str) -> list[Run]:
    """One Run for each model and repeat, in the order of the configuration.

    A run's name ends in 12 hex digits of the SHA-256 of its identity: what decides scores and is known before
    anything is fetched. `environment` names what the engine runs from (a lock's hash, an image's digest). Neither
    hardware nor the order of models, suites and tasks is part of it. Raises ConfigError when a folder that `load`
    has seen can no longer be read.
    """
    try:
        digests = {
            path: tree_digest(resolve(path, workdir, base))
            for path in {suite.include_path for suite in config.suites.values()}
            if path is not None
        }
        folders = {
            path: model_digest(resolve(path, workdir))
            for path in {model.path for model in config.models.values()}
            if path is not None
        }
    except (OSError, UnicodeError) as error:
        problem = Problem("", "", str(error), "files that stay where they are", "restore the file, and start again")
        raise ConfigError([problem]) from error
    units = {
        name: _units(name, suite, base, workdir, digests.get(suite.include_path or ""))
        for name, suite in config.suites.items()
    }
    asked = {name: [_asked(unit) for unit in units[name]] for name in config.suites}
    made = []
    for name, model in config.models.items():
        # In the order of `suites`, whatever the order in which the model names them.
        chosen = [suite for suite in config.suites if model.suites is None or suite in model.suites]
        entries = [entry for suite in chosen for entry in asked[suite]]
        identity = {
            "model": _model_identity(model, folders),
            "units": sorted(entries, key=lambda entry: (entry["suite"], entry["task"])),
            "seed": config.seed,
            "batch_invariant": config.batch_invariant,
            "environment": environment,
        }
        first = Run(
            name=f"{name}-{sha256_json(identity)[:12]}",
            model_name=name,
            model=model,
            units=[unit for suite in chosen for unit in units[suite]],
            identity=identity,
        )
        made += [first, *(_again(first, repeat) for repeat in range(1, config.repeats))]
    return made


def _again(first: Run, repeat: int) -> Run:
    """A run with every seed plus `repeat`."""
    identity = first.identity | {"repeat": repeat}
    name = f"{first.model_name}-{sha256_json(identity)[:12]}"
    units = [unit.model_copy(update={"settings": _reseeded(unit.settings, repeat)}) for unit in first.units]
    changes = {"name": name, "identity": identity, "units": units, "repeat": repeat, "repeat_of": first.name}
    return first.model_copy(update=changes)


def _reseeded(settings: TaskSettings, repeat: int) -> TaskSettings:
    """A seed of `generation`, which vLLM takes for each request, is a seed too."""
    generation = settings.generation or {}
    seed = generation.get("seed")
    if not isinstance(seed, int):
        return settings
    return settings.model_copy(update={"generation": generation | {"seed": seed + repeat}})


def _model_identity(model: ModelConfig, folders: dict[str, str]) -> dict[str, Any]:
    source = {"hub": model.hub, "revision": model.revision} if model.hub else {"folder": folders[model.path or ""]}
    deciding = ("dtype", "quantization", "max_model_len", "trust_remote_code")
    return source | {key: getattr(model, key) for key in deciding} | model.thinking


def _asked(unit: Unit) -> dict[str, Any]:
    settings = unit.settings.model_dump(exclude_none=True)
    return {"suite": unit.suite, "task": unit.task, "include": unit.include_sha256, "settings": settings}


def _units(name: str, suite: SuiteConfig, base: Path, workdir: Path, include_sha256: str | None) -> list[Unit]:
    include = suite.include_path
    if include is not None and not (workdir / include).exists():
        include = str(resolve(include, workdir, base))
    return [
        Unit(
            suite=name,
            task=entry if isinstance(entry, str) else entry.task,
            include_path=include,
            include_sha256=include_sha256,
            unsafe_code=suite.unsafe_code,
            settings=_unit_settings(suite, entry),
        )
        for entry in suite.tasks
    ]


def _unit_settings(suite: SuiteConfig, entry: str | TaskEntry) -> TaskSettings:
    """The suite's settings under the entry's. A null of the entry's gives back the task's own."""
    settings = {key: getattr(suite, key) for key in TaskSettings.model_fields}
    generation = dict(suite.generation or {})
    if isinstance(entry, TaskEntry):
        settings |= {key: getattr(entry, key) for key in entry.model_fields_set & TaskSettings.model_fields.keys()}
        cleared = "generation" in entry.model_fields_set and entry.generation is None
        generation = {} if cleared else generation | (entry.generation or {})
    settings["generation"] = {key: value for key, value in generation.items() if value is not None} or None
    if settings["limit"] is not None and settings["limit"] >= 1:
        # 100.0 documents are 100 documents; lm-eval makes the same of them.
        settings["limit"] = int(settings["limit"])
    return TaskSettings(**settings)


# --- by hand --------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reproval.config", description="Check configurations of reproval.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check configfiles, of which later ones win, and say what is wrong")
    check.add_argument("files", nargs="+", type=Path, metavar="FILE")
    commands.add_parser("schema", help="print the JSON Schema of config.yaml")
    commands.add_parser("keys", help="print the tables of config/README.md")
    options = parser.parse_args(arguments)
    if options.command == "schema":
        print(schema_text(), end="")
    elif options.command == "keys":
        print(keys_text(), end="")
    else:
        try:
            load(_merged(options.files), options.files, BASE, Path.cwd())
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
        print("OK")
    return 0


def _merged(files: list[Path]) -> dict[str, Any]:
    """The files as Snakemake merges them. One that cannot be read counts as empty here: `load` says why."""
    merged: dict[str, Any] = {}
    for file in files:
        try:
            data = read(file).data
        except (OSError, YamlError):
            continue
        merged = merge(merged, data) if isinstance(data, Mapping) else merged
    return merged


if __name__ == "__main__":
    sys.exit(main())
