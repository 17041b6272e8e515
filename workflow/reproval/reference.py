"""Published evaluations as files: what was reported, of what, with what, and where it stands.

A reference (config/references/*.yaml) has the `models` and `suites` of a configuration, so that it can be run, and
`scores`, so that a run can be judged. `workflow/schemas/reference.schema.yaml` is made from these models:

    python -m reproval.reference schema          print the schema
    python -m reproval.reference check FILE...   check references
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from reproval import bundle, bundle_archive, strictyaml
from reproval.folders import kind_of, resolve
from reproval.problems import ConfigError, Problem, dotted, show
from reproval.settings import Config, ModelConfig, Name, Section, SuiteConfig, Text

# What a model is fetched by. A local `path` takes its place.
HUB_KEYS = ("hub", "revision", "allow_floating", "gated")
# Metrics that are shares of the documents in lm-eval's tasks.
PROPORTIONS = ("acc", "acc_norm", "exact_match")


class Source(Section):
    url: str = Field(pattern=r"^https?://\S+$", description="Where the values stand; a commit in it where possible.")
    where: Text = Field(description="Where on that page or in that file.")
    seen: Text = Field(description="When and how the values were compared with the source.")


class MadeWith(Section):
    """What the values were made with, as far as the source says. Null: it does not say."""

    harness: Text | None = Field(default=None, description="lm-eval, lighteval, ...")
    harness_version: Text | None = None
    engine: Text | None = Field(default=None, description="vLLM, transformers, ...")
    engine_version: Text | None = None
    hardware: Text | None = None
    dtype: Text | None = None
    quantization: Text | None = Field(default=None, description="`none` where the source says that there was none.")
    chat_template: bool | None = Field(default=None, description="Whether prompts went through a chat template.")


class Margin(Section):
    """The largest difference that counts as none: of the score itself, or relative to the published value."""

    absolute: float | None = Field(default=None, gt=0, description="In units of the score: 0.02 is two points of 100.")
    relative: float | None = Field(default=None, gt=0, description="As a share of the published value.")
    because: Text = Field(description="Who chose it, and why.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.absolute is None) == (self.relative is None):
            raise ValueError("either absolute or relative")
        return self

    def of(self, value: float, scale: Literal["difference", "ratio"]) -> float:
        """The margin for a published value, in units of the score, or as a share of it on a ratio scale."""
        if scale == "ratio":
            return self.relative if self.relative is not None else (self.absolute or 0.0) / abs(value)
        return self.absolute if self.absolute is not None else (self.relative or 0.0) * abs(value)


class PublishedScore(Section):
    """One published number."""

    model: Name = Field(description="A name under `models`.")
    suite: Name = Field(description="A name under `suites`.")
    task: Text = Field(description="lm-eval's task or group.")
    metric: Text = Field(description="lm-eval's metric, such as acc or exact_match.")
    filter: Text = Field(default="none", description="lm-eval's filter.")
    value: float
    rounded_to: float = Field(default=0, ge=0, description="Unit of the last printed digit; 0: exact, or all digits.")
    stderr: float | None = Field(default=None, gt=0, description="Standard error, if published.")
    n: int | None = Field(default=None, ge=1, description="Documents, if published or if they follow from it.")
    task_version: str | int | float | None = Field(default=None, description="As lm-eval reports it.")
    num_fewshot: int | None = Field(default=None, ge=0)
    made_with: MadeWith | None = Field(default=None, description="What of the reference's `made_with` is otherwise.")
    margin: Margin | None = Field(default=None, description="Default: the reference's.")
    note: Text | None = None

    @field_validator("value")
    @classmethod
    def _share(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("metric") in PROPORTIONS and not 0 <= value <= 1:
            raise ValueError("a share between 0 and 1, as lm-eval gives it, and no percentage")
        return value


class Reference(Section):
    """A published evaluation: enough to run it again and to judge what comes out."""

    title: Text
    source: Source
    made_with: MadeWith
    margin: Margin
    models: dict[Name, ModelConfig] = Field(min_length=1, description="As in a configuration.")
    suites: dict[Name, SuiteConfig] = Field(min_length=1, description="As in a configuration.")
    scores: list[PublishedScore] = Field(min_length=1)
    left_out: list[Text] = Field(default=[], description="What the source has and this file has not, and why.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        seen = set()
        for score in self.scores:
            for section, name in (("models", score.model), ("suites", score.suite)):
                if name not in getattr(self, section):
                    raise ValueError(f"a score of {name}, which is not under {section}")
            identity = (score.model, score.suite, score.task, score.metric, score.filter)
            if identity in seen:
                raise ValueError(f"{' '.join(identity)} once, not twice")
            seen.add(identity)
            asked = self.suites[score.suite].setting_of(score.task, "num_fewshot")
            if None not in (asked, score.num_fewshot) and asked != score.num_fewshot:
                raise ValueError(
                    f"one num_fewshot for {' '.join(identity)}, not {score.num_fewshot} under scores and {asked} "
                    "under suites"
                )
        return self


def load(path: Path) -> Reference:
    """Read a reference. Raises ConfigError with every problem: file and line, key, found, expected, mend."""
    try:
        document = strictyaml.read(path)
    except OSError as error:
        found = error.strerror or str(error)
        problem = Problem("--config", "reference", f"{path}: {found}", "a file", "correct the name of the file")
        raise ConfigError([problem]) from error
    except strictyaml.YamlError as error:
        place = f"{path}:{error.line}" if error.line else str(path)
        raise ConfigError([Problem(place, "", error.found, "YAML", error.mend)]) from error
    problems = [
        Problem(f"{path}:{twice.lines[1]}", dotted(twice.path), "the key a second time", "every key once", "delete one")
        for twice in document.duplicates
    ]
    try:
        reference = Reference.model_validate(document.data)
    except ValidationError as error:
        for each in error.errors():
            key = tuple(each["loc"])
            known = key
            while known and known not in document.marks:
                known = known[:-1]
            place = f"{path}:{document.marks[known].line}" if known else str(path)
            wrong = "an unknown key" if each["type"] == "extra_forbidden" else show(each["input"])
            mend = (
                "delete it" if each["type"] == "extra_forbidden" else "correct it; the schema is reference.schema.yaml"
            )
            problems.append(Problem(place, dotted(key), wrong, each["msg"], mend))
        raise ConfigError(problems) from error
    if problems:
        raise ConfigError(problems)
    return reference


def overlay(asked: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration `given` with the models, suites and other keys that are `asked` for.

    `models` and `suites` of `given` count only where they have the name of one asked for, and then key by key: another
    place for its files, a limit for trying out. A local `path` takes the place of hub and revision. Where it runs,
    such as hardware, store and container, is `given`'s choice. Pure.
    """
    merged: dict[str, Any] = dict(given)
    for section in ("models", "suites"):
        mine = given.get(section)
        named = mine if isinstance(mine, Mapping) else {}
        merged[section] = {
            name: _laid_over(entry, named[name]) if isinstance(named.get(name), Mapping) else entry
            for name, entry in asked[section].items()
        }
    for key, value in asked.items():
        if key == "container":
            merged.setdefault(key, value)
        elif key not in ("models", "suites"):
            merged[key] = value
    return merged


