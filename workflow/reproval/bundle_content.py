"""What goes into a bundle: a configuration, records, results, task files and the workflow, and nothing secret."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reproval import __version__, folders, scrub
from reproval.bundle_archive import SUMS, BundleError, Content
from reproval.files import read_record
from reproval.keep import RESULT, SAMPLES
from reproval.records import Evaluation, ModelManifest, UnitResult
from reproval.run_file import RunFile, model_key

CONFIGURATION = "configuration.yaml"
# What the image holds, as CycloneDX.
SBOM = "image.cdx.json"
README = "README.md"
LARGEST_SOURCE_BYTES = 16 * 2**20
RUN_FILES = ("run.json", "facts.json", "plan.json", "evaluation.json", "memory.parquet")
REPORTS = ("scores.csv", "scores.parquet", "report.html", "report.md", "report.json")
SOURCES = ("Snakefile", "workflow", "envs", "containers", "config/tiers.yaml", "LICENSE", "CITATION.cff")


@dataclass(frozen=True)
class BundledRun:
    """A run, its folder below results/runs/, and its results with their folders below results/."""

    folder: Path
    run: RunFile
    evaluation: Evaluation
    units: list[tuple[str, UnitResult]]


def read_runs(results: Path, evaluations: Iterable[Path]) -> list[BundledRun]:
    """The runs of these evaluations with their unit results. Raises RecordError."""
    runs = []
    for path in evaluations:
        evaluation = read_record(path, Evaluation)
        units = [(unit.folder, read_record(results / unit.folder / RESULT, UnitResult)) for unit in evaluation.units]
        runs.append(BundledRun(path.parent, read_record(path.parent / "run.json", RunFile), evaluation, units))
    return runs


def commits(manifests: Iterable[Path]) -> dict[str, str]:
    """The commit that was staged of each model of the Hub, by the name of its manifest. Raises RecordError."""
    models = (path for path in manifests if path.parent.name == "models")
    return {path.stem: commit for path in models if (commit := read_record(path, ModelManifest).revision)}


def configuration(runs: Iterable[RunFile], staged: Mapping[str, str]) -> dict[str, Any]:
    """The configuration that these runs come from, with every setting written out and task files inside the bundle.

    Which machine it was is in the records. An absolute path of a model is its folder's name alone. A branch is the
    commit that it was when it was `staged` (see `commits`): it may have moved on since.
    """
    models: dict[str, Any] = {}
    suites: dict[str, Any] = {}
    first: RunFile | None = None
    repeats = 1
    for entry in runs:
        repeats = max(repeats, entry.run.repeat + 1)
        if entry.run.repeat:
            continue
        first = first or entry
        run = entry.run
        model = run.model.model_dump(exclude_defaults=True)
        if run.model.path is not None and _leaves_the_project(run.model.path):
            model["path"] = Path(run.model.path).name
        if run.model.hub is not None and (commit := staged.get(model_key(run))):
            model["revision"] = commit
            model.pop("allow_floating", None)
        models[run.model_name] = model | {"suites": list(dict.fromkeys(unit.suite for unit in run.units))}
        for unit in run.units:
            suite = suites.setdefault(unit.suite, {"tasks": []})
            if unit.include_path is not None:
                suite["include_path"] = f"task-files/{unit.suite}"
            if unit.unsafe_code:
                suite["unsafe_code"] = True
            task = {"task": unit.task} | unit.settings.model_dump(exclude_none=True)
            if task not in suite["tasks"]:
                suite["tasks"].append(task)
    assert first is not None
    made: dict[str, Any] = {"models": models, "suites": suites, "batch_invariant": first.batch_invariant}
    if repeats > 1:
        made["repeats"] = repeats
    made["seed"] = first.seed
    # The path of an image file says nothing to another machine.
    if first.container is not None and "://" in first.container.image:
        made["container"] = first.container.model_dump(exclude_none=True)
    return made


def json_text(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _leaves_the_project(path: str) -> bool:
    return Path(path).is_absolute() or ".." in Path(path).parts


def members(
    results: Path,
    runs: list[BundledRun],
    manifests: Sequence[Path],
    base: Path,
    workdir: Path,
    sbom: Path | None = None,
) -> dict[str, Content]:
    """Name in the archive -> content, but for the crate and SHA256SUMS. Raises BundleError for a secret, OSError."""
    found: dict[str, Content] = {SBOM: sbom} if sbom else {}

    def record(name: str, path: Path) -> None:
        cleaned, _ = scrub.scrub(json.loads(path.read_text(encoding="utf-8")), workdir)
        found[name] = json_text(cleaned)

    found[CONFIGURATION] = yaml.safe_dump(
        configuration((run.run for run in runs), commits(manifests)), sort_keys=False, allow_unicode=True
    ).encode()
    found[README] = _readme(runs).encode()
    for run in runs:
        for name in RUN_FILES:
            path, inside = run.folder / name, f"results/runs/{run.folder.name}/{name}"
            if name in ("run.json", "evaluation.json"):
                record(inside, path)
            elif path.exists():
                found[inside] = path
        for folder, _ in run.units:
            found[f"results/{folder}/{SAMPLES}"] = results / folder / SAMPLES
            text = (results / folder / RESULT).read_text(encoding="utf-8")
            # lm-eval notes where a task's file was. Only the project's own place is taken out of it.
            found[f"results/{folder}/{RESULT}"] = text.replace(f"{workdir.resolve()}/", "").encode()
        for unit in run.run.run.units:
            if unit.include_path is not None:
                folder_path = folders.resolve(unit.include_path, workdir, base)
                for path in folders.walk(folder_path):
                    found[f"task-files/{unit.suite}/{path.relative_to(folder_path).as_posix()}"] = path
    for path in manifests:
        record(f"manifests/{path.parent.name}/{path.name}", path)
    for name in REPORTS:
        if (results / name).exists():
            found[f"results/{name}"] = results / name
    for name in SOURCES:
        source = base / name
        for path in [source] if source.is_file() else folders.walk(source) if source.is_dir() else []:
            # An image that was built beside its recipe stays where it is; its digest is in the records.
            if path.stat().st_size <= LARGEST_SOURCE_BYTES:
                found[f"workflow/{path.relative_to(base).as_posix()}"] = path
    for name, content in found.items():
        _refuse_secrets(name, content)
    return found


def _readme(runs: list[BundledRun]) -> str:
    """What somebody reads who unpacks the archive without knowing reproval."""
    rows = [
        f"| {result.suite} | {score.task} | {score.metric} | {score.filter} | {run.evaluation.model} "
        f"| {run.evaluation.repeat} | {score.value:.4f}{'†' if result.score_levers else ''} | {score.n} |"
        for run in runs
        for _, result in run.units
        for score in result.scores[:20]
    ]
    return "\n".join(
        [
            f"# Evaluation of {', '.join(dict.fromkeys(run.evaluation.model for run in runs))}",
            "",
            f"Made by reproval {__version__}, a Snakemake workflow; the workflow as it was lies in workflow/. To run "
            "it again and judge every score, in a checkout of reproval:",
            "",
            "    snakemake --cores 2 reproduce --config bundle=FILE",
            "",
            f"What was asked is in {CONFIGURATION}, what came out in results/ (report.html first). Every file is in "
            f"{SUMS} with its SHA-256.",
            "",
            "| suite | task | metric | filter | model | repeat | value | n |",
            "|---|---|---|---|---|--:|--:|--:|",
            *rows,
            "",
            "† A score-changing lever was pulled. Which, and what else marks scores (a limit, cut prompts), is said in "
            "results/report.html.",
            "",
        ]
    )


def _refuse_secrets(name: str, content: Content) -> None:
    """Raise BundleError if a file gives something away. Of samples only what could be this user's: questions and
    answers may hold anything that looks like a password.
    """
    data = content if isinstance(content, bytes) else content.read_bytes()
    if name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise BundleError(
                f"{name}: no gzip file ({error}), so that it cannot be searched for secrets; expected what its name "
                "says. Rename it, or write it again"
            ) from error
    samples = name.startswith("results/") and name.endswith(f"/{SAMPLES}")
    text = data.decode("utf-8", errors="replace")
    told = scrub.own(text) if samples or name == SBOM or name.startswith("workflow/") else scrub.leaks(text)
    if told is not None:
        raise BundleError(
            f"{name}: holds {told}; expected nothing secret in a bundle. "
            "Take it out of the configuration or the task that it comes from, and evaluate again"
        )
