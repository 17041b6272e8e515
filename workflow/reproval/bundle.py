"""One archive that another cluster can run from: everything of a run but the weights and the data sets of others.

An RO-Crate (Workflow Run Crate) in a ZIP file that compresses nothing, so that the same files make the same bytes
wherever it is made, and so that its size bounds what comes out of it. SHA256SUMS names every file with its hash.

    python -m reproval.bundle check FILE     every byte of a bundle, or what is wrong with it

`snakemake bundle` makes one, and `snakemake reproduce --config bundle=FILE` runs from it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from reproval import __version__, folders, scrub
from reproval.files import RecordError, atomic, read_record, sha256_bytes, sha256_file
from reproval.records import Evaluation, ModelManifest, UnitResult
from reproval.run_file import RunFile

SUMS = "SHA256SUMS"
CRATE = "ro-crate-metadata.json"
CONFIGURATION = "configuration.yaml"
# The keys of it that say what runs.
ASKED = ("models", "suites", "container", "seed", "repeats", "batch_invariant")
# What the image holds, as CycloneDX.
SBOM = "image.cdx.json"
README = "README.md"
# ZIP without its extension for larger archives.
LARGEST_BYTES = 2**32 - 2**20
MOST_FILES = 60_000
LARGEST_SOURCE_BYTES = 16 * 2**20
# The earliest time that ZIP can hold.
EPOCH = (1980, 1, 1, 0, 0, 0)
RUN_FILES = ("run.json", "facts.json", "plan.json", "evaluation.json", "memory.parquet")
REPORTS = ("scores.csv", "scores.parquet", "report.html", "report.md", "report.json")
SOURCES = ("Snakefile", "workflow", "envs", "containers", "config/tiers.yaml", "LICENSE", "CITATION.cff")
BIOSCHEMAS = "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}

Content = bytes | Path


class BundleError(Exception):
    """A bundle cannot be made, or is not what was made. Names the file, what was found, and the mend."""


# --- what goes in ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BundledRun:
    folder: Path
    run: RunFile
    evaluation: Evaluation
    units: list[tuple[str, UnitResult]]


def read_runs(results: Path, evaluations: Iterable[Path]) -> list[BundledRun]:
    """The runs of these evaluations with their unit results. Raises RecordError."""
    runs = []
    for path in evaluations:
        evaluation = read_record(path, Evaluation)
        units = [
            (unit.folder, read_record(results / unit.folder / "result.json", UnitResult)) for unit in evaluation.units
        ]
        runs.append(BundledRun(path.parent, read_record(path.parent / "run.json", RunFile), evaluation, units))
    return runs


def configuration(runs: Iterable[RunFile]) -> dict[str, Any]:
    """The configuration that these runs come from, with every setting written out and task files inside the bundle.

    Which machine it was is in the records. An absolute path of a model is its folder's name alone.
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
    if first.container is not None and not first.container.image.endswith(".sif"):
        made["container"] = first.container.model_dump(exclude_none=True)
    return made


def _leaves_the_project(path: str) -> bool:
    return Path(path).is_absolute() or ".." in Path(path).parts


