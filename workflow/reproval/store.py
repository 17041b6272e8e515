"""Whether the store holds what its manifests promise: asked before a GPU is, and by `doctor`.

Sizes tell what is missing or cut off and cost nothing. `deep` reads every byte, as `stage` did.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from reproval.files import RecordError, atomic, read_record, sha256_file
from reproval.model_tensors import HEADERS
from reproval.records import ImageManifest, ModelManifest, StoredFile, TaskManifest
from reproval.run_file import RunFile, every, model_key, suite_keys

WEIGHTS_NOTE = ".weights"
"""Suffix of a note beside the manifest of a Hub's model: its weights are there too."""
SMALL_BYTES = 16 * 2**20
"""Smaller files are hashed at every look: configurations, tokenizers, indices."""


def troubles(folder: Path, files: Iterable[StoredFile], deep: bool = False, since_s: float = math.inf) -> list[str]:
    """What is wrong with the files of a manifest, a sentence each that begins with the file's path.

    Small files are read, those changed after `since_s` (Unix time) too, and with `deep` all.
    """
    wrong = []
    for entry in files:
        path = folder / entry.path
        try:
            found = path.stat()
            if found.st_size != entry.size_bytes:
                wrong.append(f"{path}: has {found.st_size:,} bytes, and was staged with {entry.size_bytes:,}")
                continue
            read = deep or found.st_size < SMALL_BYTES or found.st_mtime > since_s
            if read and sha256_file(path) != entry.sha256:
                wrong.append(f"{path}: its content is not what was staged (SHA-256 differs)")
        except FileNotFoundError:
            wrong.append(f"{path}: missing")
        except OSError as error:
            wrong.append(f"{path}: cannot be read ({error.strerror})")
    return wrong


def of_manifest(path: Path, store: Path, deep: bool = False, changed: bool = False) -> list[str]:
    """What is wrong with the files of the manifest at `path`, or with the manifest itself.

    With `changed`, files that are younger than their manifest are read whatever their size.
    """
    if not path.is_file():
        return [f"{path}: missing, so nothing of it was staged"]
    since = path.stat().st_mtime if changed else math.inf
    try:
        if path.parent.name == "models":
            model = read_record(path, ModelManifest)
            folder, files = Path(model.folder), model.files
            if model.source == "hub" and not path.with_suffix(WEIGHTS_NOTE).exists():
                # Weights are still to come, and headers of them are enough until then.
                files = [entry for entry in files if not (folder / HEADERS / f"{entry.path}.json").exists()]
            return troubles(folder, files, deep, since)
        if path.parent.name == "suites":
            return troubles(store, read_record(path, TaskManifest).files, deep, since)
        image = read_record(path, ImageManifest)
    except RecordError as error:
        return [str(error)]
    sif = path.parent / image.sif
    entry = StoredFile(path=sif.name, size_bytes=image.sif_bytes, sha256=image.sif_sha256)
    return troubles(sif.parent, [entry], deep, since)


def manifests(runs: Sequence[RunFile]) -> list[Path]:
    """Manifests of the models and suites of these runs, each once."""
    folder = Path(runs[0].store) / "manifests"
    models = [folder / "models" / f"{model_key(run.run)}.json" for run in runs]
    suites = [folder / "suites" / f"{key}.json" for run in runs for key in suite_keys(run.run)]
    return list(dict.fromkeys([*models, *suites]))


def weights_notes(runs: Sequence[RunFile]) -> list[Path]:
    """The notes that the weights of these runs' models have come from the Hub, each once."""
    hub = [run for run in runs if run.run.model.hub]
    return list(dict.fromkeys(Path(run.store) / f"manifests/models/{model_key(run.run)}{WEIGHTS_NOTE}" for run in hub))


MEND = (
    "Restore these files, or remove the manifest that names them (in STORE/manifests) and run `snakemake stage` where "
    "the network is: it fetches what is missing and checks the rest"
)


def message(wrong: list[str], most: int = 10) -> str:
    """All that is wrong, for people."""
    more = [f"and {len(wrong) - most} more"] if len(wrong) > most else []
    return "\n".join(["the store is not as it was staged:", *(f"  {line}" for line in [*wrong[:most], *more]), MEND])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="Check these manifests, and note in a file that all is there.")
    one.add_argument("--store", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("manifests", type=Path, nargs="+")
    every_one = commands.add_parser("show", help="Check what a configuration needs, and what was changed since.")
    every_one.add_argument("--snapshot", type=Path, required=True)
    every_one.add_argument("--images", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    if options.command == "check":
        names, folder = options.manifests, options.store
    else:
        runs = list(every(options.snapshot))
        names, folder = [*manifests(runs), *options.images], Path(runs[0].store)
    changed = options.command == "show"
    if wrong := [line for path in names for line in of_manifest(path, folder, changed=changed)]:
        sys.exit(f"reproval store: {message(wrong)}")
    if options.command == "check":
        with atomic(options.out) as stream:
            stream.write("complete\n")
    else:
        print(f"The store {folder} is complete: {len(names):,} manifests, in {folder / 'manifests'}.")


if __name__ == "__main__":
    main()
