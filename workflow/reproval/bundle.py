"""One archive that another cluster can run from: everything of a run but the weights and the data sets of others.

An RO-Crate (Workflow Run Crate) in a ZIP file: bundle_content.py says what is in it, bundle_crate.py describes that,
and bundle_archive.py packs and unpacks it.

    python -m reproval.bundle check FILE     every byte of a bundle, or what is wrong with it

`snakemake bundle` makes one, and `snakemake reproduce --config bundle=FILE` runs from it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from reproval.bundle_archive import SUMS, BundleError, Content, sums, unpack, unsafe_name, write_archive
from reproval.bundle_content import CONFIGURATION, json_text, members, read_runs
from reproval.bundle_crate import CRATE, crate
from reproval.files import RecordError, read_record, sha256_bytes, sha256_file
from reproval.records import ModelManifest

# The keys of the configuration that say what runs.
ASKED = ("models", "suites", "container", "seed", "repeats", "batch_invariant")


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
    if reason := unsafe_name(sorted(contents)):
        raise BundleError(f"{reason}, so that nobody could unpack it. Rename it")
    files = {name: _sized(contents[name]) for name in sorted(contents)}
    contents[CRATE] = json_text(crate(files, runs))
    files[CRATE] = _sized(contents[CRATE])
    contents[SUMS] = sums({name: sha256 for name, (_, sha256) in files.items()})
    write_archive(out, contents)
    return sha256_file(out)


def _sized(content: Content) -> tuple[int, str]:
    if isinstance(content, bytes):
        return len(content), sha256_bytes(content)
    return content.stat().st_size, sha256_file(content)


def asked_by(folder: Path, workdir: Path) -> dict[str, Any]:
    """What a bundle asks to be run, as keys of a configuration; its task files are used where they were unpacked.

    Any other key, such as a margin or where it runs, is not the bundle's to say. Raises BundleError for what is no
    configuration, and for task files that are not the bundle's own.
    """
    path = folder / CONFIGURATION
    try:
        written = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise BundleError(f"{path}: found no YAML ({error}); do not use it") from error
    for section in ("models", "suites"):
        entries = written.get(section) if isinstance(written, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise BundleError(
                f"{path}: {section}: expected the {section} by name, each with its settings; do not use it"
            )
    asked: dict[str, Any] = {key: value for key, value in written.items() if key in ASKED}
    for name, suite in asked["suites"].items():
        include = suite.get("include_path")
        if include is None:
            continue
        parts = PurePosixPath(str(include)).parts
        if parts[:1] != ("task-files",) or ".." in parts:
            raise BundleError(
                f"{path}: suites.{name}.include_path: found {include!r}, expected a folder below "
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