def members(
    results: Path,
    runs: list[BundledRun],
    manifests: Iterable[Path],
    base: Path,
    workdir: Path,
    sbom: Path | None = None,
) -> dict[str, Content]:
    """Name in the archive -> content, without CRATE and SUMS. Raises BundleError for a secret, OSError."""
    found: dict[str, Content] = {SBOM: sbom} if sbom else {}

    def record(name: str, path: Path) -> None:
        cleaned, _ = scrub.scrub(json.loads(path.read_text(encoding="utf-8")), workdir)
        found[name] = (json.dumps(cleaned, indent=1, ensure_ascii=False) + "\n").encode()

    found[CONFIGURATION] = yaml.safe_dump(
        configuration(run.run for run in runs), sort_keys=False, allow_unicode=True
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
            found[f"results/{folder}/samples.jsonl.gz"] = results / folder / "samples.jsonl.gz"
            text = (results / folder / "result.json").read_text(encoding="utf-8")
            # lm-eval notes where a task's file was. Only the project's own place is taken out of it.
            found[f"results/{folder}/result.json"] = text.replace(f"{workdir.resolve()}/", "").encode()
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
    samples = name.startswith("results/") and name.endswith("/samples.jsonl.gz")
    text = data.decode("utf-8", errors="replace")
    told = scrub.own(text) if samples or name == SBOM or name.startswith("workflow/") else scrub.leaks(text)
    if told is not None:
        raise BundleError(
            f"{name}: holds {told}; expected nothing secret in a bundle. "
            "Take it out of the configuration or the task that it comes from, and evaluate again"
        )


# --- the crate ------------------------------------------------------------------------------------------------------

ENCODINGS = {
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".yaml": "application/yaml",
    ".html": "text/html",
    ".md": "text/markdown",
    ".csv": "text/csv",
    ".gz": "application/gzip",
    ".parquet": "application/vnd.apache.parquet",
    ".py": "text/x-python",
}


def crate(files: Mapping[str, tuple[int, str]], runs: list[BundledRun]) -> dict[str, Any]:
    """ro-crate-metadata.json for files given as name -> (bytes, SHA-256). Pure: the dates are those of the runs.

    RO-Crate 1.1 with the profile Workflow Run Crate 0.5: the Snakefile is the workflow, every model's evaluation an
    execution of it.
    """

    def ref(identity: str) -> dict[str, str]:
        return {"@id": identity}

    def one_or_all(values: list[dict[str, str]]) -> Any:
        return values[0] if len(values) == 1 else values

    def ended(run: BundledRun) -> str:
        begin = datetime.fromisoformat(run.evaluation.begin)
        return (begin + timedelta(seconds=run.evaluation.duration_s)).isoformat(timespec="seconds")

    software: dict[str, dict[str, Any]] = {}
    images: dict[str, dict[str, Any]] = {}
    actions = []
    for run in runs:
        model, name = run.evaluation.model, run.folder.name
        for _, result in run.units:
            for package, version in result.provenance.packages.items():
                identity = f"https://pypi.org/project/{package}/{version.partition('+')[0]}/"
                software[identity] = {
                    "@id": identity, "@type": "SoftwareApplication", "name": package, "url": identity,
                    "softwareVersion": version,
                }  # fmt: skip
            container = result.provenance.container
            if container is not None:
                images[container.image] = {
                    "@id": container.image,
                    "@type": "ContainerImage",
                    "name": container.image,
                    "sha256": (container.digest or "").rpartition(":")[2] or container.sif_sha256,
                }
        own = [f"results/runs/{name}/", *(f"results/{folder}/" for folder, _ in run.units)]
        actions.append(
            {
                "@id": f"#run-{name}",
                "@type": "CreateAction",
                "name": f"Evaluation of {model}"
                + (f", repeat {run.evaluation.repeat}" if run.evaluation.repeat else ""),
                "description": f"{', '.join(f'{r.suite}/{r.task}' for _, r in run.units)} on {_machine(run)}",
                "instrument": ref("workflow/Snakefile"),
                "startTime": run.evaluation.begin,
                "endTime": ended(run),
                "actionStatus": "http://schema.org/CompletedActionStatus",
                "object": [ref(CONFIGURATION), ref(f"results/runs/{name}/run.json")],
                "result": [
                    ref(file) for file in files if file.startswith(tuple(own)) and not file.endswith("/run.json")
                ],
                **({"containerImage": [ref(image) for image in images]} if images else {}),
            }
        )
    entities: list[dict[str, Any]] = [
        {
            "@id": CRATE,
            "@type": "CreativeWork",
            "about": ref("./"),
            "conformsTo": [
                ref("https://w3id.org/ro/crate/1.1"),
                ref("https://w3id.org/workflowhub/workflow-ro-crate/1.0"),
            ],
        },
        {
            "@id": "./",
            "@type": "Dataset",
            "name": f"Evaluation of {', '.join(dict.fromkeys(run.evaluation.model for run in runs))} by reproval",
            "description": "Configuration, locks, manifests, task files, plan, results with samples, and report of an "
            "evaluation of language models. `snakemake reproduce --config bundle=FILE` runs it again and judges it.",
            "datePublished": max((ended(run) for run in runs), default=""),
            "license": ref("workflow/LICENSE"),
            "conformsTo": [ref(profile) for profile in PROFILES],
            "mainEntity": ref("workflow/Snakefile"),
            "hasPart": [ref(name) for name in files],
            # RO-Crate 1.1 wants no list of one.
            "mentions": one_or_all([ref(str(action["@id"])) for action in actions]),
        },
        *({"@id": url, "@type": "CreativeWork", "name": name} for url, name in PROFILES.items()),
        {"@id": BIOSCHEMAS, "@type": "CreativeWork", "name": "Bioschemas ComputationalWorkflow"},
        {
            "@id": "https://w3id.org/workflowhub/workflow-ro-crate#snakemake",
            "@type": "ComputerLanguage",
            "name": "Snakemake",
            "identifier": ref("https://doi.org/10.1093/bioinformatics/bts480"),
            "url": ref("https://snakemake.readthedocs.io"),
        },
        *software.values(),
        *images.values(),
        *actions,
    ]
    for name, (size, sha256) in files.items():
        entity: dict[str, Any] = {
            "@id": name,
            "@type": "File",
            "name": PurePosixPath(name).name,
            "contentSize": str(size),
            "sha256": sha256,
            "encodingFormat": ENCODINGS.get(PurePosixPath(name).suffix, "text/plain"),
        }
        if name == README:
            entity["about"] = ref("./")
        if name == SBOM:
            entity["encodingFormat"] = "application/vnd.cyclonedx+json"
            if images:
                entity["about"] = one_or_all([ref(image) for image in images])
        if name == "workflow/Snakefile":
            entity |= {
                "conformsTo": ref(BIOSCHEMAS),
                "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow"],
                "name": "reproval",
                "version": __version__,
                "programmingLanguage": ref("https://w3id.org/workflowhub/workflow-ro-crate#snakemake"),
                "softwareRequirements": [ref(identity) for identity in software],
            }
        entities.append(entity)
    return {
        "@context": ["https://w3id.org/ro/crate/1.1/context", "https://w3id.org/ro/terms/workflow-run/context"],
        "@graph": entities,
    }


