"""The JSON Schema of config.yaml, and what it says in words: for messages, for readers, for editors.

Made from the models of settings.py, so that no key, range or description is written twice.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from reproval.problems import listing
from reproval.settings import Config, Generation
from reproval.strictyaml import KeyPath

# Where the type alone says too little.
WORDS = {
    "revision": "a commit, 40 hex digits",
    "limit": "a number of documents, or a fraction below 1",
    "hub": "the id of a model on huggingface.co, such as Qwen/Qwen3-4B",
    "compute_capability": 'text such as "9.0"',
    "local_copy": "`$TMPDIR` or an absolute path",
    "sif_sha256": "64 hexadecimal digits, as sha256sum prints them",
}


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of config.yaml, made from the models of settings.py."""
    made = Config.model_json_schema()
    made["$defs"]["Generation"] = Generation.model_json_schema()
    for section in ("SuiteConfig", "TaskEntry"):
        made["$defs"][section]["properties"]["generation"]["anyOf"][0] = {"$ref": "#/$defs/Generation"}
    for name in ("models", "suites"):
        # Without this JSON Schema would let names through that break the pattern.
        made["properties"][name]["additionalProperties"] = False
    made["properties"]["hardware"].pop("default")
    made["properties"]["export"].pop("default")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_untitled(made)}


def _untitled(value: Any) -> Any:
    """Without pydantic's titles, which repeat the keys."""
    if isinstance(value, dict):
        return {key: _untitled(entry) for key, entry in value.items() if key != "title"}
    return [_untitled(entry) for entry in value] if isinstance(value, list) else value


def branches(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a schema, references followed, null last."""
    if "$ref" in entry:
        yield from branches(schema()["$defs"][entry["$ref"].rpartition("/")[2]])
    elif "anyOf" in entry:
        for branch in entry["anyOf"]:
            yield from branches(branch)
    else:
        yield entry


def schema_at(path: KeyPath) -> dict[str, Any]:
    """The schema of the value at a path; empty for a path that it does not know."""
    entry = schema()
    for part in path:
        entry = next((below for branch in branches(entry) if (below := _below(branch, part))), {})
    return entry


def _below(branch: dict[str, Any], part: Any) -> dict[str, Any] | None:
    if branch.get("type") == "array":
        return branch.get("items")
    known = branch.get("properties", {}).get(part)
    return known or next(iter(branch.get("patternProperties", {}).values()), None)


def keys_of(entry: dict[str, Any]) -> list[str]:
    return [key for branch in branches(entry) for key in branch.get("properties", {})]


def required_of(entry: dict[str, Any]) -> list[str]:
    return [key for branch in branches(entry) for key in branch.get("required", [])]


def choices_of(branch: dict[str, Any]) -> list[Any]:
    return list(branch.get("enum", [branch["const"]] if "const" in branch else []))


def fits(value: Any, branch: dict[str, Any]) -> bool:
    """Whether a scalar satisfies one branch of the schema."""
    kinds: dict[str, Any] = {"string": str, "integer": int, "number": int | float, "boolean": bool}
    kind = kinds.get(branch.get("type", ""))
    if kind is None or not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        return False
    if isinstance(value, str):
        choices = choices_of(branch)
        return bool(re.search(branch.get("pattern", ""), value)) and (not choices or value in choices)
    return (
        branch.get("minimum", value) <= value <= branch.get("maximum", value)
        and ("exclusiveMinimum" not in branch or value > branch["exclusiveMinimum"])
        and ("exclusiveMaximum" not in branch or value < branch["exclusiveMaximum"])
    )


def describe(entry: dict[str, Any]) -> str:
    """A schema in words. Null is not offered: leaving the key out says the same."""
    choices = [str(choice) for branch in branches(entry) for choice in choices_of(branch)]
    words = ["one of " * (len(choices) > 1) + ", ".join(choices)] if choices else []
    words += [
        text for branch in branches(entry) if not choices_of(branch) and (text := _describe_branch(branch)) is not None
    ]
    return " or ".join(dict.fromkeys(words)) or "another value"


def _describe_branch(branch: dict[str, Any]) -> str | None:
    kind = branch.get("type")
    if kind in ("integer", "number"):
        words = "a whole number" if kind == "integer" else "a number"
        if "minimum" in branch and "maximum" in branch:
            return f"{words} from {branch['minimum']} to {branch['maximum']}"
        bounds = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most"}
        limits = ", ".join(f"{text} {branch[key]}" for key, text in bounds.items() if key in branch)
        return f"{words} {limits}" if limits else words
    if kind == "array":
        inner = ["mappings" if item.get("type") == "object" else describe(item) for item in branches(branch["items"])]
        return f"a list of {' or '.join(inner)}" + (", at least one" if branch.get("minItems") else "")
    if kind == "object":
        if "patternProperties" in branch:
            return "a mapping of at least one name to its settings"
        if "properties" not in branch:
            return "a mapping of names to values"
        return f"a mapping of the keys {listing(branch['properties'], 30)}"
    return {"boolean": "true or false", "string": "text"}.get(str(kind))


def schema_text() -> str:
    """workflow/schemas/config.schema.yaml."""
    heading = "# Made from workflow/reproval/settings.py by `python -m reproval.config schema`; do not edit.\n"
    return heading + yaml.safe_dump(copy.deepcopy(schema()), sort_keys=False, allow_unicode=True, width=118)


def keys_text() -> str:
    """Tables of all keys in Markdown, for config/README.md."""
    sections = [
        ("Top level", "Config"),
        ("`models: NAME:`", "ModelConfig"),
        ("`suites: NAME:`", "SuiteConfig"),
        ("an entry of `tasks:`", "TaskEntry"),
        ("`generation:`", "Generation"),
        ("`hardware:`", "HardwareConfig"),
        ("`container:`", "ContainerConfig"),
        ("`export:`", "ExportConfig"),
    ]
    parts = []
    for heading, name in sections:
        section = schema() if name == "Config" else schema()["$defs"][name]
        text = section["description"].split("\n")[0] if name != "Config" else ""
        rows = [_row(key, entry, key in section.get("required", [])) for key, entry in section["properties"].items()]
        table = ["| key | value | default | meaning |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"### {heading}", "", *([text, ""] if text else []), *table]))
    return "\n\n".join(parts) + "\n"


def _row(key: str, entry: dict[str, Any], required: bool) -> str:
    default = entry.get("default")
    shown = "required" if required else f"`{json.dumps(default)}`" if default is not None else ""
    words = WORDS.get(key) or re.sub(r"mapping of the keys .*", "mapping, see below", describe(entry))
    meaning = entry.get("description") or _branch_description(entry)
    return f"| `{key}` | {words} | {shown} | {meaning} |".replace("|  |", "| |")


def _branch_description(entry: dict[str, Any]) -> str:
    return next((branch["description"] for branch in branches(entry) if "description" in branch), "")