def _laid_over(asked: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    dropped = HUB_KEYS if mine.get("path") is not None else ("path",) if mine.get("hub") is not None else ()
    return {key: value for key, value in asked.items() if key not in dropped} | dict(mine)


def asked_by(reference: Reference) -> dict[str, Any]:
    """The models and suites of a reference, as they stand in a configuration."""
    return reference.model_dump(include={"models", "suites"}, exclude_unset=True)


def find(name: str, key: str, base: Path, workdir: Path) -> Path:
    """Where the file of a key is: in the working directory, else in the workflow's folder. Raises ConfigError."""
    path = resolve(name, workdir, base)
    if kind_of(path) != "file":
        mend = "correct the name (relative to the working directory)"
        raise ConfigError([Problem("--config", key, f"{name}: no such file", "an existing file", mend)])
    return path


def configure(given: Mapping[str, Any], base: Path, workdir: Path) -> dict[str, Any]:
    """The configuration as it is `given`, or with what its `reference` or `bundle` asks to be run.

    A bundle is checked and unpacked into the store the first time. Raises ConfigError.
    """
    name, archive = given.get("reference"), given.get("bundle")
    if isinstance(name, str) and isinstance(archive, str):
        found = f"reference: {show(name)} and bundle: {show(archive)}"
        raise ConfigError([Problem("--config", "", found, "one of them", "leave one away")])
    if isinstance(name, str):
        return overlay(asked_by(load(find(name, "reference", base, workdir))), given)
    if not isinstance(archive, str):
        return dict(given)
    try:
        store = workdir / str(given.get("store", Config.model_fields["store"].default))
        folder = bundle_archive.unpacked(find(archive, "bundle", base, workdir), store)
        merged = overlay(bundle.asked_by(folder, workdir), given)
    except (bundle_archive.BundleError, OSError) as error:
        raise ConfigError([Problem("--config", "bundle", str(error), "a whole bundle", "copy it again")]) from error
    missing = []
    for model, entry in merged["models"].items():
        path = entry.get("path")
        if isinstance(path, str) and kind_of(workdir / path) != "folder":
            missing.append(
                Problem(
                    "--config",
                    f"models.{model}.path",
                    f"no folder {path} here, and a bundle holds no weights",
                    bundle.weights_needed(folder, model) or "the folder of the model",
                    f"copy it, and name it in the same --config: 'models={{{model}: {{path: FOLDER}}}}'",
                )
            )
    if missing:
        raise ConfigError(missing)
    return merged


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reproval.reference", description="References of reproval.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check references and say what is wrong")
    check.add_argument("files", nargs="+", type=Path, metavar="FILE")
    commands.add_parser("schema", help="print the JSON Schema of references")
    options = parser.parse_args()
    if options.command == "schema":
        print(schema_text(), end="")
        return 0
    try:
        for path in options.files:
            load(path)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print("OK")
    return 0


def schema_text() -> str:
    """workflow/schemas/reference.schema.yaml."""
    heading = "# Made from workflow/reproval/reference.py by `python -m reproval.reference schema`; do not edit.\n"
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Reference.model_json_schema()}
    return heading + yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=118)


if __name__ == "__main__":
    sys.exit(main())
