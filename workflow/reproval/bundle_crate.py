"""The description of a bundle as an RO-Crate, by the profile Workflow Run Crate: its file ro-crate-metadata.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from reproval import __version__
from reproval.bundle_content import CONFIGURATION, README, SBOM, BundledRun

CRATE = "ro-crate-metadata.json"
BIOSCHEMAS = "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
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


SNAKEMAKE = "https://w3id.org/workflowhub/workflow-ro-crate#snakemake"

Entity = dict[str, Any]


def crate(files: Mapping[str, tuple[int, str]], runs: list[BundledRun]) -> dict[str, Any]:
    """ro-crate-metadata.json for files given as name -> (bytes, SHA-256). Pure: the dates are those of the runs.

    RO-Crate 1.1 with the profile Workflow Run Crate 0.5: the Snakefile is the workflow, every model's evaluation an
    execution of it.
    """
    software: dict[str, Entity] = {}
    images: dict[str, Entity] = {}
    actions = []
    for run in runs:
        boxes = _images(run)
        software |= _software(run)
        images |= boxes
        actions.append(_action(run, files, boxes))
    return {
        "@context": ["https://w3id.org/ro/crate/1.1/context", "https://w3id.org/ro/terms/workflow-run/context"],
        "@graph": [
            {
                "@id": CRATE,
                "@type": "CreativeWork",
                "about": _ref("./"),
                "conformsTo": [
                    _ref("https://w3id.org/ro/crate/1.1"),
                    _ref("https://w3id.org/workflowhub/workflow-ro-crate/1.0"),
                ],
            },
            _root(files, runs, actions),
            *({"@id": url, "@type": "CreativeWork", "name": name} for url, name in PROFILES.items()),
            {"@id": BIOSCHEMAS, "@type": "CreativeWork", "name": "Bioschemas ComputationalWorkflow"},
            {
                "@id": SNAKEMAKE,
                "@type": "ComputerLanguage",
                "name": "Snakemake",
                "identifier": _ref("https://doi.org/10.1093/bioinformatics/bts480"),
                "url": _ref("https://snakemake.readthedocs.io"),
            },
            *software.values(),
            *images.values(),
            *actions,
            *(_file(name, size, sha256, software, images) for name, (size, sha256) in files.items()),
        ],
    }


def _ref(identity: str) -> dict[str, str]:
    return {"@id": identity}


def _one_or_all(values: list[dict[str, str]]) -> Any:
    """RO-Crate 1.1 wants no list of one."""
    return values[0] if len(values) == 1 else values


def _ended(run: BundledRun) -> str:
    begin = datetime.fromisoformat(run.evaluation.begin)
    return (begin + timedelta(seconds=run.evaluation.duration_s)).isoformat(timespec="seconds")


def _root(files: Mapping[str, tuple[int, str]], runs: list[BundledRun], actions: list[Entity]) -> Entity:
    return {
        "@id": "./",
        "@type": "Dataset",
        "name": f"Evaluation of {', '.join(dict.fromkeys(run.evaluation.model for run in runs))} by reproval",
        "description": "Configuration, locks, manifests, task files, plan, results with samples, and report of an "
        "evaluation of language models. `snakemake reproduce --config bundle=FILE` runs it again and judges it.",
        "datePublished": max((_ended(run) for run in runs), default=""),
        "license": _ref("workflow/LICENSE"),
        "conformsTo": [_ref(profile) for profile in PROFILES],
        "mainEntity": _ref("workflow/Snakefile"),
        "hasPart": [_ref(name) for name in files],
        "mentions": _one_or_all([_ref(action["@id"]) for action in actions]),
    }


def _software(run: BundledRun) -> dict[str, Entity]:
    """The packages that a run's results were made with, by identity."""
    found: dict[str, Entity] = {}
    for _, result in run.units:
        for package, version in result.provenance.packages.items():
            identity = f"https://pypi.org/project/{package}/{version.partition('+')[0]}/"
            found[identity] = {
                "@id": identity,
                "@type": "SoftwareApplication",
                "name": package,
                "url": identity,
                "softwareVersion": version,
            }
    return found


def _images(run: BundledRun) -> dict[str, Entity]:
    """The container images that a run's results were made in, by name."""
    return {
        box.image: {
            "@id": box.image,
            "@type": "ContainerImage",
            "name": box.image,
            "sha256": (box.digest or "").rpartition(":")[2] or box.sif_sha256,
        }
        for _, result in run.units
        if (box := result.provenance.container) is not None
    }


def _action(run: BundledRun, files: Iterable[str], images: Iterable[str]) -> Entity:
    """The execution of the workflow that a run was."""
    name, repeat = run.folder.name, run.evaluation.repeat
    own = (f"results/runs/{name}/", *(f"results/{folder}/" for folder, _ in run.units))
    boxes = [_ref(image) for image in images]
    return {
        "@id": f"#run-{name}",
        "@type": "CreateAction",
        "name": f"Evaluation of {run.evaluation.model}" + (f", repeat {repeat}" if repeat else ""),
        "description": f"{', '.join(f'{r.suite}/{r.task}' for _, r in run.units)} on {_machine(run)}",
        "instrument": _ref("workflow/Snakefile"),
        "startTime": run.evaluation.begin,
        "endTime": _ended(run),
        "actionStatus": "http://schema.org/CompletedActionStatus",
        "object": [_ref(CONFIGURATION), _ref(f"results/runs/{name}/run.json")],
        "result": [_ref(file) for file in files if file.startswith(own) and not file.endswith("/run.json")],
        **({"containerImage": boxes} if boxes else {}),
    }


def _file(name: str, size: int, sha256: str, software: Iterable[str], images: Iterable[str]) -> Entity:
    entity: Entity = {
        "@id": name,
        "@type": "File",
        "name": PurePosixPath(name).name,
        "contentSize": str(size),
        "sha256": sha256,
        "encodingFormat": ENCODINGS.get(PurePosixPath(name).suffix, "text/plain"),
    }
    if name == README:
        entity["about"] = _ref("./")
    if name == SBOM:
        entity["encodingFormat"] = "application/vnd.cyclonedx+json"
        if boxes := [_ref(image) for image in images]:
            entity["about"] = _one_or_all(boxes)
    if name == "workflow/Snakefile":
        entity |= {
            "conformsTo": _ref(BIOSCHEMAS),
            "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow"],
            "name": "reproval",
            "version": __version__,
            "programmingLanguage": _ref(SNAKEMAKE),
            "softwareRequirements": [_ref(identity) for identity in software],
        }
    return entity


def _machine(run: BundledRun) -> str:
    made = next((result.provenance for _, result in run.units), None)
    return "an unknown machine" if made is None else ", ".join(made.gpus) or made.cpu