def _machine(run: BundledRun) -> str:
    made = next((result.provenance for _, result in run.units), None)
    return "an unknown machine" if made is None else ", ".join(made.gpus) or made.cpu


# --- writing --------------------------------------------------------------------------------------------------------


def _sized(content: Content) -> tuple[int, str]:
    if isinstance(content, bytes):
        return len(content), sha256_bytes(content)
    return content.stat().st_size, sha256_file(content)


def write_archive(path: Path, contents: Mapping[str, Content]) -> None:
    """Write a ZIP of these members, sorted, stored, with fixed times and rights: equal members, equal bytes.

    Raises BundleError if they are too many or too large for a plain ZIP, OSError.
    """
    total = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in contents.values())
    if total > LARGEST_BYTES or len(contents) > MOST_FILES:
        raise BundleError(
            f"{len(contents)} files of {total} bytes; a bundle holds {MOST_FILES} files of {LARGEST_BYTES} bytes "
            "together. Bundle fewer models or suites at once"
        )
    with atomic(path, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            content = contents[name]
            if isinstance(content, bytes):
                archive.writestr(info, content)
            else:
                info.file_size = content.stat().st_size
                with content.open("rb") as source, archive.open(info, "w") as target:
                    shutil.copyfileobj(source, target, 2**20)


def make(
    results: Path,
    evaluations: list[Path],
    manifests: list[Path],
    base: Path,
    workdir: Path,
    out: Path,
    sbom: Path | None = None,
) -> str:
    """Bundle these evaluations; return the archive's SHA-256. Raises BundleError, RecordError, OSError."""
    runs = read_runs(results, evaluations)
    contents = members(results, runs, manifests, base, workdir, sbom)
    if reason := _unsafe_name(sorted(contents)):
        raise BundleError(f"{reason}, so that nobody could unpack it. Rename it")
    files = {name: _sized(contents[name]) for name in sorted(contents)}
    contents[CRATE] = (json.dumps(crate(files, runs), indent=1, ensure_ascii=False) + "\n").encode()
    files[CRATE] = _sized(contents[CRATE])
    contents[SUMS] = _sums({name: sha256 for name, (_, sha256) in files.items()})
    write_archive(out, contents)
    return sha256_file(out)


def _sums(hashes: Mapping[str, str]) -> bytes:
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()


def _listed(sums: bytes) -> dict[str, str]:
    """Name -> SHA-256 of a SHA256SUMS. Only a line feed ends a line: a name may hold U+2028."""
    lines = [line.partition("  ") for line in sums.decode("utf-8").split("\n") if line]
    return {name: sha256 for sha256, _, name in lines}


# --- reading --------------------------------------------------------------------------------------------------------


def unpack(path: Path, folder: Path) -> None:
    """Check every byte of a bundle while unpacking it into `folder`, which must not exist; nothing is left on failure.

    Raises BundleError naming the first thing that is wrong: a name that would leave the folder, a link, something
    compressed, a file more, fewer or other than SHA256SUMS says, or a byte of the archive around the files.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        _unpack(path, part / "files")
        write_archive(part / "again.zip", {p.relative_to(part / "files").as_posix(): p for p in _all(part / "files")})
        _compare(path, part / "again.zip")
        (part / "files").rename(folder)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, UnicodeError, ValueError) as error:
        raise BundleError(f"{path}: not a bundle as reproval writes it ({error}); copy it again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _unpack(path: Path, folder: Path) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if len(infos) > MOST_FILES or sum(info.file_size for info in infos) > min(size, LARGEST_BYTES):
            raise BundleError(f"{path}: {len(infos)} files that claim more bytes than the archive has; do not use it")
        if reason := _unsafe_name(names):
            raise BundleError(f"{path}: {reason}; do not use it")
        for info in infos:
            if reason := _unsafe(info):
                raise BundleError(f"{path}: {info.filename!r}: {reason}; do not use it")
        hashes = {}
        for info in infos:
            target = folder / info.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(info) as source, target.open("xb") as stream:
                    shutil.copyfileobj(source, stream, 2**20)
            except zipfile.BadZipFile as error:
                raise BundleError(
                    f"{path}: {info.filename}: changed after it was bundled ({error}); copy it again"
                ) from None
            hashes[info.filename] = sha256_file(target)
    if SUMS not in hashes:
        raise BundleError(f"{path}: no {SUMS}: not a bundle of reproval")
    del hashes[SUMS]
    listed = (folder / SUMS).read_bytes()
    claimed = _listed(listed)
    for name in sorted(hashes.keys() | claimed.keys()):
        if name not in hashes:
            raise BundleError(f"{path}: {name}: named in {SUMS}, but not there; copy it again")
        if claimed.get(name) != hashes[name]:
            raise BundleError(
                f"{path}: {name}: SHA-256: expected {claimed.get(name, 'none')} by {SUMS}, found {hashes[name]}: "
                "changed after it was bundled; copy it again"
            )
    if listed != _sums(hashes):
        raise BundleError(f"{path}: {SUMS}: changed after it was bundled; copy it again")


def _unsafe_name(names: Iterable[str]) -> str | None:
    """Why files of these names may not be in an archive, with the name; None if they may."""
    seen: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
            return f"{name!r}: a name that leads out of the folder"
        # Surrogates stand for bytes that are no UTF-8, which ZIP cannot hold.
        if len(name) > 400 or any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name):
            return f"{name!r}: a name that no bundle has"
        if name.casefold() in seen:
            return f"{seen[name.casefold()]!r} and {name!r}: two files of one name where case does not count"
        seen[name.casefold()] = name
    return None


def _unsafe(info: zipfile.ZipInfo) -> str | None:
    """Why a member may not be unpacked, whatever its name, or None."""
    kind = info.external_attr >> 28
    if info.orig_filename != info.filename:
        return "a name that no bundle has"
    if kind not in (0, 8) or info.is_dir():
        return "a link or something else that is not a file"
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        return "compressed or encrypted, which no bundle is"
    return None


def _compare(given: Path, again: Path) -> None:
    """Raise BundleError where an archive differs from the one that its own files make: what surrounds the files."""
    with given.open("rb") as a, again.open("rb") as b:
        offset = 0
        while True:
            x, y = a.read(2**20), b.read(2**20)
            if x != y:
                at = offset + next(
                    (i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y))
                )
                with zipfile.ZipFile(given) as archive:
                    before = [info.filename for info in archive.infolist() if info.header_offset <= at]
                raise BundleError(
                    f"{given}: byte {at}, in the archive's own entry for {before[-1] if before else 'its first file'}: "
                    "changed after it was bundled; copy it again"
                )
            if not x:
                return
            offset += len(x)


def unpacked(path: Path, store: Path) -> Path:
    """The folder of a bundle's files below the store: unpacked and checked once, then found by its SHA-256.

    Raises BundleError, OSError.
    """
    folder = store / "bundles" / sha256_file(path)[:16]
    if not folder.exists():
        unpack(path, folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raise BundleError if a file of an unpacked bundle is not the one that was unpacked."""
    for name, sha256 in _listed((folder / SUMS).read_bytes()).items():
        try:
            same = sha256_file(folder / name) == sha256
        except OSError:
            same = False
        if not same:
            raise BundleError(f"{folder / name}: not as it was in the bundle; delete {folder}, and start again")


def asked_by(folder: Path, workdir: Path) -> dict[str, Any]:
    """What a bundle asks to be run, as keys of a configuration; its task files are used where they were unpacked.

    Any other key, such as a margin or where it runs, is not the bundle's to say. Raises BundleError for task files that
    are not the bundle's own.
    """
    written: dict[str, Any] = yaml.safe_load((folder / CONFIGURATION).read_text(encoding="utf-8"))
    asked = {key: value for key, value in written.items() if key in ASKED}
    for name, suite in asked["suites"].items():
        include = suite.get("include_path")
        if include is None:
            continue
        parts = PurePosixPath(str(include)).parts
        if parts[:1] != ("task-files",) or ".." in parts:
            raise BundleError(
                f"{folder / CONFIGURATION}: suites.{name}.include_path: found {include!r}, expected a folder below "
                "task-files/ of the bundle; do not use it"
            )
        suite["include_path"] = os.path.relpath(folder / include, workdir)
    return asked


def weights_needed(folder: Path, model: str) -> str | None:
    """A sentence that says which weights a model of the bundle had, if they came from a local folder."""
    for path in sorted((folder / "manifests/models").glob("*.json")):
        try:
            manifest = read_record(path, ModelManifest)
        except RecordError:
            continue
        if manifest.model == model and manifest.source == "local":
            weights = [entry for entry in manifest.files if entry.path.endswith(".safetensors")]
            shown = ", ".join(f"{entry.path} with SHA-256 {entry.sha256}" for entry in weights[:2])
            return f"a folder with the {len(manifest.files)} files of {path}, of them {shown}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reproval.bundle", fromfile_prefix_chars="@", description="Bundles of reproval."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="bundle evaluations")
    maker.add_argument("--results", type=Path, required=True)
    maker.add_argument("--evaluations", type=Path, nargs="+", required=True)
    maker.add_argument("--manifests", type=Path, nargs="+", required=True)
    maker.add_argument("--base", type=Path, required=True, help="the workflow's folder")
    maker.add_argument("--sbom", type=Path, help="what the image holds, as CycloneDX")
    maker.add_argument("--out", type=Path, required=True)
    checker = commands.add_parser("check", help="check every byte of a bundle")
    checker.add_argument("file", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "make":
            digest = make(
                options.results,
                options.evaluations,
                options.manifests,
                options.base,
                Path.cwd(),
                options.out,
                options.sbom,
            )
            print(f"{options.out}: {options.out.stat().st_size} bytes, SHA-256 {digest}")
        else:
            with tempfile.TemporaryDirectory() as scratch:
                unpack(options.file, Path(scratch) / "bundle")
            print(f"{options.file}: whole, SHA-256 {sha256_file(options.file)}")
    except (BundleError, RecordError, OSError) as error:
        print(f"reproval bundle: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
